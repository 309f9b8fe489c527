"""What the messages of errors do with found values, which may come from hostile files."""

from __future__ import annotations

import pytest

from shortstack.graphs.errors import MAX_FOUND, CheckpointError, shortened


def test_a_long_found_value_is_cut_and_says_by_how_much() -> None:
    message = str(CheckpointError("config.json: model_type", found="x" * 100_000, expected="llama"))
    assert message.startswith("config.json: model_type: found " + "x" * MAX_FOUND + "... (99800 more characters)")
    assert message.endswith("expected llama")
    assert len(message) < 2 * MAX_FOUND


def test_a_found_value_that_fits_stays_whole() -> None:
    assert shortened("x" * MAX_FOUND) == "x" * MAX_FOUND


@pytest.mark.parametrize("text", ["\x1b[31mred", "\u202eright to left", "bell\a", "\udc80 half of a character"])
def test_characters_that_a_terminal_acts_on_are_escaped(text: str) -> None:
    message = str(CheckpointError(text, found=text))
    message.encode()
    assert message.replace(" ", "").isprintable()
    assert repr(text)[1:5] in message


def test_letters_of_any_language_stay_as_they_are() -> None:
    assert str(CheckpointError("größe, 大きさ", found="Ærø")) == "größe, 大きさ: found Ærø"
