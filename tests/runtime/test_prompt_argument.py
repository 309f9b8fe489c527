"""The prompt on the command line: what shells make of it, and standard input."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.bad_input import Refused
from shortstack.__main__ import run


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("Why", "is", "the", "sky", "blue?"), ("more than one prompt", "is the sky blue?", "in quotes")),
        (("Why", "not?"), ("more than one prompt", "not?", "in quotes")),
        ((), ("the prompt is missing", "in quotes", "write - to read it")),
        (("-n", "4"), ("the prompt is missing",)),
        (("- one\n- two",), ("no such option", "rite -- before")),
        (("--json is what?",), ("no such option", "rite -- before")),
    ],
)
def test_a_prompt_that_the_shell_took_apart_is_answered_with_what_to_write(
    sound: Path, refused: Refused, arguments: tuple[str, ...], says: tuple[str, ...]
) -> None:
    refused(["generate", sound, *arguments], *says)


def test_a_prompt_that_begins_with_a_dash_goes_behind_two(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", str(sound), "--raw", "-n", "2", "--json", "--", "- one"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"]


def test_a_mistyped_option_is_still_called_one(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", str(sound), "Hello", "--jason"]) == 2
    assert "--json" in capsys.readouterr().err


class Broken(io.StringIO):
    """A stream that cannot be read, such as one opened for writing."""

    def read(self, size: int | None = -1) -> str:
        raise OSError("Bad file descriptor")


def closed() -> io.StringIO:
    stream = io.StringIO("Hello")
    stream.close()
    return stream


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: None, "which is closed"),
        (closed, "which is closed"),
        (Broken, "cannot be read: Bad file descriptor"),
        (lambda: io.TextIOWrapper(io.BytesIO(b"Hi \xff"), "utf-8"), "not UTF-8: found byte 0xff"),
        (lambda: io.TextIOWrapper(io.BytesIO(b"Hi \xff"), "utf-8", "surrogateescape"), "not UTF-8"),
        (lambda: io.StringIO(""), "the prompt is empty"),
    ],
)
def test_standard_input_that_is_no_text_is_refused(
    sound: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any], says: str
) -> None:
    monkeypatch.setattr(sys, "stdin", make())
    refused(["generate", sound, "-", "--raw"], says)


def test_a_terminal_is_told_how_to_end_the_prompt(
    sound: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, is_told in ((Terminal("Hello"), True), (io.StringIO("Hello"), False)):
        monkeypatch.setattr(sys, "stdin", stream)
        assert run(["generate", str(sound), "-", "--raw", "-n", "2"]) == 0
        assert ("end it with Ctrl-D" in capsys.readouterr().err) is is_told
