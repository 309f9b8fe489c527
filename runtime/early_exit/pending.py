"""Chooses how many positions may wait for the layers above, from the measured costs of runs over several rows.

A run of the upper layers over M rows takes c(M) times as long as a run over one row. Waiting longer pays as long as the
cost per position, c(M) / M, still falls. Beyond that point it only makes the longest pause longer. The cap is the
smallest M whose cost per position is within 3% of the best. If c is flat (a GPU, or a CPU limited by its memory), the
cap is the window. If c(M) = M, it is two.

A run ends in the final head where a token did not leave, and has no head where the cap was reached. Both are measured,
apart: what a head costs is the mean difference between them, and is not part of c(M).
"""

from __future__ import annotations

import numpy as np

_WEIGHT = 0.2  # weight of a measurement that is above the running cost
_CLOSE_ENOUGH = 1.03
_RECHECK_RUNS = 64  # runs at the cap until the whole window is measured again
_RECHECK_TRIES = 8  # runs with the window open, if none of them fills it


class PendingCap:
    """Learns the cap, and keeps what it has learned from one generation to the next.

    Args:
        window: The most rows that one round may have.
        fixed: A cap that the caller chose; None learns one.
    """

    def __init__(self, window: int, fixed: int | None = None) -> None:
        self._window = window
        self._fixed = None if fixed is None else min(fixed, window)
        self._with_head_s: dict[int, float] = {}
        self._bare_s: dict[int, float] = {}
        self._runs_to_recheck = _RECHECK_RUNS

    @property
    def rows(self) -> int:
        """How many positions may wait, including the newest."""
        if self._fixed is not None:
            return self._fixed
        costs_s = self._costs_s()
        if len(costs_s) < 2 or self._runs_to_recheck <= 0:
            return self._window
        measured = sorted(costs_s)
        rows = np.arange(measured[0], measured[-1] + 1)
        costs = np.interp(rows, measured, [costs_s[m] for m in measured])
        shares = costs / rows
        best = int(rows[int(np.argmax(shares <= shares.min() * _CLOSE_ENOUGH))])
        # If the best is the longest run measured so far, longer ones may be better still.
        return self._window if best == measured[-1] else max(2, best)

    def observe(self, rows: int, elapsed_s: float, *, has_head: bool = True) -> None:
        """Learn the time that a run of the upper layers over ``rows`` rows took, with or without the final head."""
        if self._runs_to_recheck <= 0:
            self._runs_to_recheck -= 1
            if rows == self._window or self._runs_to_recheck <= -_RECHECK_TRIES:
                self._runs_to_recheck = _RECHECK_RUNS
        elif rows == self.rows:
            self._runs_to_recheck -= 1
        costs_s = self._with_head_s if has_head else self._bare_s
        old = costs_s.get(rows)
        costs_s[rows] = elapsed_s if old is None or elapsed_s < old else old + _WEIGHT * (elapsed_s - old)

    def relative_costs(self) -> dict[int, float]:
        """Return c(M) by M, relative to the smallest M that was measured; empty until then."""
        costs_s = self._costs_s()
        if not costs_s:
            return {}
        least = min(costs_s)
        return {rows: cost / costs_s[least] for rows, cost in sorted(costs_s.items())}

    def _costs_s(self) -> dict[int, float]:
        """Return the seconds of runs without their head, by rows."""
        both = self._with_head_s.keys() & self._bare_s.keys()
        head_s = sum(self._with_head_s[rows] - self._bare_s[rows] for rows in both) / len(both) if both else 0.0
        # Not less than half: disturbed measurements may make a head look dearer than a run.
        without = {rows: max(cost - max(head_s, 0.0), cost / 2) for rows, cost in self._with_head_s.items()}
        return without | self._bare_s
