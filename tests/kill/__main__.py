"""``python -m tests.kill``: kill each command many times, look at what it left, run it again, and compare."""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # forked from a process without threads
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click

from kill.check import differences, half_written, snapshot
from kill.commands import COMMANDS, Killed, make_inputs
from kill.process import KILLED, run_forked


def _whole(command: Killed, arguments: tuple[str, ...], inputs: Path, folder: Path, log: Path) -> float:
    """Run a command to its end and return the seconds that it took."""
    started = time.monotonic()
    if run_forked(command.work(arguments, inputs, folder), log) != 0:
        raise click.ClickException(
            f"{arguments[0]} failed: {log.read_text(encoding='utf-8', errors='replace')[-1500:]}"
        )
    return time.monotonic() - started


def _kill_once(
    command: Killed, wanted: dict[str, str], after_s: float, inputs: Path, folder: Path, log: Path
) -> tuple[bool, list[str]]:
    """Kill a command once in an empty folder; return whether it was still running, and what is wrong."""
    if command.before:
        _whole(command, command.before, inputs, folder, log)
    was_killed = run_forked(command.work(command.arguments, inputs, folder), log, after_s) == KILLED
    wrong = [f"right after the kill: {found}" for found in half_written(folder)]
    if command.before and not (folder / command.outputs[0] / "bundle.json").is_file():
        wrong.append("right after the kill: the bundle that was to be replaced is gone")
    if not command.again and not differences(snapshot(folder, command.volatile), wanted):
        return was_killed, wrong  # it had finished
    if run_forked(command.work((*command.arguments, *command.again), inputs, folder), log) != 0:
        wrong.append(f"run again: {log.read_text(encoding='utf-8', errors='replace')[-600:]}")
    else:
        wrong += [f"run again: {found}" for found in differences(snapshot(folder, command.volatile), wanted)]
    return was_killed, wrong


@click.command()
@click.option("--kills", default=20, show_default=True, help="How often each command is killed.")
@click.option("--seed", default=0, show_default=True, help="Seeds the moments.")
@click.option("--command", "chosen", multiple=True, type=click.Choice(list(COMMANDS)), help="Only these commands.")
def main(kills: int, seed: int, chosen: tuple[str, ...]) -> None:
    """Kill -9 each command at random moments; nothing may be half-written, and a rerun must give the same bytes."""
    for module in ("export.assemble", "quant.assemble", "quant.quality_report", "runtime.calibration.calibrate"):
        __import__(f"shortstack.{module}")
    __import__("shortstack.samples.recipes.layerskip")
    rng, faults = random.Random(seed), 0
    with tempfile.TemporaryDirectory(prefix="kill-") as temporary:
        home = Path(temporary)
        inputs, log = home / "inputs", home / "log"
        inputs.mkdir()
        if run_forked(lambda: make_inputs(inputs), log) != 0:
            raise click.ClickException(f"the inputs could not be made: {log.read_text(errors='replace')[-1500:]}")
        for name in chosen or COMMANDS:
            command, folder = COMMANDS[name], home / "work"
            folder.mkdir()
            if command.before:
                _whole(command, command.before, inputs, folder, log)
            took_s = _whole(command, command.arguments, inputs, folder, log)
            wanted = snapshot(folder, command.volatile)
            killed = runs = 0
            while killed < kills and runs < 5 * kills:  # of short commands many are over before the kill
                runs += 1
                shutil.rmtree(folder)
                folder.mkdir()
                after_s = rng.uniform(0, took_s)
                was_killed, wrong = _kill_once(command, wanted, after_s, inputs, folder, log)
                killed += was_killed
                if not was_killed:  # the first run was a slow one
                    took_s = min(took_s, after_s)
                faults += bool(wrong)
                for found in wrong:
                    click.echo(f"{name}, killed after {after_s:.3f} s of {took_s:.3f}: {found}", err=True)
            shutil.rmtree(folder)
            click.echo(f"{name:20}  {killed:3} kills in {runs} runs of {took_s:.1f} s")
    click.echo(f"{faults} faults, seed {seed}")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
