"""``python -m shortstack.samples.bench.drafter_shapes FOLDER --shape NAME``: what published drafters cost.

Writes a model and its drafter in their published sizes with random weights, exports them in a process of its own, and
measures the bundle. Costs do not depend on what weights say, but acceptance does. So no acceptance is measured: speeds
are predicted for given ones, and labelled so.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import click

from shortstack.export.spec import OWN_DRAFTER
from shortstack.graphs import names
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.errors import RequestError, ShortstackError
from shortstack.runtime.inspection.drafter import drafter_report
from shortstack.samples.bench.drafter_costs import MOST_DRAFTS, DrafterCosts, relative
from shortstack.samples.bench.made_drafters import PAIRS, Pair
from shortstack.samples.bench.made_model import write_model, write_weights
from shortstack.samples.bench.pipe import bundle_worker
from shortstack.samples.command import run_command

Precision = Literal["int4", "fp32"]
ACCEPTANCES = (0.6, 0.7, 0.8, 0.9)
LABEL = "predicted, acceptance forced"
_OPTIONS: dict[Precision, tuple[str, ...]] = {
    "int4": ("--preset", "int4", "--method", "rtn", "--kv-cache", "float"),
    "fp32": (),
}
_BYTES = 256  # ids of the made tokenizer: 1 to 256 are bytes


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of a process that has the bundle loaded and ran it.

    Attributes:
        rss_bytes: Resident.
        pss_bytes: Resident; pages that several processes share are divided among them.
        anonymous_bytes: Resident, and not mapped from files.
    """

    rss_bytes: int
    pss_bytes: int
    anonymous_bytes: int


@dataclass(frozen=True, slots=True)
class Predicted:
    """A predicted speed.

    Attributes:
        acceptance: Probability that a judged draft is accepted: given, not measured.
        drafts: Drafts of a round.
        speed_up: Over plain decoding.
        label: What the number is.
    """

    acceptance: float
    drafts: int
    speed_up: float
    label: str = LABEL


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured.

    Attributes:
        shape: The name of the shape.
        layers: Layers of the model.
        precision: How weights are stored.
        threads: Threads of onnxruntime.
        context: Positions before the rows that were measured.
        labels: In what the model differs from the published one.
        weights_bytes: Size of weights.data.
        drafter_bytes: What of it is the drafter's own.
        costs: Of rows and drafts, in plain steps.
        cost_by_bytes: A further draft as ``inspect`` predicts it, from the bytes that it reads.
        plain: Memory where only plain steps ran.
        drafted: Memory where the drafter ran too.
        predicted: Speeds for given acceptances.
    """

    shape: str
    layers: int
    precision: Precision
    threads: int
    context: int
    labels: tuple[str, ...]
    weights_bytes: int
    drafter_bytes: int
    costs: DrafterCosts
    cost_by_bytes: float
    plain: Memory
    drafted: Memory
    predicted: tuple[Predicted, ...]


def measure(
    folder: Path, shape: str, layers: int | None, precision: Precision, threads: int, context: int, repeats: int
) -> Figures:
    """Make a bundle in a folder, unless it is there, and measure it.

    Args:
        folder: Where the bundle is kept; the checkpoints are deleted.
        shape: A key of :data:`PAIRS`.
        layers: Of the model; None takes the usual ones.
        precision: How weights are stored.
        threads: Threads of onnxruntime.
        context: Positions before the rows that are measured.
        repeats: How often each is measured.

    Raises:
        RequestError: There are too few layers for the drafter.
        ShortstackError: The export or a measuring process ended with an error.
    """
    pair = PAIRS[shape].pair(layers)
    bundle = folder / f"{shape}-{pair.layers}-{precision}"
    if not bundle.is_dir():
        _make(bundle, pair, precision)
    manifest = open_bundle(bundle).manifest
    report = drafter_report(manifest)
    if report is None:
        raise RequestError(f"{bundle} has no drafter", remedy="delete it, so that it is made again")
    prompt = [1 + position % _BYTES for position in range(context)]
    found, memory = {}, {}
    for drafts in (False, True):
        with bundle_worker(bundle, threads) as worker:
            found = worker.ask("drafter", prompt=prompt, repeats=repeats, drafts=drafts)
            now = worker.ask("memory")
        memory[drafts] = Memory(now["rss_bytes"], now["pss_bytes"], now["anonymous_bytes"])
    costs = relative(found)
    return Figures(
        shape=shape,
        layers=pair.layers,
        precision=precision,
        threads=threads,
        context=context,
        labels=("weights are random", *pair.labels),
        weights_bytes=manifest.files[names.WEIGHTS_FILE].bytes,
        drafter_bytes=report.weight_bytes,
        costs=costs,
        cost_by_bytes=report.draft_cost,
        plain=memory[False],
        drafted=memory[True],
        predicted=tuple(
            Predicted(acceptance, drafts, costs.speed_up(acceptance, drafts))
            for acceptance in ACCEPTANCES
            for drafts in range(1, MOST_DRAFTS + 1)
        ),
    )


def _make(bundle: Path, pair: Pair, precision: Precision) -> None:
    bundle.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="shortstack-", dir=bundle.parent) as work:
        model, drafter = Path(work) / "model", OWN_DRAFTER
        write_model(model, pair.model)
        if pair.drafter is not None:
            drafter = str(Path(work) / "drafter")
            write_weights(Path(drafter), pair.drafter)
        command = [sys.executable, "-m", "shortstack", "export", str(model), str(bundle), "--drafter", drafter]
        command += _OPTIONS[precision]
        done = subprocess.run(command, check=False, stdout=2)  # standard output is for the figures
    if done.returncode:
        raise ShortstackError(f"{' '.join(command)} ended with code {done.returncode}")


def show(figures: Figures) -> Sequence[str]:
    """Return the figures as lines of text."""
    costs, mb = figures.costs, 1e6
    lines = [
        f"{figures.shape}: {figures.layers} layers, {figures.precision}, {figures.threads} threads, "
        f"{figures.context} positions before",
        *(f"  note: {label}" for label in figures.labels),
        "",
        f"plain step             {costs.plain_s.scaled(1000).show(1)} ms",
        *(f"c({rows})                   {cost.show()}" for rows, cost in costs.rows.items()),
        *(f"first draft, {rows} row{'s' if rows > 1 else ' '}    {cost.show(3)}" for rows, cost in costs.first.items()),
        f"further draft, f       {costs.further.show(3)}; by the bytes that it reads {figures.cost_by_bytes:.3f}",
        "medians [quartiles], in plain steps of the same repeat",
        "",
        f"weights.data           {figures.weights_bytes / mb:.0f} MB",
        f"the drafter's own      {figures.drafter_bytes / mb:.0f} MB of them",
    ]
    plain, drafted = asdict(figures.plain), asdict(figures.drafted)
    for name, words in (("rss_bytes", "RSS"), ("pss_bytes", "PSS"), ("anonymous_bytes", "anonymous")):
        added = (drafted[name] - plain[name]) / mb
        lines.append(f"{words:22} {plain[name] / mb:.0f} MB plainly, {added:+.0f} MB with the drafter")
    lines += ["", f"Speed over plain decoding ({LABEL}), by drafts in a round:"]
    lengths = range(1, MOST_DRAFTS + 1)
    lines.append("acceptance  " + "".join(f"{length:>7}" for length in lengths))
    for acceptance in ACCEPTANCES:
        row = [each.speed_up for each in figures.predicted if each.acceptance == acceptance]
        lines.append(f"{acceptance:<12}" + "".join(f"{speed:>6.2f}x" for speed in row))
    return lines


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--shape", type=click.Choice(list(PAIRS)), required=True, help="Which model and drafter.")
@click.option("--layers", type=click.IntRange(1), help="Another number of layers.  [default: the model's; 4 of MiMo]")
@click.option("--precision", type=click.Choice(["int4", "fp32"]), default="int4", help="How weights are stored.")
@click.option("--threads", type=click.IntRange(1), default=2, help="Threads of onnxruntime.")
@click.option("--context", type=click.IntRange(2, 4000), default=256, help="Positions before the measured rows.")
@click.option("--repeats", type=click.IntRange(1), default=30, help="How often each is measured, in turns.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(
    folder: Path,
    shape: str,
    layers: int | None,
    precision: Precision,
    threads: int,
    context: int,
    repeats: int,
    as_json: bool,
) -> None:
    """Measure what a published drafter costs, with random weights; the bundle is kept in FOLDER."""
    figures = measure(folder, shape, layers, precision, threads, context, repeats)
    click.echo(json.dumps(asdict(figures), indent=1) if as_json else "\n".join(show(figures)))


if __name__ == "__main__":
    run_command(main)
