"""How the rows of a round get up the levels, and when.

A round starts where every level has run on everything before it. Its newest row enters the lowest level; at each exit
the loop decides whether the row's token leaves or the row climbs on. Rows whose tokens left are *pending*: the levels
above run on them later, on the residual stream that the level below left in their rows, so no level ever runs twice.

================  =====================================================================================================
flush             a level runs on all rows it lacks, in one run, when the newest row needs it
recompute         the same, but every run starts at the round's first row again, in every level, as EE-LLM does
pipeline          a thread per level runs on rows as soon as the level below has left them (:mod:`.pipeline`)
auto              rounds by flush or by pipeline, whichever is measured to be faster (:mod:`.auto`)
================  =====================================================================================================

Whatever the way, a level writes the same keys and values. Levels above the last one that owns a cache have nothing to
catch up with: they run on the newest row alone, unless somebody wants their head's word on all rows.
"""

from __future__ import annotations

import time
from typing import Protocol

from shortstack.runtime.decode.step import Stats
from shortstack.runtime.early_exit.pending import PendingCap
from shortstack.runtime.engine.decoder import LeveledDecoder


class CatchUp(Protocol):
    """One way to get rows up the levels."""

    def begin_round(self, past: int) -> None:
        """Start a round at position ``past``; every level has run on everything before it."""
        ...

    def run_lowest(self, row: int, with_logits: bool) -> None:
        """Run the lowest level and its head on a row."""
        ...

    def run_level(self, level: int, row: int, num_rows: int, with_logits: bool) -> None:
        """Have a level run on all rows up to this one, its head on the last ``num_rows`` of them.

        Without a head, nothing happens if it has run on them already.
        """
        ...

    def mark_pending(self, level: int, row: int) -> None:
        """Say that a row's token left at a level's exit, so that the row is pending."""
        ...

    def fill_pending(self, rows: int) -> None:
        """Have every level run on the first ``rows`` rows, without heads."""
        ...

    def close(self) -> None:
        """Let go of whatever it holds; may be called at any moment."""
        ...


class FlushCatchUp:
    """See :class:`CatchUp` and the table above.

    Args:
        stack: The model.
        stats: Counts what is done.
        cap: Told what runs of the last level take.
        recomputes: Start every run at the round's first row.
        fills_all: Levels without a cache run on pending rows, too, because their heads are wanted there.
    """

    def __init__(
        self,
        stack: LeveledDecoder,
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

    def run_lowest(self, row: int, with_logits: bool) -> None:
        """See :meth:`CatchUp.run_lowest`."""
        started = time.perf_counter()
        start = 0 if self._recomputes else row
        self._stack.run(0, start, row + 1, self._past, 1, with_logits)
        self._filled[0] = row + 1
        self._stats.draft_runs += row + 1 - start
        self._stats.draft_s += time.perf_counter() - started

    def run_level(self, level: int, row: int, num_rows: int, with_logits: bool) -> None:
        """See :meth:`CatchUp.run_level`."""
        if num_rows == 0 and self._filled[level] > row:
            return
        started = time.perf_counter()
        start = 0 if self._recomputes else self._filled[level]
        if level >= self._filling_levels:
            if num_rows == 0:
                return
            start = 0 if self._recomputes else row + 1 - num_rows
        self._stack.run(level, start, row + 1, self._past, num_rows, with_logits)
        self._filled[level] = row + 1
        elapsed_s = time.perf_counter() - started
        self._stats.verify_s += elapsed_s
        if level == self._last:
            self._stats.verify_runs += 1
            if num_rows:  # a run without its head is cheaper
                self._cap.observe(row + 1 - start, elapsed_s)

    def mark_pending(self, level: int, row: int) -> None:
        """See :meth:`CatchUp.mark_pending`."""

    def fill_pending(self, rows: int) -> None:
        """See :meth:`CatchUp.fill_pending`."""
        for level in range(1, self._stack.filling_levels):
            self.run_level(level, rows - 1, 0, False)

    def close(self) -> None:
        """See :meth:`CatchUp.close`."""


def reserve_round(stack: LeveledDecoder, past: int) -> None:
    """Make room for a whole round at position ``past``, so that nothing moves while it runs."""
    stack.reserve(min(past + stack.window, stack.max_length), past)
