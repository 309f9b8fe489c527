"""Self-speculative against plain decoding of one bundle: costs of a row, predicted and measured speed-up."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shortstack.runtime.decode.speed_up import predicted_speed_up
from shortstack.samples.bench.figures import Spread, ratios
from shortstack.samples.bench.pipe import WorkerProcess
from shortstack.samples.bench.settings import Settings

ADAPTIVE_MOST = 4


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs of a row, medians, in units of a plain step of the same round.

    Attributes:
        plain_s: Seconds of a plain step.
        draft: f: the lower segments and the exit head, one row.
        lower: The lower segments without the head, one row.
        verify: v(M): the upper segments and the final head, M rows.
    """

    plain_s: float
    draft: float
    lower: float
    verify: dict[int, float]

    @property
    def curve(self) -> dict[int, float]:
        """c(M) = v(M) / v(1)."""
        return {rows: cost / self.verify[1] for rows, cost in self.verify.items()}


@dataclass(frozen=True, slots=True)
class Strategy:
    """One way to draft, against plain decoding.

    Attributes:
        name: ``k = 3`` or ``adaptive``.
        speed: Plain time over its time, prompt by prompt.
        alpha: Probability that a judged draft is accepted, over all prompts.
        tokens_per_round: Median over the prompts.
        predicted: What the costs and alpha predict; None for an adaptive length.
        is_same: Whether every token equalled plain decoding's.
    """

    name: str
    speed: Spread
    alpha: float
    tokens_per_round: float
    predicted: float | None
    is_same: bool


def row_costs(worker: WorkerProcess, prompt: Sequence[int], settings: Settings) -> Costs:
    """Measure what rows cost at the context that ``prompt`` makes."""
    rows = sorted({1, *settings.verify_rows, *settings.draft_lengths})
    answer = worker.ask("costs", prompt=list(prompt), rows=rows, repeats=settings.cost_repeats)
    return relative_costs(answer["plain"], answer["draft"], answer["lower"], answer["verify"])


def relative_costs(
    plain: Sequence[float], draft: Sequence[float], lower: Sequence[float], verify: Mapping[str, Sequence[float]]
) -> Costs:
    """Return medians of ratios within each round of measurements, so that slow spells cancel."""
    return Costs(
        plain_s=statistics.median(plain),
        draft=ratios(draft, plain).median,
        lower=ratios(lower, plain).median,
        verify={int(rows): ratios(seconds, plain).median for rows, seconds in verify.items()},
    )


def compare_strategies(
    worker: WorkerProcess, prompts: Sequence[Sequence[int]], costs: Costs, settings: Settings
) -> list[Strategy]:
    """Decode each prompt plainly and with every way to draft, one after the other."""
    policies = {f"k = {k}": (k, False) for k in settings.draft_lengths} | {"adaptive": (ADAPTIVE_MOST, True)}
    plain_s: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in policies}
    same = dict.fromkeys(policies, True)
    stats: dict[str, list[dict[str, float]]] = {name: [] for name in policies}
    tokens = settings.draft_prompt_tokens
    for number, prompt in enumerate([prompts[0], *prompts]):  # the first one twice: its first time is a warm-up
        reference = worker.ask("decode", prompt=list(prompt), tokens=tokens)
        if number:
            plain_s.append(reference["decode_s"])
        for name, (draft, is_adaptive) in policies.items():
            answer = worker.ask("decode", prompt=list(prompt), tokens=tokens, draft=draft, is_adaptive=is_adaptive)
            same[name] &= answer["tokens"] == reference["tokens"]
            if number:
                seconds[name].append(answer["decode_s"])
                stats[name].append(answer["stats"])
    strategies = []
    for name, (draft, is_adaptive) in policies.items():
        alpha = statistics.fmean(s["alpha"] for s in stats[name])
        strategies.append(
            Strategy(
                name=name,
                speed=ratios(plain_s, seconds[name]),
                alpha=alpha,
                tokens_per_round=statistics.median(s["tokens_per_round"] for s in stats[name]),
                predicted=None if is_adaptive else predicted_speed_up(alpha, draft, costs.draft, costs.verify[draft]),
                is_same=same[name],
            )
        )
    return strategies
