"""The parts of the benchmark about decoding: each runs its processes and returns its section of the table."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from shortstack.samples.bench.artifacts import Artifacts
from shortstack.samples.bench.drafting import compare_strategies, row_costs
from shortstack.samples.bench.engines import Account, compare, take_turns
from shortstack.samples.bench.figures import spread
from shortstack.samples.bench.pipe import bundle_worker
from shortstack.samples.bench.report import Row, Section, at_least, at_most, progress
from shortstack.samples.bench.rivals import Rival, rival_names
from shortstack.samples.bench.settings import Settings, cut, head_name

MIN_SPEED = 1.0
MAX_OVERHEAD_PERCENT = 2.0


def engines_section(
    models: Artifacts,
    exit_layer: int,
    text: Sequence[int],
    threads: int,
    rivals: Sequence[Rival],
    settings: Settings,
) -> Section:
    """Plain decoding through the split bundle against every rival in one run, and the host's share of our steps."""
    title = f"plain decoding, {threads} thread{'s'[: threads > 1]}"
    there = {rival.name for rival in rivals}
    rows = [Row(name, "not compared") for name in rival_names(models) if name not in there]
    with ExitStack() as processes:
        ours = processes.enter_context(bundle_worker(models.bundle(exit_layer), threads))
        theirs = [processes.enter_context(rival.start(threads)) for rival in rivals]
        for length in settings.prompt_lengths:
            where = f"prompt {length}"
            progress(f"{title}, {where}")
            mine, *others = take_turns([ours, *theirs], cut(text, length), settings)
            for rival, other in zip(rivals, others, strict=True):
                rows += _rival_rows(rival.name, mine, other, where)
            step = spread(mine.step_s)
            overhead = spread(mine.overhead).scaled(100)
            rows += [
                Row(f"ms per token, {where}", step.scaled(1e3).show(), step.median),
                at_most(
                    f"host overhead of a step, %, {where}", overhead.median, overhead.show(3), MAX_OVERHEAD_PERCENT
                ),
            ]
    return Section(title, tuple(rows))


def _rival_rows(name: str, mine: Account, other: Account, where: str) -> list[Row]:
    """Return what came out against one rival. Tokens are shown, not judged: engines round differently."""
    result = compare(mine, other)
    return [
        at_least(f"speed over {name}, {where}", result.speed.median, result.speed.show(3), MIN_SPEED),
        Row(f"the same in CPU time, {name}, {where}", result.cpu_speed.show(3), result.cpu_speed.median),
        Row(f"prefill speed over {name}, {where}", result.prefill_speed.show(3), result.prefill_speed.median),
        Row(f"ms per token of {name}, {where}", result.theirs_s.scaled(1e3).show(), result.theirs_s.median),
        Row(f"tokens equal to {name}'s, {where}", f"{result.same_tokens} of {result.tokens}"),
    ]


def drafting_section(
    bundle: Path, vocab: int | None, prompts: Sequence[Sequence[int]], threads: int, settings: Settings
) -> Section:
    """Self-speculative against plain decoding of one bundle."""
    title = f"self-speculation, {head_name(vocab)}, {threads} thread{'s'[: threads > 1]}"
    progress(title)
    with bundle_worker(bundle, threads) as worker:
        costs = row_costs(worker, prompts[0], settings)
        strategies = compare_strategies(worker, prompts, costs, settings)
    curve = ", ".join(f"{rows}: {cost:.2f}" for rows, cost in costs.curve.items() if rows > 1)
    rows = [
        Row("plain step, ms", f"{costs.plain_s * 1e3:.2f}", costs.plain_s * 1e3),
        Row("draft row f, of a plain step", f"{costs.draft:.3f} (without head {costs.lower:.3f})", costs.draft),
        Row("verify one row v(1)", f"{costs.verify[1]:.3f}", costs.verify[1]),
        Row("c(M) = v(M) / v(1)", curve),
    ]
    for s in strategies:
        predicted = "" if s.predicted is None else f", predicted {s.predicted:.2f}"
        alpha = f"alpha (accepted / judged) {s.alpha:.2f}"
        shown = f"{s.speed.show()}{predicted}; {alpha}, {s.tokens_per_round:.2f} tokens/round"
        rows.append(Row(f"speed over plain, {s.name}", shown, s.speed.median))
    is_same = all(s.is_same for s in strategies)
    rows.append(Row("output equal to plain", "", goal="always", is_met=is_same))
    return Section(title, tuple(rows))
