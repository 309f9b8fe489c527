"""How and when the levels run on the rows of a round.

When a round starts, every level has run on all positions before it. The newest row enters the lowest level. At each
exit the loop decides whether the row's token leaves or the next level runs on the row too. Rows whose tokens left are
*pending*: the levels above run on them later. They read the residual stream that the level below left in those rows, so
no level runs on a row twice.

================  =====================================================================================================
flush             when the newest row needs a level, the level runs once on all rows that it has not seen
recompute         the same, but in every level every run starts at the round's first row again, as in EE-LLM
pipeline          a thread per level runs on rows as soon as the level below has finished them (:mod:`.pipeline`)
auto              flush or pipeline for each round, whichever is measured to be faster (:mod:`.auto`)
================  =====================================================================================================

In every way a level writes the same keys and values. Levels above the last one that owns a cache have nothing to catch
up with. They run on the newest row alone, unless the outputs of their heads are needed for all rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from shortstack.runtime.decode.runs import LevelRun, Run
from shortstack.runtime.decode.step import Stats
from shortstack.runtime.early_exit.pending import PendingCap
from shortstack.runtime.engine.decoder import LeveledState


class CatchUp(Protocol):
    """One way to run the levels on the rows of a round.

    What runs levels returns the runs that it asks for, and has done its work when the loop has yielded all of them.
    """

    def begin_round(self, past: int) -> None:
        """Start a round at position ``past``; every level has run on all positions before it."""
        ...

    def run_lowest(self, row: int, with_logits: bool) -> Iterable[Run]:
        """Run the lowest level and its head on a row."""
        ...

    def run_level(self, level: int, row: int, num_rows: int, with_logits: bool) -> Iterable[Run]:
        """Run a level on all rows up to this one that it has not run on, and its head on the last ``num_rows`` rows.

        If ``num_rows`` is 0 and the level has run on all of them, nothing happens.
        """
        ...

    def mark_pending(self, level: int, row: int) -> None:
        """Record that a row's token left at a level's exit, so that the row is pending."""
        ...

    def fill_pending(self, rows: int) -> Iterable[Run]:
        """Run the first ``rows`` rows through every level up to the last that owns a cache, without heads."""
        ...

    def close(self) -> None:
        """Release threads and other resources; may be called at any time."""
        ...


class FlushCatchUp:
    """See :class:`CatchUp` and the table above.

    Args:
        stack: The model.
        stats: Counts runs and seconds.
        cap: Learns how long runs of the last level take.
        recomputes: Whether every run starts at the round's first row.
        fills_all: Whether levels without a cache run on pending rows too, because their heads are needed there.
    """

    def __init__(
        self,
        stack: LeveledState,
        stats: Stats,
        cap: PendingCap,
        *,
        recomputes: bool = False,
        fills_all: bool = True,
    ) -> None:
        self._stack = stack
        self._stats = stats
        self._cap = cap
        self._recomputes = recomputes
        self._last = len(stack.heads) - 1
        self._filling_levels = self._last + 1 if fills_all else stack.filling_levels
        self._filled = [0] * (self._last + 1)
        self._past = 0

    def begin_round(self, past: int) -> None:
        """See :meth:`CatchUp.begin_round`."""
        reserve_round(self._stack, past)
        self._past = past
        self._filled = [0] * (self._last + 1)

    def run_lowest(self, row: int, with_logits: bool) -> Iterable[Run]:
        """See :meth:`CatchUp.run_lowest`."""
        started = self._stack.clock()
        start = 0 if self._recomputes else row
        yield LevelRun(0, start, row + 1, self._past, 1, with_logits)
        self._filled[0] = row + 1
        self._stats.draft_runs += row + 1 - start
        self._stats.draft_s += self._stack.clock() - started

    def run_level(self, level: int, row: int, num_rows: int, with_logits: bool) -> Iterable[Run]:
        """See :meth:`CatchUp.run_level`."""
        if num_rows == 0 and self._filled[level] > row:
            return
        started = self._stack.clock()
        start = 0 if self._recomputes else self._filled[level]
        if level >= self._filling_levels:
            if num_rows == 0:
                return
            start = 0 if self._recomputes else row + 1 - num_rows
        yield LevelRun(level, start, row + 1, self._past, num_rows, with_logits)
        self._filled[level] = row + 1
        elapsed_s = self._stack.clock() - started
        self._stats.verify_s += elapsed_s
        if level == self._last:
            self._stats.verify_runs += 1
            self._cap.observe(row + 1 - start, elapsed_s, has_head=num_rows > 0)

    def mark_pending(self, level: int, row: int) -> None:
        """See :meth:`CatchUp.mark_pending`."""

    def fill_pending(self, rows: int) -> Iterable[Run]:
        """See :meth:`CatchUp.fill_pending`."""
        for level in range(1, self._stack.filling_levels):
            yield from self.run_level(level, rows - 1, 0, False)

    def close(self) -> None:
        """See :meth:`CatchUp.close`."""


def reserve_round(stack: LeveledState, past: int) -> None:
    """Make room for a whole round at position ``past``, so that no buffer is replaced during the round."""
    stack.reserve(min(past + stack.window, stack.max_length), past)
