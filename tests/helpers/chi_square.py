"""Pearson's chi-square test and its power, without scipy (which no test environment of this project has)."""

from __future__ import annotations

import math
from collections.abc import Sequence


def survival(statistic: float, df: float) -> float:
    """P(X >= statistic) for a chi-square variable: the regularised upper incomplete gamma Q(df / 2, statistic / 2)."""
    a, x = df / 2, statistic / 2
    if x <= 0:
        return 1.0
    scale = math.exp(a * math.log(x) - x - math.lgamma(a))
    if x < a + 1:  # series of the lower part (Abramowitz & Stegun 6.5.29)
        term = total = 1 / a
        n = a
        while term > total * 1e-15:
            n += 1
            term *= x / n
            total += term
        return 1.0 - total * scale
    # continued fraction of the upper part (6.5.31), by Lentz's method
    b = x + 1 - a
    c, d = 1e300, 1 / b
    fraction = d
    for i in range(1, 10_000):
        numerator = -i * (i - a)
        b += 2
        d = 1 / (numerator * d + b)
        c = b + numerator / c
        fraction *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return scale * fraction


def critical_value(df: float, alpha: float) -> float:
    """The statistic that a true hypothesis reaches with probability ``alpha``."""
    low, high = 0.0, df + 100 * math.sqrt(2 * df) + 100
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if survival(middle, df) > alpha else (low, middle)
    return high


def power(samples: int, effect: float, df: int, alpha: float) -> float:
    """Probability to reject when the truth is off by ``effect``.

    Cohen's effect size w = sqrt(sum (p1 - p0)^2 / p0). The statistic is then noncentral chi-square with noncentrality
    samples * w^2, a Poisson mixture of central ones with df + 2 j degrees of freedom.
    """
    half = samples * effect**2 / 2
    bound = critical_value(df, alpha)
    spread = 12 * math.sqrt(half) + 12
    terms = range(max(0, int(half - spread)), int(half + spread) + 1)
    return sum(math.exp(j * math.log(half) - half - math.lgamma(j + 1)) * survival(bound, df + 2 * j) for j in terms)


def samples_for(wanted_power: float, effect: float, df: int, alpha: float) -> int:
    """The smallest sample size with this power, up to one per cent."""
    low, high = 1, 10_000_000
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, effect, df, alpha) >= wanted_power else (middle, high)
    return high


def p_value(observed: Sequence[int], probabilities: Sequence[float]) -> float:
    """Pearson's test of counts against a distribution; cells expected below 5 are merged into one.

    A count in a cell of probability zero is impossible under the hypothesis and gives 0.
    """
    total = sum(observed)
    if any(count and not probability for count, probability in zip(observed, probabilities, strict=True)):
        return 0.0
    cells = sorted((p * total, count) for count, p in zip(observed, probabilities, strict=True) if p)
    merged: list[tuple[float, int]] = []
    rest_expected, rest_count = 0.0, 0
    for expected, count in cells:  # ascending, so the small ones come first
        if expected < 5 or 0 < rest_expected < 5:
            rest_expected, rest_count = rest_expected + expected, rest_count + count
        else:
            merged.append((expected, count))
    if rest_expected:
        merged.append((rest_expected, rest_count))
    statistic = sum((count - expected) ** 2 / expected for expected, count in merged)
    return survival(statistic, len(merged) - 1)
