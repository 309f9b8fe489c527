"""What the decoding loops see of a model: its heads, row by row, and the runs that they may ask for.

The rows are those of a round, see :mod:`shortstack.runtime.engine.stack`, which implements these protocols. Tests
replace the stack with scripted models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from shortstack.runtime.engine.drafting import Drafting
from shortstack.runtime.engine.head import Head


class State(Protocol):
    """What plain and speculative decoding see of a model: the rows of a round. Who runs it, they do not see."""

    @property
    def window(self) -> int:
        """The most rows that one round may have."""
        ...

    @property
    def max_length(self) -> int:
        """The longest context, in positions."""
        ...

    @property
    def num_layers(self) -> int:
        """Layers of the whole model."""
        ...

    @property
    def exit_layer(self) -> int:
        """Layers run before the exit that drafts; 0 for an uncut stack."""
        ...

    @property
    def final(self) -> Head:
        """Outputs of the final head in the last :meth:`Decoder.prefill` (in row 0) or :meth:`Decoder.verify`."""
        ...

    @property
    def exit(self) -> Head:
        """Outputs of the drafting exit, by row."""
        ...

    @property
    def drafter(self) -> Drafting:
        """The trained drafter on this text; asked for only where the bundle has one."""
        ...

    @property
    def has_drafter(self) -> bool:
        """Whether the bundle has a trained drafter."""
        ...

    def clock(self) -> float:
        """Return the seconds, from any point in time, that this sequence has used; loops measure costs with it."""
        ...

    def put(self, row: int, token: int) -> None:
        """Set the token of a row."""
        ...

    def keep_state(self, row: int) -> None:
        """Keep the state in the row of the last verification that predicted the newest token; row 0 if not called."""
        ...


class LeveledState(State, Protocol):
    """What early exit sees besides: any number of exits, and levels that run separately."""

    @property
    def heads(self) -> Sequence[Head]:
        """Outputs of each level's head, by row; the final head comes last."""
        ...

    @property
    def depths(self) -> Sequence[int]:
        """Layers run before each head."""
        ...

    @property
    def filling_levels(self) -> int:
        """How many levels, from the bottom, must run on a position to complete its keys and values; 1 or more."""
        ...

    @property
    def sees_state(self) -> bool:
        """Whether any exit in use sees states."""
        ...

    def reserve(self, positions: int, keep: int) -> None:
        """Make room in the cache and keep ``keep`` positions; nothing else may run in the meantime."""
        ...

    def hidden(self, level: int, row: int) -> np.ndarray:
        """Return the residual stream [hidden] that a level, any but the last, left in a row."""
        ...


class Decoder(State, Protocol):
    """Performs the runs that plain and speculative decoding ask for."""

    def prefill(self, tokens: Sequence[int], past: int, with_logits: bool) -> None:
        """Run all layers over ``tokens``, the first at position ``past``; the final head sees the last token only."""
        ...

    def draft(self, row: int, past: int, with_head: bool, with_logits: bool) -> None:
        """Run the lowest level on one row; with its head, the drafted token becomes the token of the next row."""
        ...

    def draft_rows(self, start: int, end: int, past: int) -> None:
        """Run the lowest level, without its head, on rows ``[start, end)`` at once; their tokens are known."""
        ...

    def verify(self, rows: int, past: int, with_logits: bool) -> None:
        """Run the highest level on rows 0..rows-1, and the final head on each of them."""
        ...


class LeveledDecoder(Decoder, LeveledState, Protocol):
    """Performs the runs that early exit asks for besides."""

    def run(self, level: int, start: int, end: int, past: int, num_rows: int, with_logits: bool) -> None:
        """Run a level on rows ``[start, end)``, and its head on the last ``num_rows`` of them.

        Levels may run at the same time in different threads, each on rows that the level below has finished.
        """
        ...

    def prefill_level(self, level: int, tokens: Sequence[int], past: int, with_head: bool, with_logits: bool) -> None:
        """Run one level over a prompt that may leave early; its head, if it runs, sees the last position.

        The head writes to row 0, and that of the lowest level also puts its token into row 1, as in drafting. Row 0 of
        :meth:`hidden` is that of the last position. The residual stream of the whole prompt is kept for the next level,
        and dropped after the last one. Levels must be run in order. The lowest one may be run again, and then the
        others are, too.
        """
        ...
