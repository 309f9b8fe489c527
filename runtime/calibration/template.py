"""An exit criterion with a gap for the threshold, and the thresholds to try in the gap, most conservative first.

``top_prob >= {}`` is tried from 1 downward, ``entropy <= {}`` from 0 upward. ``margin >= {} and patience >= 2`` works
too. A criterion may have several gaps if all have the same comparison; all of them get the same threshold. A stricter
threshold lets fewer tokens leave, so the order is from the fewest early tokens to the most.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from shortstack.graphs.errors import RequestError
from shortstack.runtime.early_exit.criteria import Criterion
from shortstack.runtime.early_exit.expression import parse_criterion

GAP = "{}"
DEFAULT_TEMPLATE = "top_prob >= {}"
_GAP = re.compile(r"(?:\b([a-z_]+)\s*(>=|<=)\s*)?\{\}")
_COUNTS = frozenset({"patience", "votes"})
_SHARES = (1.0, 0.99, 0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
_NATS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)


@dataclass(frozen=True, slots=True)
class Template:
    """A criterion with a gap.

    Attributes:
        text: The expression, with ``{}`` in place of the threshold.

    Raises:
        RequestError: There is no gap, or a gap is not a threshold, or the expression is not valid.
    """

    text: str

    def __post_init__(self) -> None:
        comparisons = {comparison for _, comparison in self._gaps()}
        if len(comparisons) != 1 or "" in comparisons:
            raise RequestError(
                f"exit criterion {self.text!r} to calibrate",
                found="no {}"
                if not comparisons
                else "{} after " + " and ".join(sorted(c or "nothing" for c in comparisons)),
                expected="{} in place of the threshold, after >= or after <=",
                remedy=f"such as {DEFAULT_TEMPLATE!r}",
            )
        self.at(1)  # raises if anything else is wrong with the expression

    @property
    def is_falling(self) -> bool:
        """Whether lower thresholds let more tokens leave."""
        return self._gaps()[0][1] == ">="

    def at(self, threshold: float) -> Criterion:
        """Return the criterion with a threshold in its gap.

        Raises:
            RequestError: The expression is not valid, or the threshold is out of range.
        """
        text = str(int(threshold)) if float(threshold).is_integer() else repr(float(threshold))
        return parse_criterion(self.text.replace(GAP, text))

    def default_grid(self, exits: int) -> tuple[float, ...]:
        """Return the thresholds to try with ``exits`` exits in use, most conservative first."""
        if not self.is_falling:
            return _NATS
        if any(measure in _COUNTS for measure, _ in self._gaps()):
            return tuple(float(count) for count in range(exits, 0, -1))
        return _SHARES

    def ordered(self, grid: Iterable[float]) -> tuple[float, ...]:
        """Return thresholds without repetitions, most conservative first.

        Raises:
            RequestError: There are none, or the criterion does not accept one of them.
        """
        values = sorted(set(grid), reverse=self.is_falling)
        if not values or not all(map(math.isfinite, values)):
            raise RequestError("grid of thresholds", found=values, expected="at least one number")
        for value in values:
            self.at(value)
        return tuple(values)

    def _gaps(self) -> list[tuple[str, str]]:
        """Return the measure and the comparison before each gap."""
        return _GAP.findall(self.text)
