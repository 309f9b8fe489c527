"""``python -m shortstack.samples.bench.straight``: what it takes to get from a checkpoint straight to blocks.

Writes a checkpoint of random weights in the shape of a real model, quantizes it in a process of its own, and samples
that process: anonymous memory (``RssAnon`` of ``/proc/PID/status``, without pages that are mapped from files), CPU
seconds, and seconds on the clock, which mean little where others use the cores. Then it loads the result, decodes, and
compares resident memory with the size of the file. Linux only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from shortstack.graphs.errors import ShortstackError
from shortstack.samples.bench.made_model import SHAPES, write_model
from shortstack.samples.bench.pipe import bundle_worker
from shortstack.samples.command import run_command

_EVERY_S = 0.05
_PROMPT, _TOKENS = 64, 64


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured.

    Attributes:
        shape: The name of the shape, and its layers.
        layers: How many layers it had.
        checkpoint_mb: Size of the checkpoint.
        weights_mb: Size of the result's weights.data.
        elapsed_s: Seconds on the clock.
        cpu_s: Seconds of all cores.
        anonymous_mb: Largest anonymous memory.
        loaded_rss_mb: Resident memory of a process that loaded the result.
        decoded_rss_mb: The same after it decoded.
        decoded_anonymous_mb: What of that is not mapped from files.
    """

    shape: str
    layers: int
    checkpoint_mb: float
    weights_mb: float
    elapsed_s: float
    cpu_s: float
    anonymous_mb: float
    loaded_rss_mb: float
    decoded_rss_mb: float
    decoded_anonymous_mb: float


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--shape", type=click.Choice(list(SHAPES)), default="1b", help="Of which model.")
@click.option("--layers", type=int, help="Another number of layers.  [default: the model's]")
@click.option("--folder", type=click.Path(path_type=Path), help="Where it works.  [default: a temporary folder]")
@click.option("--no-load", is_flag=True, help="Do not load the result.")
@click.argument("options", nargs=-1)
def straight(shape: str, layers: int | None, folder: Path | None, no_load: bool, options: tuple[str, ...]) -> None:
    """Measure `shortstack export --preset int4 OPTIONS`; put -- before the options."""
    with tempfile.TemporaryDirectory(prefix="shortstack-", dir=folder) as work:
        click.echo(json.dumps(asdict(measure(shape, layers, Path(work), options, loads=not no_load)), indent=1))


def measure(shape: str, layers: int | None, work: Path, options: tuple[str, ...], *, loads: bool) -> Figures:
    """Make a checkpoint, quantize it, and load the result."""
    made = SHAPES[shape].with_layers(layers)
    checkpoint, out = work / "checkpoint", work / "bundle"
    write_model(checkpoint, made)
    command = [sys.executable, "-m", "shortstack", "export", str(checkpoint), str(out), "--preset", "int4", *options]
    before, started = os.times(), time.perf_counter()
    with subprocess.Popen(command) as process:
        peak = _watch(process)
    elapsed, after = time.perf_counter() - started, os.times()
    if process.returncode:
        raise ShortstackError(f"{' '.join(command)} ended with code {process.returncode}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    loaded, decoded, anonymous = _load(out) if loads else (0, 0, 0)
    weights = (out / "weights.data").stat().st_size
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    numbers = (peak, loaded, decoded, anonymous)
    return Figures(shape, made.layers, size / 1e6, weights / 1e6, elapsed, cpu, *(n / 1e6 for n in numbers))


def _watch(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process; return its largest anonymous memory in bytes."""
    peak, ended = [0], threading.Event()

    def sample() -> None:
        while not ended.wait(_EVERY_S):
            peak[0] = max(peak[0], anonymous_bytes(process.pid))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    process.wait()
    ended.set()
    sampler.join()
    return peak[0]


def anonymous_bytes(process: int) -> int:
    """Return the anonymous memory of a process; 0 where it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def _load(bundle: Path) -> tuple[int, int, int]:
    """Return resident bytes of a process with the bundle loaded, after it decoded, and what is anonymous then."""
    with bundle_worker(bundle, None) as worker:
        loaded = worker.ask("memory")
        worker.ask("decode", prompt=list(range(1, _PROMPT + 1)), tokens=_TOKENS, draft=None)
        decoded = worker.ask("memory")
    return loaded["rss_bytes"], decoded["rss_bytes"], decoded["anonymous_bytes"]


def main() -> None:
    """Run the measurement; a known error is one line and its exit code."""
    run_command(straight)


if __name__ == "__main__":
    main()
