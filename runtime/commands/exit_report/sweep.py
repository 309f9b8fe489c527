"""The same request at other thresholds: which quality one criterion reaches at which speed.

Only a criterion with one threshold can vary: one measure, or one among counts and bounds on depth, with the
same threshold at all exits. It is found and replaced; the rest of the criterion stays. The request's own threshold is
not run again: the report has its figures, and a setting has one speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from shortstack.runtime.commands.agreement import agreement_of
from shortstack.runtime.commands.exit_report.spread import Spread
from shortstack.runtime.decode.stream import Stream
from shortstack.runtime.early_exit.criteria import MEASURES, Bound, Combined, Criterion, Measure
from shortstack.runtime.early_exit.policy import ExitPolicy

Run = Callable[[ExitPolicy], Stream]

_SHARES = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
GRIDS: dict[Measure, tuple[float, ...]] = {  # thresholds to try, ascending
    "top_prob": _SHARES,
    "margin": _SHARES,
    "gate": _SHARES,
    "mean_prob": _SHARES,
    "entropy": (0.02, 0.05, 0.1, 0.3, 0.6, 1.0, 2.0, 4.0),
    "similarity": (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995),
}
_CLOSE = 0.02  # a point of the grid so near to the request's own threshold is left out
_ROUNDS = 3  # over all thresholds, since times vary
_BUDGET_S = 30.0  # another round begins only if it would end within this time


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """What one threshold gave.

    Attributes:
        threshold: The threshold.
        similarity: To plain decoding: 1 - edit distance over token ids / tokens.
        mean_exit_layer: Mean depth of the heads that named the tokens.
        exited_share: Share of tokens that left early.
        tokens_per_s: Decoding speed, a value of each run.
        is_chosen: It is the request's own threshold.
    """

    threshold: float
    similarity: float
    mean_exit_layer: float
    exited_share: float
    tokens_per_s: Spread
    is_chosen: bool


def varied_bound(criterion: Criterion) -> Bound | None:
    """Return the one bound of a criterion that can vary; None unless there is exactly one."""
    bounds = list(_bounds(criterion))
    return bounds[0] if len(bounds) == 1 and not bounds[0].threshold.by_exit else None


def with_threshold(criterion: Criterion, value: float) -> Criterion:
    """Return the criterion with another threshold in its only bound."""
    if isinstance(criterion, Bound):
        return replace(criterion, threshold=replace(criterion.threshold, value=value))
    if isinstance(criterion, Combined):
        return replace(criterion, criteria=tuple(with_threshold(each, value) for each in criterion.criteria))
    return criterion


def grid_of(bound: Bound) -> tuple[float, ...]:
    """Return the thresholds to try, from the fewest early tokens to the most, the bound's own among them."""
    own = bound.threshold.value
    grid = [value for value in GRIDS[bound.measure] if abs(value - own) > _CLOSE * max(1.0, abs(own))]
    is_rising = MEASURES[bound.measure][0] == "<="
    return tuple(sorted([*grid, own], reverse=not is_rising))


def sweep(policy: ExitPolicy, plain: Sequence[int], layers: int, run: Run) -> tuple[SweepPoint, ...]:
    """Run the request at every threshold of the grid but its own, in rounds, so that drift hits all alike.

    Args:
        policy: The request's own.
        plain: What plain decoding gave.
        layers: Layers of the whole model.
        run: Starts the request with a policy.

    Returns:
        A point per threshold, from the fewest early tokens to the most; none where no threshold can vary.
    """
    bound = varied_bound(policy.criterion)
    if bound is None:
        return ()
    started = time.perf_counter()
    values = [value for value in grid_of(bound) if value != bound.threshold.value]
    rounds = [[_measure(policy, value, plain, layers, run) for value in values]]
    while len(rounds) < _ROUNDS and (time.perf_counter() - started) * (1 + 1 / len(rounds)) <= _BUDGET_S:
        rounds.append([_measure(policy, value, plain, layers, run) for value in values])
    return tuple(
        replace(runs[0], tokens_per_s=Spread.of(point.tokens_per_s.median for point in runs))
        for runs in zip(*rounds, strict=True)
    )


def with_own(policy: ExitPolicy, others: Sequence[SweepPoint], own: SweepPoint) -> tuple[SweepPoint, ...]:
    """Return the points of other thresholds with the request's own among them, in the order of the grid."""
    bound = varied_bound(policy.criterion)
    if bound is None or not others:
        return ()
    order = grid_of(bound)
    return tuple(sorted([*others, own], key=lambda point: order.index(point.threshold)))


def _measure(policy: ExitPolicy, value: float, plain: Sequence[int], layers: int, run: Run) -> SweepPoint:
    stream = run(replace(policy, criterion=with_threshold(policy.criterion, value)))
    early = sum(token.exit_layer < layers for token in stream)
    return SweepPoint(
        threshold=value,
        similarity=agreement_of(stream.token_ids, plain).similarity,
        mean_exit_layer=stream.stats.mean_exit_layer,
        exited_share=early / (len(stream.token_ids) or 1),
        tokens_per_s=Spread((stream.stats.tokens_per_s,)),
        is_chosen=False,
    )


def _bounds(criterion: Criterion) -> Iterator[Bound]:
    if isinstance(criterion, Bound):
        yield criterion
    elif isinstance(criterion, Combined):
        for each in criterion.criteria:
            yield from _bounds(each)
