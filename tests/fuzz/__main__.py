"""``python -m tests.fuzz``: damage inputs, run the commands on them, and count how each ends."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # forked from a process without threads
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import click

from fuzz import oracle
from fuzz.child import Outcome, run_in_child
from fuzz.sound import Sound
from fuzz.targets import TARGETS, prepare
from fuzz.verdict import ACCEPTED, REFUSED, judge
from shortstack.__main__ import run


@dataclass(frozen=True)
class Case:
    """One input and how it ended.

    Attributes:
        name: TARGET:NUMBER, which with the seed gives the input again.
        damage: What was done to it.
        command: The command line.
        verdict: ``refused``, a word for why it is right, or what is wrong.
        says: The last lines of stderr.
    """

    name: str
    damage: str
    command: list[str]
    verdict: str
    says: str

    @property
    def is_fault(self) -> bool:
        """Whether the input was neither refused in one line nor right."""
        return self.verdict != REFUSED and not self.verdict.startswith(oracle.RIGHT)


def run_case(name: str, number: int, seed: int, sound: Sound, folder: Path, streams: Path) -> Case:
    """Run one input in an empty folder; output of the processes goes to ``streams``."""
    target = TARGETS[name]
    rng = random.Random(f"{seed} {name} {number}")
    damage, command = prepare(target, rng, sound, folder)
    base_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    outcome = run_in_child(lambda: run(command), streams, "command")
    verdict, says = judge(outcome, folder, base_bytes, streams=command[0] == "generate"), outcome.error
    if verdict == ACCEPTED:
        checked = run_in_child(lambda: _check(target.is_right, folder, streams), streams, "oracle")
        verdict, says = _verdict_of(checked, streams), checked.error or says
    return Case(f"{name}:{number}", damage[:200], command, verdict, says[-1500:].replace(str(folder), "FOLDER"))


def _check(is_right: oracle.Oracle, folder: Path, streams: Path) -> int:
    """Runs in a child: writes what it finds, as far as it has come."""
    path = streams / "verdict"
    try:
        for found in is_right(folder):
            path.write_text(found, encoding="utf-8", errors="replace")
    except oracle.WrongError as wrong:
        path.write_text(f"wrong: {wrong}", encoding="utf-8", errors="replace")
    return 0


def _verdict_of(checked: Outcome, streams: Path) -> str:
    path = streams / "verdict"
    found = path.read_text(encoding="utf-8") if path.is_file() else ""
    path.unlink(missing_ok=True)
    died = f"decoding it ends with code {checked.code}"
    return found if found == oracle.UNREADABLE or (found and checked.code == 0) else died


def _warm_up() -> None:
    """Import what the commands and the oracle import, once, so that each child has it."""
    import shortstack.export.assemble
    import shortstack.export.cli
    import shortstack.quant.cli
    import shortstack.runtime.commands.calibrate
    import shortstack.runtime.commands.generate
    import shortstack.runtime.commands.inspect_bundle  # noqa: F401


@click.command()
@click.option("--inputs", default=3600, show_default=True, help="How many inputs, shared among the targets.")
@click.option("--seed", default=0, show_default=True, help="Seeds every draw.")
@click.option("--target", "chosen", multiple=True, type=click.Choice(sorted(TARGETS)), help="Only these targets.")
@click.option("--only", metavar="TARGET:NUMBER", help="Run this one input, and print all that is known of it.")
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), help="Keep inputs that show a fault here.")
@click.option("--json", "as_json", is_flag=True, help="Print every fault and the counts as JSON.")
def main(inputs: int, seed: int, chosen: tuple[str, ...], only: str | None, keep: Path | None, as_json: bool) -> None:
    """Damage sound inputs at random: each must be refused in one line with exit code 2, or be right."""
    _warm_up()
    names = list(chosen or TARGETS)
    work = [(name, number) for number in range(-(-inputs // len(names))) for name in names][:inputs]
    if only is not None:
        name, number = only.split(":")
        work = [(name, int(number))]
    counts: dict[str, Counter[str]] = {name: Counter() for name, _ in work}
    faults: list[Case] = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        home = Path(temporary)
        sound, streams = Sound(home / "sound"), home / "streams"
        sound.folder.mkdir()
        streams.mkdir()
        made = run_in_child(sound.make, streams, "sound", time_limit_s=600)
        if made.code != 0:
            raise click.ClickException(f"the sound inputs could not be made: {made.error[-2000:]}")
        for done, (name, number) in enumerate(work, 1):
            folder = home / "input"
            folder.mkdir()
            case = run_case(name, number, seed, sound, folder, streams)
            counts[name]["fault" if case.is_fault else case.verdict] += 1
            if case.is_fault or only is not None:
                faults.append(case)
                click.echo(
                    f"{case.name}  {case.verdict}  [{case.damage}]  {case.command[0]}\n  {case.says.strip()[-600:]}",
                    err=True,
                )
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    shutil.move(folder, keep / case.name.replace(":", "-"))
            shutil.rmtree(folder, ignore_errors=True)
            if sys.stderr.isatty() and not only:
                click.echo(f"\r{done} of {len(work)}, {len(faults)} faults", nl=False, err=True)
    _report(counts, faults, seed, as_json)
    sys.exit(1 if any(case.is_fault for case in faults) else 0)


def _report(counts: dict[str, Counter[str]], faults: list[Case], seed: int, as_json: bool) -> None:
    if as_json:
        found = [{"name": f.name, "verdict": f.verdict, "damage": f.damage, "says": f.says} for f in faults]
        click.echo(json.dumps({"seed": seed, "counts": counts, "faults": found}, indent=2))
        return
    columns = sorted({verdict for counted in counts.values() for verdict in counted})
    width = max(map(len, counts))
    click.echo(f"{'':{width}}  " + "  ".join(columns))
    for name, counted in counts.items():
        click.echo(f"{name:{width}}  " + "  ".join(f"{counted[column]:{len(column)}}" for column in columns))
    total = sum(sum(counted.values()) for counted in counts.values())
    click.echo(f"{total} inputs, seed {seed}")


if __name__ == "__main__":
    main()
