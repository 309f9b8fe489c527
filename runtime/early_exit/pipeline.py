"""Pipelined early exit: each level above the lowest has a thread, which runs on rows that the level below has finished.

This is EE-LLM's second method on one machine, with exact keys and values. While the caller's thread runs the lowest
level on the next token, the levels above catch up with the tokens before it. A level that has fallen behind takes
several rows in one run. Here the tokens of rows 0 and 1 leave at the lowest exit, and the token of row 2 does not::

    caller     lowest 0  lowest 1  lowest 2  wait for 2 ..... lowest 3
    level 1       .      [run 0]   [  run 1, 2 with head  ]
    level 2       .         .      [run 0]   .    [run 1, 2 with head]

A level's thread may run on a row as soon as the row is released: by :meth:`mark_pending`, by :meth:`run_level`, or, if
the row's token has left already, by the thread of the level below. An exception in a thread is raised in the caller, at
its next step. Levels above the last one that owns a cache run only on rows that the caller asks for. The levels'
sessions should have separate thread pools
(:class:`shortstack.runtime.engine.session.Placement`). On one shared pool the levels only take turns.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

from shortstack.runtime.decode.runs import Run
from shortstack.runtime.decode.step import Stats
from shortstack.runtime.early_exit.catch_up import reserve_round
from shortstack.runtime.engine.decoder import LeveledDecoder


class PipelineCatchUp:
    """See :class:`~shortstack.runtime.early_exit.catch_up.CatchUp`.

    Args:
        stack: The model.
        stats: Counts runs and seconds.
    """

    def __init__(self, stack: LeveledDecoder, stats: Stats) -> None:
        self._stack = stack
        self._stats = stats
        levels = len(stack.heads)
        self._last = levels - 1
        self._filling = stack.filling_levels
        self._past = 0
        # The condition guards all that follows. A level's thread may run on the rows [done, ready) of its level.
        self._changed = threading.Condition()
        self._ready = [0] * levels
        self._done = [0] * levels
        self._wanted: list[tuple[int, int, bool] | None] = [None] * levels  # row, num_rows, with_logits of the head
        self._error: BaseException | None = None
        self._is_closing = False
        self._threads = [
            threading.Thread(target=self._work, args=(level,), name=f"shortstack level {level}", daemon=True)
            for level in range(1, levels)
        ]
        for thread in self._threads:
            thread.start()

    def begin_round(self, past: int) -> None:
        """See :meth:`CatchUp.begin_round`."""
        with self._changed:
            self._raise_error()
            assert self._done[1:] == self._ready[1:], "a round begins only after all levels have caught up"
            reserve_round(self._stack, past)
            self._past = past
            self._ready = [0] * len(self._ready)
            self._done = [0] * len(self._done)

    def run_lowest(self, row: int, with_logits: bool) -> Iterable[Run]:
        """See :meth:`CatchUp.run_lowest`."""
        with self._changed:
            self._raise_error()
        started = time.perf_counter()
        self._stack.run(0, row, row + 1, self._past, 1, with_logits)
        self._stats.draft_s += time.perf_counter() - started
        self._stats.draft_runs += 1
        return ()

    def run_level(self, level: int, row: int, num_rows: int, with_logits: bool) -> Iterable[Run]:
        """See :meth:`CatchUp.run_level`; returns when the level's thread has done it."""
        with self._changed:
            if level >= self._filling:  # pending rows below this one leave no hole here
                if not num_rows:
                    return ()
                self._done[level] = row + 1 - num_rows
            if num_rows:
                self._wanted[level] = (row, num_rows, with_logits)
            self._ready[level] = row + 1
            self._changed.notify_all()
            self._wait_for(level, row + 1)
            self._wanted[level] = None
        return ()

    def mark_pending(self, level: int, row: int) -> None:
        """See :meth:`CatchUp.mark_pending`."""
        with self._changed:
            self._raise_error()
            if level + 1 < self._filling:
                self._ready[level + 1] = max(self._ready[level + 1], row + 1)
                self._changed.notify_all()

    def fill_pending(self, rows: int) -> Iterable[Run]:
        """See :meth:`CatchUp.fill_pending`."""
        for level in range(1, self._filling):
            self.run_level(level, rows - 1, 0, False)
        return ()

    def close(self) -> None:
        """See :meth:`CatchUp.close`; waits for runs that have begun."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _wait_for(self, level: int, rows: int) -> None:
        while self._done[level] < rows:
            self._raise_error()
            self._changed.wait()
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self, level: int) -> None:
        """Run a level on rows as they become ready, until the pipeline is closed or a thread fails."""
        try:
            while (work := self._next_work(level)) is not None:
                start, end, num_rows, with_logits = work
                started = time.perf_counter()
                self._stack.run(level, start, end, self._past, num_rows, with_logits)
                elapsed_s = time.perf_counter() - started
                with self._changed:
                    self._done[level] = end
                    if level + 1 < self._filling:
                        # The caller reads the head's row and decides whether the next level runs on it.
                        passed = end - 1 if num_rows else end
                        self._ready[level + 1] = max(self._ready[level + 1], passed)
                    self._stats.verify_s += elapsed_s
                    self._stats.verify_runs += level == self._last
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next_work(self, level: int) -> tuple[int, int, int, bool] | None:
        """Wait for rows to run on; return ``(start, end, num_rows, with_logits)``, or None at the end."""
        with self._changed:
            while self._ready[level] <= self._done[level]:
                if self._is_closing or self._error is not None:
                    return None
                self._changed.wait()
            if self._is_closing or self._error is not None:
                return None
            start, end = self._done[level], self._ready[level]
            wanted = self._wanted[level]
            if wanted is not None and wanted[0] == end - 1:
                return start, end, wanted[1], wanted[2]
            return start, end, 0, False
