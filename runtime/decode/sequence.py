"""The text of one generation as token ids, with the number of positions that the cache holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class TokenSequence:
    """Tokens at positions 0, 1, 2, ...; every layer's cache holds the first :attr:`cached` of them.

    Attributes:
        tokens: All token ids, those of the prompt first.
        cached: How many positions have valid keys and values; never more than there are tokens.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.tokens = list(tokens)
        self.cached = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def append(self, token: int) -> None:
        """Add a token that is not in the cache yet."""
        self.tokens.append(token)

    def commit(self, positions: int) -> None:
        """Record that the cache now holds the next ``positions`` positions.

        Raises:
            ValueError: There are not that many tokens.
        """
        if self.cached + positions > len(self.tokens):
            raise ValueError(f"{self.cached} + {positions} positions of {len(self.tokens)} tokens")
        self.cached += positions

    def rewind(self, length: int) -> None:
        """Forget everything from position ``length`` on; the cache itself need not change.

        Raises:
            ValueError: There are not that many tokens.
        """
        if not 0 <= length <= len(self.tokens):
            raise ValueError(f"rewind to {length} of {len(self.tokens)} tokens")
        del self.tokens[length:]
        self.cached = min(self.cached, length)

    def restart(self, tokens: Sequence[int]) -> int:
        """Replace the text, and keep the cached positions of the longest common prefix.

        At least one token is left to run, since its logits predict the next one.

        Returns:
            The number of positions kept.
        """
        common = 0
        for old, new in zip(self.tokens[: self.cached], tokens[:-1], strict=False):
            if old != new:
                break
            common += 1
        self.rewind(common)
        self.tokens.extend(tokens[common:])
        return common
