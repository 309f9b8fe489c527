"""How far two generations from one prompt say the same, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shortstack.runtime.calibration.dissimilarity import edit_share


@dataclass(frozen=True, slots=True)
class Agreement:
    """See the attributes.

    Attributes:
        tokens: Length of the longer generation.
        first_difference: Position of the first token that differs, from 0; None where none does.
        equal_share: Positions with equal tokens / ``tokens``.
        similarity: 1 - edit distance over token ids / ``tokens``: an inserted token does not spoil all behind it.
    """

    tokens: int
    first_difference: int | None
    equal_share: float
    similarity: float

    @property
    def is_exact(self) -> bool:
        """Whether all tokens are the same."""
        return self.first_difference is None

    @property
    def prefix_share(self) -> float:
        """Tokens before the first difference / ``tokens``."""
        return 1.0 if self.first_difference is None else self.first_difference / self.tokens

    def words(self) -> str:
        """Return it in words."""
        if self.first_difference is None:
            return f"all {self.tokens} tokens"
        same = f"first {self.first_difference} of {self.tokens} tokens ({self.prefix_share:.0%})"
        return f"{same}; {self.equal_share:.0%} equal by position, {self.similarity:.0%} by edit distance"

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        return {"is_exact": self.is_exact, **asdict(self)}


def agreement_of(one: Sequence[int], other: Sequence[int]) -> Agreement:
    """Compare two lists of token ids."""
    tokens = max(len(one), len(other))
    equal = [a == b for a, b in zip(one, other, strict=False)] + [False] * abs(len(one) - len(other))
    first_difference = equal.index(False) if False in equal else None
    share = sum(equal) / tokens if tokens else 1.0
    return Agreement(tokens, first_difference, share, 1 - edit_share(one, other))
