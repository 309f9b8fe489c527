"""The text of one generation as token ids, and how much of it the cache holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class TokenSequence:
    """Tokens at positions 0, 1, 2, ... of which the first :attr:`cached` have their K,V in every layer.

    Attributes:
        tokens: All token ids, prompt first.
        cached: Positions whose K,V is written and right; never more than there are tokens.
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
        """Declare the next ``positions`` positions written.

        Raises:
            ValueError: There are not that many tokens.
        """
        if self.cached + positions > len(self.tokens):
            raise ValueError(f"{self.cached} + {positions} positions of {len(self.tokens)} tokens")
        self.cached += positions

    def rewind(self, length: int) -> None:
        """Forget everything from position ``length`` on; the cache needs no touch.

        Raises:
            ValueError: There are not that many tokens.
        """
        if not 0 <= length <= len(self.tokens):
            raise ValueError(f"rewind to {length} of {len(self.tokens)} tokens")
        del self.tokens[length:]
        self.cached = min(self.cached, length)

    def restart(self, tokens: Sequence[int]) -> int:
        """Replace the text, keeping the cache of the longest common beginning.

        At least one token is left to run, since the next one is read off its logits.

        Returns:
            How many positions were kept.
        """
        common = 0
        for old, new in zip(self.tokens[: self.cached], tokens[:-1], strict=False):
            if old != new:
                break
            common += 1
        self.rewind(common)
        self.tokens.extend(tokens[common:])
        return common
