"""How many positions may wait for the layers above, from what runs over several rows were measured to cost.

A run of the upper layers over M rows takes c(M) times one over a single row. Waiting longer pays as long as c(M) / M,
the share of a position, still falls; beyond that it only makes the longest pause longer. The cap is the smallest M
whose share is within 3% of the best. Where c is flat (a GPU, or a CPU bound by its memory) that is the window; where
c(M) = M, two.
"""

from __future__ import annotations

import numpy as np

_WEIGHT = 0.2  # of one measurement in a running cost, if it is higher
_CLOSE_ENOUGH = 1.03
_RECHECK_RUNS = 64  # capped runs until the whole window is measured again


class PendingCap:
    """What has been learned so far; outlives a generation.

    Args:
        window: Rows of one round at most.
        fixed: A cap that the caller chose; None learns one.
    """

    def __init__(self, window: int, fixed: int | None = None) -> None:
        self._window = window
        self._fixed = None if fixed is None else min(fixed, window)
        self._cost_s: dict[int, float] = {}
        self._runs_to_recheck = _RECHECK_RUNS

    @property
    def rows(self) -> int:
        """Positions that may wait, the newest included."""
        if self._fixed is not None:
            return self._fixed
        if len(self._cost_s) < 2 or self._runs_to_recheck <= 0:
            return self._window
        measured = sorted(self._cost_s)
        rows = np.arange(measured[0], measured[-1] + 1)
        costs = np.interp(rows, measured, [self._cost_s[m] for m in measured])
        shares = costs / rows
        best = int(rows[int(np.argmax(shares <= shares.min() * _CLOSE_ENOUGH))])
        # A best at the end of what was measured says that longer ones may be better still.
        return self._window if best == measured[-1] else max(2, best)

    def observe(self, rows: int, elapsed_s: float) -> None:
        """Learn what a run of the upper layers over so many rows took."""
        if self._runs_to_recheck <= 0 and rows == self._window:
            self._runs_to_recheck = _RECHECK_RUNS
        elif rows == self.rows:
            self._runs_to_recheck -= 1
        old = self._cost_s.get(rows)
        self._cost_s[rows] = elapsed_s if old is None or elapsed_s < old else old + _WEIGHT * (elapsed_s - old)

    def relative_costs(self) -> dict[int, float]:
        """Return c(M) by M, relative to the cheapest measured row count; empty until something was measured."""
        if not self._cost_s:
            return {}
        least = min(self._cost_s)
        return {rows: cost / self._cost_s[least] for rows, cost in sorted(self._cost_s.items())}
