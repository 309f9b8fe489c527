"""The parts of the benchmark about what a model takes before it decodes: disk, memory, and time to load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shortstack.cores import usable_cores
from shortstack.samples.bench.artifacts import Artifacts, stored_bytes
from shortstack.samples.bench.figures import Spread, ratios, spread
from shortstack.samples.bench.loading import measure_loads
from shortstack.samples.bench.pipe import WorkerProcess, bundle_worker
from shortstack.samples.bench.report import Row, Section, at_most, progress
from shortstack.samples.bench.rivals import GENAI, Rival
from shortstack.samples.bench.settings import Settings, cut, head_name

MAX_DISK = 1.02
MAX_PEAK = 1.1
MAX_LOAD = 1.0
MAX_INT4_MB = 100.0  # of the default model


def disk_section(
    models: Artifacts, exit_layer: int, rivals: Sequence[Rival], settings: Settings, max_mb: float | None = None
) -> Section:
    """Bundles against one uncut graph of the same precision, and next to the rivals' models, on disk.

    Args:
        models: The bundles.
        exit_layer: Where they are cut.
        rivals: The other engines.
        settings: Which exit heads there are.
        max_mb: What a cut bundle should take at most; None where nothing was aimed at.
    """
    whole = stored_bytes(models.bundle(None))
    rows = [Row("uncut, MB", f"{whole / 1e6:.1f}", whole / 1e6)]
    for vocab in settings.draft_vocabs:
        size = stored_bytes(models.bundle(exit_layer, vocab))
        what, mb = f"{head_name(vocab)}, MB", size / 1e6
        rows += [
            Row(what, f"{mb:.1f}", mb) if max_mb is None else at_most(what, mb, f"{mb:.1f}", max_mb),
            at_most(f"{head_name(vocab)} / uncut", size / whole, f"{size / whole:.4f}", MAX_DISK),
        ]
    for rival in rivals:
        mb = stored_bytes(rival.model) / 1e6
        rows.append(Row(f"{rival.name}, MB", f"{mb:.1f}", mb))
    return Section("bundle on disk", tuple(rows))


def memory_section(
    models: Artifacts, exit_layer: int, text: Sequence[int], rivals: Sequence[Rival], settings: Settings
) -> Section:
    """Peak and resting memory of fresh processes: split against uncut, and next to the rivals."""
    prompt = cut(text, settings.memory_prompt)

    def measure(bundle: Path, draft: int | None) -> tuple[int, int, int]:
        progress(f"memory of {bundle.name}")
        with bundle_worker(bundle, None) as worker:
            loaded = worker.ask("memory")
            worker.ask("decode", prompt=prompt, tokens=settings.memory_tokens, draft=draft)
            after = worker.ask("memory")
        return after["peak_bytes"], loaded["rss_bytes"], after["pss_bytes"]

    def measure_rival(worker: WorkerProcess) -> tuple[int, int, int]:
        loaded = worker.ask("memory")
        worker.ask("start", prompt=prompt, tokens=settings.memory_tokens)
        worker.ask("chunk", count=settings.memory_tokens - 1)
        after = worker.ask("memory")
        return after["peak_bytes"], loaded["rss_bytes"], after["pss_bytes"]

    def show(peak: int, loaded: int, pss: int) -> str:
        return f"{peak / 1e6:.0f} (loaded {loaded / 1e6:.0f}, decoded PSS {pss / 1e6:.0f})"

    whole = measure(models.bundle(None), None)
    rows = [Row("uncut, plain, peak MB", show(*whole), whole[0] / 1e6)]
    for vocab in settings.draft_vocabs:
        for name, draft in (("plain", None), ("self-speculative", 4)):
            peak, *rest = measure(models.bundle(exit_layer, vocab), draft)
            what = f"{head_name(vocab)}, {name}, peak"
            rows += [
                Row(f"{what} MB", show(peak, *rest), peak / 1e6),
                at_most(f"{what} / uncut", peak / whole[0], f"{peak / whole[0]:.3f}", MAX_PEAK),
            ]
    for rival in rivals:
        progress(f"memory of {rival.name}")
        with rival.start(usable_cores()) as worker:
            found = measure_rival(worker)
        rows.append(Row(f"{rival.name}, peak MB", show(*found), found[0] / 1e6))
    return Section("memory", tuple(rows))


def load_section(
    models: Artifacts, exit_layer: int, text: Sequence[int], rivals: Sequence[Rival], settings: Settings
) -> Section:
    """Time to load, and to the first token from there, in fresh processes with warm files: ours against the rivals'."""
    progress("loading")
    bundle, threads = models.bundle(exit_layer), usable_cores()
    starts = [lambda: bundle_worker(bundle, threads)]
    starts += [lambda rival=rival: rival.start(threads) for rival in rivals]  # type: ignore[misc]
    mine, *others = measure_loads(starts, cut(text, settings.memory_prompt), settings.load_repeats)

    def in_ms(values: Sequence[float]) -> Spread:
        return spread(values).scaled(1e3)

    def row(what: str, found: Spread) -> Row:
        return Row(what, found.show(0), found.median)

    def ratio_row(what: str, found: Spread, most: float | None) -> Row:
        shown = found.show(3)
        return Row(what, shown, found.median) if most is None else at_most(what, found.median, shown, most)

    rows = [row("load, ms", in_ms(mine.load_s)), row("load and first token, ms", in_ms(mine.first_token_s))]
    for rival, other in zip(rivals, others, strict=True):
        loads, firsts = ratios(mine.load_s, other.load_s), ratios(mine.first_token_s, other.first_token_s)
        # llama.cpp maps a file in the very form it computes with, and reads it when it decodes: nothing to aim at.
        has_goal = models.is_quantized and rival.name == GENAI
        rows += [
            row(f"load of {rival.name}, ms", in_ms(other.load_s)),
            row(f"load and first token of {rival.name}, ms", in_ms(other.first_token_s)),
            ratio_row(f"load / {rival.name}", loads, MAX_LOAD if has_goal else None),
            ratio_row(f"load and first token / {rival.name}", firsts, None),
        ]
    return Section("load", tuple(rows))
