"""Where the end of a text occurred before: both indexes against a search of everything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.scripted_texts import examples
from shortstack.graphs.errors import RequestError
from shortstack.runtime.decode import text_index
from shortstack.runtime.decode.suffix_index import Match, SuffixIndex
from shortstack.runtime.decode.text_index import MOST, TextIndex, read_texts

tokens = st.lists(st.integers(0, 2), max_size=60) | st.lists(st.integers(0, 5), max_size=60)


def ends_alike(one: list[int], other: list[int], most: int) -> int:
    """How many of the last tokens of two texts are the same."""
    length = 0
    while length < min(len(one), len(other), most) and one[-1 - length] == other[-1 - length]:
        length += 1
    return length


def searched(text: list[int], least: int, most: int) -> Match | None:
    """The longest earlier occurrence, and the last of these."""
    found = [Match(ends_alike(text[:after], text, most), after) for after in range(1, len(text))]
    return max((match for match in found if match.length >= least), default=None)


@examples(400)
@given(tokens, st.integers(1, 3), st.integers(0, 6), st.data())
def test_the_longest_and_then_the_most_recent_occurrence_is_found(
    text: list[int], least: int, further: int, data: st.DataObject
) -> None:
    index = SuffixIndex(least, least + further, chain=1000)
    end = 0
    while end < len(text):
        end += data.draw(st.integers(1, 7))
        index.extend(text[:end])
        assert len(index) == min(end, len(text))
        assert index.longest() == searched(text[:end], least, least + further)


@examples(200)
@given(tokens, st.integers(1, 4))
def test_a_short_chain_finds_an_occurrence_among_the_most_recent_ones(text: list[int], chain: int) -> None:
    index = SuffixIndex(2, 8, chain)
    index.extend(text)
    recent = [at for at in range(2, len(text)) if text[at - 2 : at] == text[-2:]][-chain:]
    wanted = max((Match(ends_alike(text[:after], text, 8), after) for after in recent), default=None)
    assert index.longest() == wanted


def test_no_token_has_no_occurrence() -> None:
    assert SuffixIndex().longest() is None


def test_what_follows_goes_on_in_the_rhythm_of_the_text() -> None:
    index = SuffixIndex()
    index.extend([9, 1, 2, 3, 1, 2])
    match = index.longest()
    assert match == Match(2, 3)
    assert index.following(match, 2) == [3, 1]
    assert index.following(match, 8) == [3, 1, 2, 3, 1, 2, 3, 1]


def test_a_text_of_one_token_is_searched_in_bounded_time() -> None:
    index = SuffixIndex(2, 16, 64)
    compared = 0

    class Counted(list):  # type: ignore[type-arg]
        def __getitem__(self, key: object) -> object:
            nonlocal compared
            compared += 1
            return super().__getitem__(key)  # type: ignore[index]

    index._tokens = Counted()
    index.extend([5] * 5000)
    compared = 0
    assert index.longest() == Match(16, 4999)
    assert compared < 64 * 18 * 2


@examples(300)
@given(st.lists(tokens, min_size=1, max_size=4), tokens, st.integers(1, 3), st.integers(0, 60), st.data())
def test_the_longest_occurrence_in_other_texts_is_found(
    texts: list[list[int]], text: list[int], least: int, end: int, data: st.DataObject
) -> None:
    if not any(texts):
        return
    text += data.draw(st.sampled_from(texts))[:end]
    index = TextIndex(texts, least)
    places = [(each, after) for each in texts for after in range(1, len(each))]
    wanted = max((ends_alike(each[:after], text, MOST) for each, after in places), default=0)
    found = index.longest(text)
    if wanted < least:
        assert found is None
        return
    assert found is not None
    assert found.length == wanted
    follows = [each[after:][:5] for each, after in places if ends_alike(each[:after], text, MOST) == wanted]
    assert index.following(found, 5) in follows


def test_of_equally_long_whole_matches_the_last_one_is_taken() -> None:
    index = TextIndex([[*range(MOST), 50], [*range(MOST), 51]])
    found = index.longest([*range(MOST)])
    assert found is not None
    assert index.following(found, 3) == [51]


def test_texts_to_look_up_in_have_tokens_but_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_index, "MOST_TOKENS", 10)
    assert TextIndex([[1] * 10]).size == 10
    with pytest.raises(RequestError, match="at most 10 tokens"):
        TextIndex([[1] * 6, [1] * 5])
    with pytest.raises(RequestError, match="no token"):
        TextIndex([[], []])


class Words:
    """A tokenizer: a token for each letter."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(letter) for letter in text]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "one two"),
        ("b.jsonl", '"one two"\n\n' + json.dumps({"id": 3, "text": "three"}) + "\n"),
    ],
)
def test_texts_are_a_file_or_the_lines_of_one(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    index = read_texts(path, Words())  # type: ignore[arg-type]
    found = index.longest([ord(letter) for letter in "xon"])
    assert found is not None
    assert "".join(map(chr, index.following(found, 9))) == "e two"


@pytest.mark.parametrize(
    ("line", "message"), [("[1]", "holds no text"), ('{"text": 1}', "holds no text"), ("{", "JSON")]
)
def test_a_line_without_a_text_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(f'"fine"\n{line}\n')
    with pytest.raises(RequestError, match=rf"line 2.*{message}"):
        read_texts(path, Words())  # type: ignore[arg-type]
