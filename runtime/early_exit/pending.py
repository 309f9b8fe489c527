"""Chooses how many positions may wait for the layers above, from the measured costs of runs over several rows.

A run of the upper layers over M rows takes c(M) times as long as a run over one row. Waiting longer pays as long as the
cost per position, c(M) / M, still falls. Beyond that point it only makes the longest pause longer. The cap is the
smallest M whose cost per position is within 3% of the best. If c is flat (a GPU, or a CPU limited by its memory), the
cap is the window. If c(M) = M, it is two.
"""

from __future__ import annotations

import numpy as np

_WEIGHT = 0.2  # weight of a measurement that is above the running cost
_CLOSE_ENOUGH = 1.03
_RECHECK_RUNS = 64  # runs at the cap until the whole window is measured again


class PendingCap:
    """Learns the cap, and keeps what it has learned from one generation to the next.

    Args:
        window: The most rows that one round may have.
        fixed: A cap that the caller chose; None learns one.
    """

    def __init__(self, window: int, fixed: int | None = None) -> None:
        self._window = window
        self._fixed = None if fixed is None else min(fixed, window)
        self._cost_s: dict[int, float] = {}
        self._runs_to_recheck = _RECHECK_RUNS

    @property
    def rows(self) -> int:
        """How many positions may wait, including the newest."""
        if self._fixed is not None:
            return self._fixed
        if len(self._cost_s) < 2 or self._runs_to_recheck <= 0:
            return self._window
        measured = sorted(self._cost_s)
        rows = np.arange(measured[0], measured[-1] + 1)
        costs = np.interp(rows, measured, [self._cost_s[m] for m in measured])
        shares = costs / rows
        best = int(rows[int(np.argmax(shares <= shares.min() * _CLOSE_ENOUGH))])
        # If the best is the longest run measured so far, longer ones may be better still.
        return self._window if best == measured[-1] else max(2, best)

    def observe(self, rows: int, elapsed_s: float) -> None:
        """Learn the time that a run of the upper layers over ``rows`` rows took."""
        if self._runs_to_recheck <= 0 and rows == self._window:
            self._runs_to_recheck = _RECHECK_RUNS
        elif rows == self.rows:
            self._runs_to_recheck -= 1
        old = self._cost_s.get(rows)
        self._cost_s[rows] = elapsed_s if old is None or elapsed_s < old else old + _WEIGHT * (elapsed_s - old)

    def relative_costs(self) -> dict[int, float]:
        """Return c(M) by M, relative to the smallest M that was measured; empty until then."""
        if not self._cost_s:
            return {}
        least = min(self._cost_s)
        return {rows: cost / self._cost_s[least] for rows, cost in sorted(self._cost_s.items())}
