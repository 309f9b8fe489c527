"""What a round costs on this machine, by its rows, from what was measured so far.

Two tables: the seconds of a whole round whose drafts cost nothing, and those of judging alone. A plain step is a whole
round of one row. Rows that were not measured lie on the line through their neighbours. Beyond the last measured row the
cost rises as it did up to there; before anything is known, by a share of a plain step a row. No number of rows costs
more than its two halves.
"""

from __future__ import annotations

from bisect import bisect_left

_WEIGHT = 0.2  # of one measurement in a running cost, if it is higher
_ROWS = 16  # of the largest round
_RISE = 0.25  # of a whole round, by a row, as a share of a plain step; c(2) is 1.05 in fp32 to 1.5 in int4
_JUDGING_RISE = 0.1


class RoundCosts:
    """Costs of one cut of a model, kept from one generation to the next.

    Attributes:
        plain_s: Seconds of a plain step; 0 before the first.
        draft_s: Seconds of a draft of the exit or drafter; 0 if that has not been measured.
        first_s: Seconds of the first draft of a round, where that is another time.
    """

    def __init__(self) -> None:
        self.plain_s = 0.0
        self.draft_s = 0.0
        self.first_s: float | None = None
        self._whole: dict[int, float] = {}
        self._judging: dict[int, float] = {}
        self._whole_curve: list[float] = []  # by rows; empty after a measurement
        self._judging_curve: list[float] = []

    def observe_plain(self, elapsed_s: float) -> None:
        """Learn the cost of a plain step."""
        self.plain_s = self._whole[1] = running_cost(self.plain_s or None, elapsed_s)
        self._whole_curve, self._judging_curve = [], []

    def observe_whole(self, rows: int, draft_s: float, verify_s: float) -> None:
        """Learn the costs of a round whose drafts cost nothing: of the rows below the cut, and of judging them."""
        self._whole[rows] = running_cost(self._whole.get(rows), draft_s + verify_s)
        self._whole_curve = []
        self.observe_judging(rows, verify_s)

    def observe_judging(self, rows: int, verify_s: float) -> None:
        """Learn the cost of judging rows."""
        self._judging[rows] = running_cost(self._judging.get(rows), verify_s)
        self._judging_curve = []

    def observe_drafts(self, drafts: int, rows: int, draft_s: float, first_s: float | None) -> None:
        """Learn the cost of a draft.

        Args:
            drafts: Drafted tokens.
            rows: Rows of the round.
            draft_s: Seconds of all drafts, and of the row of the last one.
            first_s: Seconds of the first one, where it costs another time than further ones.
        """
        if first_s is None:
            self.draft_s = running_cost(self.draft_s or None, draft_s / rows)
            return
        self.first_s = running_cost(self.first_s, first_s)
        if drafts > 1:
            self.draft_s = running_cost(self.draft_s or None, (draft_s - first_s) / (drafts - 1))
        elif not self.draft_s:
            self.draft_s = first_s

    @property
    def most_measured(self) -> int:
        """The most rows of a whole round that was measured."""
        return max(self._whole, default=0)

    def whole(self, rows: int) -> float:
        """Return the seconds of a round of so many rows whose drafts cost nothing."""
        if not self._whole_curve:
            self._whole_curve = _curve(self._whole, _RISE * self.plain_s)
        return self._whole_curve[rows]

    def guessed_whole(self, rows: int) -> float:
        """Return what :meth:`whole` would be if only a plain step had been measured."""
        return self.plain_s * (1 + _RISE * (rows - 1))

    def judging(self, rows: int) -> float:
        """Return the seconds of judging so many rows; one number of rows has been measured at least."""
        if not self._judging_curve:
            self._judging_curve = _curve(self._judging, _JUDGING_RISE * self.plain_s)
        return self._judging_curve[rows]


def running_cost(known_s: float | None, measured_s: float) -> float:
    """Return the new running cost. A lower measurement replaces it at once, since disturbances only slow a run down."""
    if known_s is None or measured_s < known_s:
        return measured_s
    return known_s + _WEIGHT * (measured_s - known_s)


def _curve(table: dict[int, float], usual_rise: float) -> list[float]:
    """Return the costs of 0, 1, 2, ... rows from those of some.

    Args:
        table: What was measured, by rows.
        usual_rise: What a row more costs where only one number of rows was measured.
    """
    known = sorted(table)
    first, last = known[0], known[-1]
    rise = (table[last] - table[first]) / (last - first) if first < last else usual_rise
    found = [0.0]
    for rows in range(1, _ROWS + 1):
        if rows in table:
            cost = table[rows]
        elif rows < first:
            cost = max(table[first] - usual_rise * (first - rows), 0.5 * table[first])
        elif rows > last:
            cost = table[last] + max(rise, 0.0) * (rows - last)
        else:
            high = known[bisect_left(known, rows)]
            low = known[bisect_left(known, rows) - 1]
            cost = table[low] + (table[high] - table[low]) * (rows - low) / (high - low)
        if rows > 1:
            cost = min(cost, found[rows // 2] + found[rows - rows // 2])
        found.append(cost)
    return found
