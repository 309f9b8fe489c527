"""Medians, quartiles, ratios of pairs, and the speed-up that measured costs predict. Pure arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """A median and the quartiles around it.

    Attributes:
        median: Half of the values are below it.
        low: A quarter is below it.
        high: A quarter is above it.
        count: How many values.
    """

    median: float
    low: float
    high: float
    count: int

    def scaled(self, factor: float) -> Spread:
        """Return it in another unit."""
        return Spread(self.median * factor, self.low * factor, self.high * factor, self.count)

    def show(self, digits: int = 2) -> str:
        """Return ``median [low, high]``."""
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def spread(values: Sequence[float]) -> Spread:
    """Return the median and quartiles of at least one value.

    Raises:
        ValueError: There is no value.
    """
    if not values:
        raise ValueError("no value to take the median of")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high, len(values))


def ratios(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Return the spread of ``above[i] / below[i]``: pairs that ran next to each other, so that slow spells cancel."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def expected_tokens(alpha: float, rows: int) -> float:
    """Return how many tokens a round of ``rows`` judged rows emits on average: (1 - alpha^rows) / (1 - alpha)."""
    return sum(alpha**i for i in range(rows))


def predicted_speed_up(
    alpha: float, drafts: int, draft: float, verify: Mapping[int, float], bonus_row: float | None = None
) -> float:
    """Return the speed of rounds over plain decoding; costs are in units of a plain step.

    Without bonus, S = (1 - alpha^k) / ((1 - alpha) (k f + v(k))): k rows are drafted and judged. With bonus, one row
    more, S = (1 - alpha^(k+1)) / ((1 - alpha) (k f + b + v(k+1))), b being the lower segments without their exit
    (Leviathan et al., arXiv 2211.17192, theorem 3.8, with measured costs).

    Args:
        alpha: Probability that one drafted token is accepted.
        drafts: k, drafted tokens per round.
        draft: f, one draft row.
        verify: v, judging so many rows.
        bonus_row: b; None for the form without bonus.
    """
    rows = drafts if bonus_row is None else drafts + 1
    cost = drafts * draft + (bonus_row or 0.0) + verify[rows]
    return expected_tokens(alpha, rows) / cost
