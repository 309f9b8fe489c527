"""Medians, quartiles and ratios of pairs. Pure arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
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
