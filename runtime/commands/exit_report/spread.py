"""A figure that varies from run to run: its median, and the least and the most that was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Spread:
    """What the runs gave.

    Attributes:
        values: One of each run, in their order; at least one.
    """

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Gather values."""
        return cls(tuple(values))

    @property
    def median(self) -> float:
        """The middle one."""
        return median(self.values)

    @property
    def low(self) -> float:
        """The least."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The most."""
        return max(self.values)

    def over(self, other: float) -> Spread:
        """Return it in units of another figure; 0 where that is 0."""
        return Spread(tuple(value / other if other else 0.0 for value in self.values))

    def words(self, number: Callable[[float], str]) -> str:
        """Return the median, with the range behind it where there is more than one run: ``27.2 (26.0 to 28.1)``."""
        between = self.range_words(number)
        return number(self.median) + (f" ({between})" if between else "")

    def range_words(self, number: Callable[[float], str]) -> str:
        """Return the range, ``26.0 to 28.1``; nothing where there is one run only."""
        return f"{number(self.low)} to {number(self.high)}" if len(self.values) > 1 else ""


def speed_words(tokens_per_s: float) -> str:
    """Return a speed with three digits or more: ``27.2``, ``254``."""
    return f"{tokens_per_s:.1f}" if tokens_per_s < 99.95 else f"{tokens_per_s:.0f}"
