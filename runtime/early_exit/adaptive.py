"""A threshold that is learned while decoding (``top_prob >= auto``) from how often the whole model agreed.

When pending tokens run through the layers above, the whole model predicts its own token for each of them. So every
token that left early yields a pair, for the cost of one row of the final head: how confident the exit was, and whether
it was right. Two Beta distributions model the confidences of right and of wrong tokens. The threshold is the lowest of
ten points in 0.3..0.9 such that there and at all points above ::

    p1(x) / (p0(x) + p1(x)) > 0.4            p1: density of right tokens, p0: of wrong ones

Both are fitted again after each text, with its pairs added: FREE, https://arxiv.org/abs/2310.05424, section 3.4. This
differs from FREE's code (``util/bmm.py``) in four points:

* A pair counts for the component that its label names and for no other. FREE's EM step gives the other a small weight.
* Sums are kept instead of all pairs, and the last 4096 or so weigh most, so the threshold follows a change of subject.
* Four imagined pairs of each kind, distributed as FREE's starting values, keep the fit sound while there are few pairs.
* Each exit has its own threshold. FREE has one exit.

As in FREE, nothing is learned from tokens that did not leave, so wrong tokens are known only above the threshold. If
none of the ten points will do, the threshold is 0.9. Some tokens still leave there, so learning goes on. The output
depends on the texts before, and there is no bound on the loss. ``shortstack calibrate`` gives one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from shortstack.graphs.errors import RequestError
from shortstack.runtime.early_exit.criteria import MEASURES, Bound, Need, Threshold
from shortstack.runtime.early_exit.reading import Reading

AUTO = "auto"
AdaptiveMeasure = Literal["top_prob", "margin"]
GRID: npt.NDArray[np.float64] = np.linspace(0.3, 0.9, 10)
FIRST_THRESHOLD = float(GRID[-1])
_LEAST_SHARE = 0.4
_EDGE = 1e-4  # most Beta distributions have no finite, positive density at 0 and 1
_MEMORY_PAIRS = 4096.0
_IMAGINED_PAIRS = 4.0
_FIRST_SHAPES = ((1.0, 2.0), (2.0, 1.0))  # (alpha, beta) for wrong, then for right tokens
_NARROWEST, _WIDEST = 1e-5, 0.95  # least variance; most, as a share of mean * (1 - mean), which no Beta reaches


@dataclass(frozen=True, slots=True)
class Adaptive:
    """A measure compared with a threshold that is learned while decoding; until then, with the first threshold.

    Attributes:
        measure: The measure.

    Raises:
        RequestError: No threshold is learned for this measure.
    """

    measure: AdaptiveMeasure
    needs = frozenset[Need]()
    least_exits = 1
    exit_layers = frozenset[int]()

    def __post_init__(self) -> None:
        if self.measure not in get_args(AdaptiveMeasure):
            raise RequestError(
                f"no threshold of {self.measure} is learned while decoding",
                expected=" or ".join(f"{name} >= {AUTO}" for name in get_args(AdaptiveMeasure)),
                remedy="give a number",
            )

    def leaves(self, reading: Reading) -> bool:
        """See :class:`~shortstack.runtime.early_exit.criteria.Criterion`."""
        return self.at(()).leaves(reading)

    def at(self, thresholds: Iterable[tuple[int, float]]) -> Bound:
        """Return the criterion with these thresholds, as (exit layer, threshold)."""
        return Bound(self.measure, Threshold(FIRST_THRESHOLD, tuple(sorted(thresholds))))

    def __str__(self) -> str:
        return f"{self.measure} {MEASURES[self.measure][0]} {AUTO}"


class AdaptiveThreshold:
    """Learns a threshold for each exit, and keeps it from one generation to the next.

    Args:
        criterion: The criterion whose threshold is learned.
        exit_layers: The exits in use.
    """

    def __init__(self, criterion: Adaptive, exit_layers: Sequence[int]) -> None:
        self._criterion = criterion
        self._mixtures = {layer: BetaMixture() for layer in exit_layers}
        self._pairs: dict[int, list[tuple[float, bool]]] = {layer: [] for layer in exit_layers}

    def begin(self) -> Bound:
        """Learn from the text before, and return the criterion for the next text. It does not change within a text."""
        for layer, pairs in self._pairs.items():
            if pairs:
                confidences, agreed = zip(*pairs, strict=True)
                self._mixtures[layer].learn(confidences, agreed)
                pairs.clear()
        return self._criterion.at((layer, mixture.threshold) for layer, mixture in self._mixtures.items())

    def observe(self, reading: Reading, agrees: bool) -> None:
        """Record an exit's reading for a token that left, and whether the whole model predicted the same token."""
        self._pairs[reading.exit_layer].append((getattr(reading, self._criterion.measure), agrees))


class BetaMixture:
    """Two Beta distributions, for the confidences of wrong and of right tokens."""

    def __init__(self) -> None:
        # For each component: the number of pairs, the sum of their confidences, the sum of the squares.
        self._sums: npt.NDArray[np.float64] = np.zeros((2, 3))
        self._imagined = _IMAGINED_PAIRS * np.array([_moments(*shapes) for shapes in _FIRST_SHAPES])

    def learn(self, confidences: Sequence[float], agreed: Sequence[bool]) -> None:
        """Add the pairs of one text."""
        x = np.clip(np.asarray(confidences, np.float64), _EDGE, 1 - _EDGE)
        labels = np.asarray(agreed, bool)
        for component in (0, 1):
            members = x[labels == bool(component)]
            self._sums[component] += (len(members), members.sum(), (members**2).sum())
        self._sums *= min(1.0, _MEMORY_PAIRS / float(self._sums[:, 0].sum()))

    @property
    def shapes(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """(alpha, beta) for wrong, then for right tokens, fitted by the method of moments."""
        wrong, right = (_fitted(*sums.tolist()) for sums in self._sums + self._imagined)
        return wrong, right

    @property
    def threshold(self) -> float:
        """The lowest point of the grid from which on tokens count as right; see the module's docstring."""
        if not self._sums[:, 0].any():
            return FIRST_THRESHOLD
        wrong, right = (beta_log_density(GRID, *shapes) for shapes in self.shapes)
        # p1 / (p0 + p1) > share  <=>  log p1 - log p0 > log(share / (1 - share))
        is_right = right - wrong > math.log(_LEAST_SHARE / (1 - _LEAST_SHARE))
        good = np.flatnonzero(np.logical_and.accumulate(is_right[::-1]))
        return float(GRID[len(GRID) - len(good)]) if len(good) else FIRST_THRESHOLD


def beta_log_density(x: npt.NDArray[np.float64], alpha: float, beta: float) -> npt.NDArray[np.float64]:
    """Return log of x^(alpha - 1) (1 - x)^(beta - 1) / B(alpha, beta) for x between 0 and 1."""
    scale = math.lgamma(alpha + beta) - math.lgamma(alpha) - math.lgamma(beta)
    density: npt.NDArray[np.float64] = scale + (alpha - 1) * np.log(x) + (beta - 1) * np.log1p(-x)
    return density


def _moments(alpha: float, beta: float) -> tuple[float, float, float]:
    """Return 1 and the first two raw moments of a Beta distribution."""
    total = alpha + beta
    return 1.0, alpha / total, alpha * (alpha + 1) / (total * (total + 1))


def _fitted(count: float, total: float, squares: float) -> tuple[float, float]:
    """Return alpha and beta of the Beta distribution that has the moments of ``count`` values with these sums."""
    mean = total / count
    most = mean * (1 - mean)
    variance = min(max(squares / count - mean**2, _NARROWEST), _WIDEST * most)
    strength = most / variance - 1
    return mean * strength, (1 - mean) * strength
