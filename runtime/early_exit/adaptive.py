"""A threshold that is learned while decoding, ``top_prob >= auto``, from where the whole model agreed and where not.

When pending tokens go through the layers above, the whole model names its own token for each of them. So every token
that left early yields a pair for the price of a row of the final head: how sure the exit was, and whether it was right.
The confidences of right and wrong tokens are two Beta distributions, and the threshold is the least of ten points in
0.3..0.9 from which on ::

    p1(x) / (p0(x) + p1(x)) > 0.4            p1: density of right tokens, p0: of wrong ones

After each text both are fitted to its pairs as well: FREE, https://arxiv.org/abs/2310.05424, section 3.4. Where this
differs from FREE's code (``util/bmm.py``): a pair counts for the component that its label names and for no other, where
FREE's step of EM gives the other a sliver; sums are carried on instead of all pairs, the last 4096 or so weighing most,
so that the threshold follows a change of subject; four imagined pairs of each kind, distributed as FREE's starting
values, keep the fit sound while there are few; each exit has a threshold of its own, where FREE has one exit.

As in FREE, tokens that did not leave teach nothing, so the wrong ones are known above the threshold only. Where none of
the ten points will do the threshold is 0.9, at which some tokens still leave, and teach. What is generated depends on
the texts before, and no bound on losses is promised: that is what ``shortstack calibrate`` is for.
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
_EDGE = 1e-4  # confidences of 0 and 1 have no density in most Beta distributions
_MEMORY_PAIRS = 4096.0
_IMAGINED_PAIRS = 4.0
_FIRST_SHAPES = ((1.0, 2.0), (2.0, 1.0))  # alpha, beta of wrong and of right tokens
_NARROWEST, _WIDEST = 1e-5, 0.95  # variance: of itself, and as a share of mean (1 - mean), which no Beta reaches


@dataclass(frozen=True, slots=True)
class Adaptive:
    """A measure against a threshold that is learned while decoding; as a value of its own, against the first one.

    Attributes:
        measure: What is compared.

    Raises:
        RequestError: A measure for which no threshold is learned.
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
        """Return the criterion with a threshold for each of some exits."""
        return Bound(self.measure, Threshold(FIRST_THRESHOLD, tuple(sorted(thresholds))))

    def __str__(self) -> str:
        return f"{self.measure} {MEASURES[self.measure][0]} {AUTO}"


class AdaptiveThreshold:
    """What has been learned so far, by exit; outlives a generation.

    Args:
        criterion: What is compared.
        exit_layers: The exits in use.
    """

    def __init__(self, criterion: Adaptive, exit_layers: Sequence[int]) -> None:
        self._criterion = criterion
        self._mixtures = {layer: BetaMixture() for layer in exit_layers}
        self._pairs: dict[int, list[tuple[float, bool]]] = {layer: [] for layer in exit_layers}

    def begin(self) -> Bound:
        """Learn from the text before, and return the criterion for the next one, within which it does not change."""
        for layer, pairs in self._pairs.items():
            if pairs:
                confidences, agreed = zip(*pairs, strict=True)
                self._mixtures[layer].learn(confidences, agreed)
                pairs.clear()
        return self._criterion.at((layer, mixture.threshold) for layer, mixture in self._mixtures.items())

    def observe(self, reading: Reading, agrees: bool) -> None:
        """Keep what an exit said of a token that left, and whether the whole model named the same."""
        self._pairs[reading.exit_layer].append((getattr(reading, self._criterion.measure), agrees))


class BetaMixture:
    """The confidences of wrong and of right tokens."""

    def __init__(self) -> None:
        # Of each component: pairs, and the sums of confidences and of their squares.
        self._sums: npt.NDArray[np.float64] = np.zeros((2, 3))
        self._imagined = _IMAGINED_PAIRS * np.array([_moments(*shapes) for shapes in _FIRST_SHAPES])

    def learn(self, confidences: Sequence[float], agreed: Sequence[bool]) -> None:
        """Add the pairs of a text."""
        x = np.clip(np.asarray(confidences, np.float64), _EDGE, 1 - _EDGE)
        labels = np.asarray(agreed, bool)
        for component in (0, 1):
            of_it = x[labels == bool(component)]
            self._sums[component] += (len(of_it), of_it.sum(), (of_it**2).sum())
        self._sums *= min(1.0, _MEMORY_PAIRS / float(self._sums[:, 0].sum()))

    @property
    def shapes(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Alpha and beta of wrong and of right tokens, fitted by their moments."""
        wrong, right = (_fitted(*sums.tolist()) for sums in self._sums + self._imagined)
        return wrong, right

    @property
    def threshold(self) -> float:
        """The least point of the grid from which on a token is right rather than wrong; see the module's docstring."""
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
    """Return 1 and the first two moments of a Beta distribution."""
    total = alpha + beta
    return 1.0, alpha / total, alpha * (alpha + 1) / (total * (total + 1))


def _fitted(count: float, total: float, squares: float) -> tuple[float, float]:
    """Return alpha and beta of the Beta distribution with these moments."""
    mean = total / count
    most = mean * (1 - mean)
    variance = min(max(squares / count - mean**2, _NARROWEST), _WIDEST * most)
    strength = most / variance - 1
    return mean * strength, (1 - mean) * strength
