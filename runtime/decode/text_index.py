"""Other texts in which drafts are looked up: earlier answers of a job, templates, a document that is quoted.

All positions of the texts are sorted by the tokens that end there, read backwards. The longest match of a text's end is
then beside the place where it would be sorted in, so a search costs a bisection. (A suffix array of the reversed texts,
as in REST, arXiv 2311.08252, cut off at :data:`MOST` tokens.) An index is built once and never changes, so all
generations may share it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from shortstack.graphs.errors import RequestError
from shortstack.graphs.read_file import parse_json, read_text
from shortstack.runtime.decode.suffix_index import Match
from shortstack.runtime.text.tokenizer import Tokenizer

MOST = 16  # tokens that are compared; a power of two
MOST_TOKENS = 4_000_000  # of all texts
_NO_TOKEN = -1  # between texts, and before the first one


class TextIndex:
    """The positions of texts, by the tokens before them.

    Args:
        texts: The texts, as token ids.
        least: The fewest tokens that a match has.

    Raises:
        RequestError: They have no token, or more than :data:`MOST_TOKENS`.
    """

    def __init__(self, texts: Iterable[Sequence[int]], least: int = 2) -> None:
        gap = np.full(MOST, _NO_TOKEN, np.int32)
        parts, self._least, size = [gap], least, 0
        for text in texts:
            size += len(text)
            if size > MOST_TOKENS:
                raise RequestError(
                    "the texts to look drafts up in are too long",
                    found="more",
                    expected=f"at most {MOST_TOKENS} tokens",
                )
            parts += [np.asarray(text, np.int32), gap]
        if not size:
            raise RequestError("the texts to look drafts up in hold no token", remedy="give texts like the answers")
        self.size = size
        self._tokens = np.concatenate(parts)
        self._order = _sorted_ends(self._tokens)
        self._newest = self._tokens[self._order]

    def __repr__(self) -> str:
        return f"TextIndex({self.size} tokens)"

    def longest(self, tokens: Sequence[int]) -> Match | None:
        """Return the longest occurrence of a text's end, as far as :data:`MOST` tokens; None if there is none."""
        wanted = list(tokens[: -MOST - 1 : -1])
        if not wanted:
            return None
        low, high = (int(self._newest.searchsorted(wanted[0], side)) for side in ("left", "right"))
        if low == high:
            return None
        place = bisect_right(self._order, wanted, low, high, key=self._before)
        best = Match(0, 0)
        for index in (place - 1, place):
            if low <= index < high:
                length = _common(wanted, self._before(self._order[index]))
                if length > best.length:
                    best = Match(length, int(self._order[index]) + 1)
        return best if best.length >= self._least else None

    def following(self, match: Match, count: int) -> list[int]:
        """Return up to ``count`` tokens after a match, as many as its text has."""
        found: list[int] = self._tokens[match.after : match.after + count].tolist()
        return found[: found.index(_NO_TOKEN)] if _NO_TOKEN in found else found

    def _before(self, position: np.integer) -> list[int]:
        """Return the tokens that end at a position, backwards."""
        end = int(position)
        return self._tokens[end : end - MOST : -1].tolist()  # type: ignore[no-any-return]


def read_texts(path: Path, tokenizer: Tokenizer) -> TextIndex:
    """Read texts to look drafts up in.

    Args:
        path: A text, or ``.jsonl`` with a text in each line: a JSON string, or an object whose ``text`` it is, such as
            an answer of ``shortstack batch``.
        tokenizer: The bundle's.

    Raises:
        RequestError: The file cannot be read, or a line holds no text.
    """
    content = read_text(path, RequestError, "give a UTF-8 text, or a jsonl file with a text in each line")
    return TextIndex(tokenizer.encode(text, add_special_tokens=False) for text in _texts(path, content))


def _texts(path: Path, content: str) -> Iterable[str]:
    if path.suffix != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        entry = parse_json(line, f"{path}, line {number}", RequestError)
        text = entry.get("text") if isinstance(entry, dict) else entry
        if not isinstance(text, str):
            raise RequestError(
                f"{path}, line {number} holds no text",
                found=line[:60],
                expected='a JSON string, or an object such as {"text": ...}',
            )
        yield text


def _sorted_ends(tokens: np.ndarray) -> np.ndarray:
    """Return the positions that a token follows, int32, sorted by up to MOST tokens that end there, read backwards."""
    places = np.flatnonzero((tokens[:-1] != _NO_TOKEN) & (tokens[1:] != _NO_TOKEN))
    rank = np.unique(tokens, return_inverse=True)[1].astype(np.int64)  # by one token
    reach = 1
    while reach < MOST:  # by twice as many
        earlier = np.zeros_like(rank)
        earlier[reach:] = rank[:-reach]
        rank = np.unique(rank * (int(rank.max()) + 1) + earlier, return_inverse=True)[1].astype(np.int64)
        reach *= 2
    found: np.ndarray = places[np.argsort(rank[places], kind="stable")].astype(np.int32)
    return found


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two lists have in common from their beginnings on."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))
