"""What a decoding loop asks of the trained drafter of one text, whatever its kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from shortstack.runtime.engine.head import Head


class Drafting(Protocol):
    """A trained drafter on one text.

    Attributes:
        head: Outputs of its head: row r is that of draft r + 1.
        most_drafts: How many tokens it can draft in a round.
    """

    head: Head
    most_drafts: int

    def warn_of_overflow(self) -> None:
        """Log, once for each loaded model, that the drafter's numbers overflow."""
        ...

    def start(self, tokens: Sequence[int], cached: int) -> int:
        """Begin a text; return how many of its cached positions may stay, so that the drafter sees all that follows.

        Args:
            tokens: The prompt.
            cached: How many of its positions the model's cache holds.
        """
        ...

    def end(self) -> None:
        """End the text: prompts of other generations need not be kept."""
        ...

    def keep_round(self, rows: int) -> None:
        """Note that the first rows of the round that the model has just judged belong to the text."""
        ...

    def is_behind(self) -> bool:
        """Return whether more rows are missing than a round leaves: a prompt's, or those of many plain steps."""
        ...

    def catch_up(self, tokens: Sequence[int]) -> None:
        """Run the rows of a text that are missing, but for as many as a round leaves."""
        ...

    def refill(self, tokens: Sequence[int], with_logits: bool) -> None:
        """Make the first draft.

        Args:
            tokens: The text; the model has run all its positions but the last.
            with_logits: Whether the head returns logits.
        """
        ...

    def put(self, row: int, token: int) -> None:
        """Set the token of a drafted row, 1 or later: that of draft ``row``."""
        ...

    def step(self, row: int, with_logits: bool) -> None:
        """Make draft ``row + 1``, from row 1."""
        ...
