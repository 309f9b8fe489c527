"""Learn-then-Test: finds the boldest threshold whose mean loss is at most delta, and errs with probability <= epsilon.

For each threshold of a grid, the hypothesis "the mean loss over all prompts that may come is above delta" is tested on
n prompts. A threshold is accepted if the p-value is at most epsilon. The grid is tested in order, the most conservative
threshold first, and testing ends at the first that is not accepted. So each test may use all of epsilon, and the
probability of accepting any wrong threshold is at most epsilon, whatever the grid (fixed-sequence testing).

===================  ===================================================================================  =============
test                 p-value for a mean loss m over n prompts                                             losses
===================  ===================================================================================  =============
hoeffding            exp(-2 n max(0, delta - m)^2)                                                        0..1
hoeffding-bentkus    min(exp(-n h(min(m, delta), delta)), e P(Bin(n, delta) <= ceil(n m))) with           0..1
                     h(a, b) = a ln(a / b) + (1 - a) ln((1 - a) / (1 - b)); never above Hoeffding's
binomial             P(Bin(n, delta) <= n m): exact                                                       0 or 1
===================  ===================================================================================  =============

Sources: Learn then Test, https://arxiv.org/abs/2110.01052, sections 2 and 3; its use for early exit is CALM's,
https://arxiv.org/abs/2207.07061, section 4; the second test is from https://arxiv.org/abs/2101.02703, section 3.1.
The guarantee holds only for prompts from the population that the n prompts were drawn from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

from shortstack.graphs.errors import RequestError

Test = Literal["hoeffding", "hoeffding-bentkus", "binomial"]
TESTS: tuple[Test, ...] = ("hoeffding", "hoeffding-bentkus", "binomial")
_ROUNDING = 1e-9  # rounding error that a sum of losses may have


def p_value(test: Test, losses: Sequence[float], delta: float) -> float:
    """Return the p-value of "the mean loss is above delta".

    Args:
        test: See the table above.
        losses: One per prompt, at least one, each 0..1; 0 or 1 for the binomial test.
        delta: The bound on their mean, between 0 and 1.

    Raises:
        RequestError: The losses are not valid for this test.
    """
    count = len(losses)
    if not count or not all(0.0 <= loss <= 1.0 for loss in losses):
        raise RequestError("losses to test", found=f"{count} of them", expected="at least one, each 0..1")
    total = math.fsum(losses)
    if test == "binomial":
        if any(loss not in (0.0, 1.0) for loss in losses):
            raise RequestError("the binomial test is for losses of 0 or 1", remedy="use hoeffding")
        return binomial(round(total), count, delta)
    return hoeffding(total / count, count, delta) if test == "hoeffding" else hoeffding_bentkus(total, count, delta)


def hoeffding(mean: float, count: int, delta: float) -> float:
    """Return Hoeffding's p-value for the mean of ``count`` losses, each 0..1."""
    return math.exp(-2 * count * max(0.0, delta - mean) ** 2)


def hoeffding_bentkus(total: float, count: int, delta: float) -> float:
    """Return the smaller of Hoeffding's (in its tighter form) and Bentkus' p-values for a sum of losses, each 0..1."""
    mean = min(total / count, delta)
    divergence = _weighted_log(mean, delta) + _weighted_log(1 - mean, 1 - delta)
    bentkus = math.e * binomial(math.ceil(total - _ROUNDING), count, delta)
    return min(math.exp(-count * divergence), bentkus)


def binomial(failures: int, count: int, delta: float) -> float:
    """Return P(Bin(count, delta) <= failures)."""
    if failures >= count:
        return 1.0
    logs = (
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        + k * math.log(delta) + (count - k) * math.log1p(-delta)
        for k in range(failures + 1)
    )  # fmt: skip
    return min(1.0, math.fsum(map(math.exp, logs)))


def fixed_sequence(p_values: Iterable[float], epsilon: float) -> int:
    """Return how many thresholds are accepted: those before the first p-value above ``epsilon``.

    Args:
        p_values: One per threshold, the most conservative first. May be computed lazily: none after the first above
            ``epsilon`` is read.
        epsilon: The probability with which a wrong threshold may be accepted.
    """
    accepted = 0
    for value in p_values:
        if value > epsilon:
            break
        accepted += 1
    return accepted


def fewest_prompts(test: Test, delta: float, epsilon: float) -> int:
    """Return the fewest prompts with which a threshold is accepted whose losses are all 0.

    Hoeffding: ln(1 / epsilon) / (2 delta^2); the others: ln(epsilon) / ln(1 - delta).
    """
    log = math.log(epsilon)
    count = -log / (2 * delta**2) if test == "hoeffding" else log / math.log1p(-delta)
    return max(1, math.ceil(count - _ROUNDING))


def _weighted_log(a: float, b: float) -> float:
    return a * math.log(a / b) if a > 0 else 0.0
