"""Where the end of a growing text occurred before: chains of positions that end with the same few tokens.

Position i is chained to the one before it that ends with the same few tokens, as in the matchers of LZ77 compressors
(RFC 1951, section 4). Adding a token costs one dictionary entry, whatever the text. A search walks the chain of the
newest position from the most recent occurrence on, over at most ``chain`` of them, and compares at most ``most`` tokens
backwards. Memory is about 150 bytes a token.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple


class Match(NamedTuple):
    """An earlier occurrence of the end of a text.

    Attributes:
        length: How many tokens of the end occurred there, as far as they were compared.
        after: Position of the token that followed.
    """

    length: int
    after: int


class SuffixIndex:
    """Finds the longest end of a text that occurred before, and of several occurrences the most recent one.

    Args:
        least: The fewest tokens that a match has, 1 or more.
        most: The most tokens that are compared; longer matches count as this long.
        chain: The most occurrences that a search looks at.
    """

    def __init__(self, least: int = 2, most: int = 16, chain: int = 64) -> None:
        assert 1 <= least <= most
        self._least, self._most, self._chain = least, most, chain
        self._tokens: list[int] = []
        self._latest: dict[tuple[int, ...], int] = {}  # the last position that ends with these tokens
        self._before = array("q")  # for each position: the one before it that ends with the same tokens, or -1

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add what is new of a text that begins with the tokens that are there already."""
        own, least, latest = self._tokens, self._least, self._latest
        for position in range(len(own), len(tokens)):
            own.append(tokens[position])
            if position + 1 < least:
                self._before.append(-1)
                continue
            end = tuple(own[-least:])
            self._before.append(latest.get(end, -1))
            latest[end] = position

    def longest(self) -> Match | None:
        """Return the longest earlier occurrence of the text's end; None if there is none."""
        own, before = self._tokens, self._before
        if not own:
            return None
        newest = len(own) - 1
        candidate, left, length, found = before[newest], self._chain, 0, -1
        while candidate >= 0 and left:
            # A longer match agrees at the first token that the best one so far does not cover.
            if length <= candidate and own[candidate - length] == own[newest - length]:
                same = self._same(candidate, newest)
                if same > length:
                    length, found = same, candidate
                    if length == self._most:
                        break
            candidate, left = before[candidate], left - 1
        return Match(length, found + 1) if length else None

    def following(self, match: Match, count: int) -> list[int]:
        """Return the ``count`` tokens after a match; where the text ends, it goes on as it would by the same match."""
        own, start = self._tokens, match.after
        found = own[start : start + count]
        period = len(own) - start
        while len(found) < count:
            found.append(found[len(found) - period])
        return found

    def _same(self, candidate: int, newest: int) -> int:
        """Return how many tokens that end at two positions are the same."""
        own, length = self._tokens, self._least
        most = min(self._most, candidate + 1)
        while length < most and own[candidate - length] == own[newest - length]:
            length += 1
        return length
