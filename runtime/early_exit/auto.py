"""Runs each round by flush or by pipeline, whichever takes less time per row; tries the other again now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Literal, get_args

from shortstack.runtime.decode.remeasure import Remeasure
from shortstack.runtime.decode.runs import Run
from shortstack.runtime.early_exit.catch_up import CatchUp

Way = Literal["flush", "pipeline"]
_WEIGHT = 0.2  # weight of one round in the running mean


class WayCosts:
    """Measured seconds per row of each way, kept from one generation to the next."""

    def __init__(self) -> None:
        self._row_s: dict[Way, float] = {}
        self._remeasure = Remeasure()

    @property
    def best(self) -> Way:
        """The faster way so far."""
        return min(self._row_s, key=lambda way: self._row_s[way], default="flush")

    def choose(self) -> Way:
        """Return the way for the next round."""
        for way in get_args(Way):
            if way not in self._row_s:
                return way  # type: ignore[no-any-return]
        if not self._remeasure.is_due():
            return self.best
        return "pipeline" if self.best == "flush" else "flush"

    def observe(self, way: Way, rows: int, elapsed_s: float) -> None:
        """Learn the time that a round of ``rows`` rows took."""
        row_s = elapsed_s / rows
        old = self._row_s.get(way)
        self._row_s[way] = row_s if old is None else old + _WEIGHT * (row_s - old)


class AutoCatchUp:
    """See :class:`~shortstack.runtime.early_exit.catch_up.CatchUp`. Rounds of one row tell nothing and do not count.

    Args:
        ways: Functions that create each way; each is called at the first round of its way.
        costs: Measured costs so far.
    """

    def __init__(self, ways: dict[Way, Callable[[], CatchUp]], costs: WayCosts) -> None:
        self._make = ways
        self._costs = costs
        self._made: dict[Way, CatchUp] = {}
        self._way: Way = "flush"
        self._rows = 0
        self._elapsed_s = 0.0

    def begin_round(self, past: int) -> None:
        """See :meth:`CatchUp.begin_round`."""
        if self._rows > 1:
            self._costs.observe(self._way, self._rows, self._elapsed_s)
        self._way = self._costs.choose()
        if self._way not in self._made:
            self._made[self._way] = self._make[self._way]()
        self._rows, self._elapsed_s = 0, 0.0
        self._made[self._way].begin_round(past)

    def run_lowest(self, row: int, with_logits: bool) -> Iterable[Run]:
        """See :meth:`CatchUp.run_lowest`."""
        started = time.perf_counter()
        yield from self._made[self._way].run_lowest(row, with_logits)
        self._rows = row + 1
        self._elapsed_s += time.perf_counter() - started

    def run_level(self, level: int, row: int, num_rows: int, with_logits: bool) -> Iterable[Run]:
        """See :meth:`CatchUp.run_level`."""
        started = time.perf_counter()
        yield from self._made[self._way].run_level(level, row, num_rows, with_logits)
        self._elapsed_s += time.perf_counter() - started

    def mark_pending(self, level: int, row: int) -> None:
        """See :meth:`CatchUp.mark_pending`."""
        self._made[self._way].mark_pending(level, row)

    def fill_pending(self, rows: int) -> Iterable[Run]:
        """See :meth:`CatchUp.fill_pending`."""
        started = time.perf_counter()
        yield from self._made[self._way].fill_pending(rows)
        self._elapsed_s += time.perf_counter() - started

    def close(self) -> None:
        """See :meth:`CatchUp.close`."""
        for catch_up in self._made.values():
            catch_up.close()
