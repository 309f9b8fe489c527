"""The parts of the benchmark: each runs its processes and returns its section of the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from shortstack.graphs.errors import DependencyError
from shortstack.runtime.session import usable_cores
from shortstack.samples.bench.artifacts import Artifacts, check_genai, folder_bytes
from shortstack.samples.bench.drafting import compare_strategies, row_costs
from shortstack.samples.bench.engines import compare, take_turns
from shortstack.samples.bench.figures import spread
from shortstack.samples.bench.pipe import WorkerProcess, bundle_worker, genai_worker
from shortstack.samples.bench.report import Row, Section, at_least, at_most
from shortstack.samples.bench.settings import Settings

MIN_SPEED = 1.0
MAX_OVERHEAD_PERCENT = 2.0
MAX_DISK = 1.02
MAX_PEAK = 1.1


@dataclass(frozen=True, slots=True)
class Rival:
    """onnxruntime-genai: its version, an interpreter that has it, and its model of the same checkpoint."""

    version: str
    python: str
    folder: Path

    def start(self, threads: int) -> WorkerProcess:
        """Start a worker."""
        return genai_worker(self.python, self.folder, threads)


def find_rival(models: Artifacts, genai_python: str) -> Rival | None:
    """Return onnxruntime-genai, its model built if need be; None, and how to get it on stderr, where it is absent."""
    try:
        version = check_genai(genai_python)
    except DependencyError as error:
        click.echo(f"onnxruntime-genai is left out: {error}", err=True)
        return None
    return Rival(version, genai_python, models.genai(genai_python))


def engines_section(
    models: Artifacts, exit_layer: int, text: Sequence[int], threads: int, rival: Rival | None, settings: Settings
) -> Section:
    """Plain decoding through the split bundle against onnxruntime-genai, and the host's share of our steps."""
    title = f"plain decoding, {threads} thread{'s'[: threads > 1]}"
    bundle = models.bundle(exit_layer)
    rows = [] if rival else [Row("onnxruntime-genai", "not compared")]
    with bundle_worker(bundle, threads) as ours:
        for length in settings.prompt_lengths:
            where = f"prompt {length}"
            _progress(f"{title}, {where}")
            prompt = _cut(text, length)
            if rival is None:
                (mine,) = take_turns([ours], prompt, settings)
            else:
                with rival.start(threads) as theirs:
                    mine, other = take_turns([ours, theirs], prompt, settings)
                result = compare(mine, other)
                rows += [
                    at_least(
                        f"speed over onnxruntime-genai, {where}", result.speed.median, result.speed.show(3), MIN_SPEED
                    ),
                    Row(f"the same in CPU time, {where}", result.cpu_speed.show(3), result.cpu_speed.median),
                    Row(f"prefill speed over it, {where}", result.prefill_speed.show(3), result.prefill_speed.median),
                    Row(f"its ms per token, {where}", result.theirs_s.scaled(1e3).show(), result.theirs_s.median),
                    Row(f"equal tokens, {where}", f"{result.same_tokens} of {result.tokens}"),
                ]
            step = spread(mine.step_s)
            overhead = spread(mine.overhead).scaled(100)
            rows += [
                Row(f"ms per token, {where}", step.scaled(1e3).show(), step.median),
                at_most(
                    f"host overhead of a step, %, {where}", overhead.median, overhead.show(3), MAX_OVERHEAD_PERCENT
                ),
            ]
    return Section(title, tuple(rows))


def disk_section(models: Artifacts, exit_layer: int, settings: Settings) -> Section:
    """Bundles against one uncut graph with the same checkpoint, on disk."""
    whole = folder_bytes(models.bundle(None))
    rows = [Row("uncut, MB", f"{whole / 1e6:.1f}", whole / 1e6)]
    for vocab in settings.draft_vocabs:
        size = folder_bytes(models.bundle(exit_layer, vocab))
        rows.append(at_most(f"{_head(vocab)} / uncut", size / whole, f"{size / whole:.4f}", MAX_DISK))
    return Section("bundle on disk", tuple(rows))


def memory_section(
    models: Artifacts, exit_layer: int, text: Sequence[int], rival: Rival | None, settings: Settings
) -> Section:
    """Peak and resting memory of fresh processes: split against uncut."""
    prompt = _cut(text, settings.memory_prompt)

    def measure(bundle: Path, draft: int | None) -> tuple[int, int, int]:
        _progress(f"memory of {bundle.name}")
        with bundle_worker(bundle, None) as worker:
            loaded = worker.ask("memory")
            worker.ask("decode", prompt=prompt, tokens=settings.memory_tokens, draft=draft)
            after = worker.ask("memory")
        return after["peak_bytes"], loaded["rss_bytes"], after["pss_bytes"]

    def measure_rival(worker: WorkerProcess) -> tuple[int, int, int]:
        loaded = worker.ask("memory")
        worker.ask("start", prompt=prompt, tokens=settings.memory_tokens)
        worker.ask("block", count=settings.memory_tokens - 1)
        after = worker.ask("memory")
        return after["peak_bytes"], loaded["rss_bytes"], after["pss_bytes"]

    def show(peak: int, loaded: int, pss: int) -> str:
        return f"{peak / 1e6:.0f} (loaded {loaded / 1e6:.0f}, decoded PSS {pss / 1e6:.0f})"

    whole = measure(models.bundle(None), None)
    rows = [Row("uncut, plain, peak MB", show(*whole), whole[0] / 1e6)]
    for vocab in settings.draft_vocabs:
        for name, draft in (("plain", None), ("self-speculative", 4)):
            peak, *rest = measure(models.bundle(exit_layer, vocab), draft)
            rows += [
                Row(f"{_head(vocab)}, {name}, peak MB", show(peak, *rest), peak / 1e6),
                at_most(f"{_head(vocab)}, {name}, peak / uncut", peak / whole[0], f"{peak / whole[0]:.3f}", MAX_PEAK),
            ]
    if rival:
        with rival.start(usable_cores()) as worker:
            found = measure_rival(worker)
        rows.append(Row("onnxruntime-genai, peak MB", show(*found), found[0] / 1e6))
    return Section("memory", tuple(rows))


def drafting_section(
    bundle: Path, vocab: int | None, prompts: Sequence[Sequence[int]], threads: int, settings: Settings
) -> Section:
    """Self-speculative against plain decoding of one bundle."""
    title = f"self-speculation, {_head(vocab)}, {threads} thread{'s'[: threads > 1]}"
    _progress(title)
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
        shown = f"{s.speed.show()}{predicted}; alpha {s.alpha:.2f}, {s.tokens_per_round:.2f} tokens/round"
        rows.append(Row(f"speed over plain, {s.name}", shown, s.speed.median))
    is_same = all(s.is_same for s in strategies)
    rows.append(Row("output equal to plain", "", goal="always", is_met=is_same))
    return Section(title, tuple(rows))


def _head(vocab: int | None) -> str:
    return "full exit head" if vocab is None else f"exit head of {vocab}"


def _cut(text: Sequence[int], length: int) -> list[int]:
    """Return the first ``length`` ids of a text, repeated as often as it takes."""
    return [text[i % len(text)] for i in range(length)]


def _progress(what: str) -> None:
    click.echo(f"measuring {what} ...", err=True)
