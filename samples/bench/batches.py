"""``python -m shortstack.samples.bench.batches BUNDLE``: how much several sequences at once gain over one at a time.

Every number of slots gets the same prompts, and decodes the same number of tokens of each. The numbers take turns, so
that a slow minute of a shared machine hits all of them; medians over the rounds are printed. CPU seconds are those of
the whole process, and vary less than the clock where others use the cores.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from shortstack.graphs.texts.prompts import prompts
from shortstack.runtime.decode.draft_length import DraftPolicy
from shortstack.runtime.early_exit.expression import parse_criterion
from shortstack.runtime.early_exit.policy import ExitPolicy
from shortstack.runtime.model import Model, load
from shortstack.runtime.request import ExitEarly, Plain, Request, Speculate, Strategy
from shortstack.samples.command import run_command


@dataclass(frozen=True, slots=True)
class Throughput:
    """What one strategy reached with one number of slots; medians over the rounds.

    Attributes:
        strategy: The strategy.
        slots: How many sequences ran at once.
        tokens_per_s: Tokens of all sequences per second.
        gain: Times the tokens per second of plain decoding with one slot; the median of the rounds' ratios.
        cpu_gain: The same with CPU seconds in place of those on the clock.
        rows_per_run: Rows in a run of the uppermost layers; None with one slot.
        acceptance: The acceptance rate; None where nothing was drafted.
    """

    strategy: str
    slots: int
    tokens_per_s: float
    gain: float
    cpu_gain: float
    rows_per_run: float | None
    acceptance: float | None


@dataclass(frozen=True, slots=True)
class _Once:
    tokens: int
    elapsed_s: float
    cpu_s: float
    rows_per_run: float | None
    drafted: int
    accepted: int


def measure(
    bundle: Path, strategies: Sequence[str], slots: Sequence[int], requests: int, tokens: int, rounds: int
) -> list[Throughput]:
    """Measure all strategies with all numbers of slots in turn.

    Args:
        bundle: The bundle.
        strategies: ``plain``, ``self-speculative``, or a rule of early exit.
        slots: Numbers of slots; 1 is measured in any case.
        requests: How many prompts.
        tokens: How many tokens each gets.
        rounds: How often.
    """
    numbers = sorted({1, *slots})
    found: dict[tuple[str, int], list[_Once]] = {}
    for _ in range(rounds):
        for number in numbers:
            with load(bundle, slots=number) as model:
                for name in dict.fromkeys(("plain", *strategies)):
                    _run(model, name, number, 8)  # loops learn costs, buffers are made
                    found.setdefault((name, number), []).append(_run(model, name, requests, tokens))
    alone = found["plain", 1]
    result = []
    for (name, number), runs in sorted(found.items()):
        ratios = [
            run.tokens / run.elapsed_s * base.elapsed_s / base.tokens for run, base in zip(runs, alone, strict=True)
        ]
        on_cpu = [run.tokens / run.cpu_s * base.cpu_s / base.tokens for run, base in zip(runs, alone, strict=True)]
        drafted = sum(run.drafted for run in runs)
        result.append(
            Throughput(
                strategy=name,
                slots=number,
                tokens_per_s=statistics.median(run.tokens / run.elapsed_s for run in runs),
                gain=statistics.median(ratios),
                cpu_gain=statistics.median(on_cpu),
                rows_per_run=runs[-1].rows_per_run,
                acceptance=sum(run.accepted for run in runs) / drafted if drafted else None,
            )
        )
    return result


def _run(model: Model, strategy: str, requests: int, tokens: int) -> _Once:
    texts = prompts()
    asked = [
        Request(texts[number % len(texts)][:200], _strategy(strategy), max_new_tokens=tokens, ignore_eos=True)
        for number in range(requests)
    ]
    before = model.engine_stats
    runs, rows = (before.runs[-1], before.rows[-1]) if before is not None else (0, 0)
    started, cpu = time.perf_counter(), time.process_time()
    results = model.generate_batch(asked)
    elapsed_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    after = model.engine_stats
    per_run = (after.rows[-1] - rows) / max(after.runs[-1] - runs, 1) if after is not None else None
    stats = [result.stats for result in results]
    return _Once(
        sum(s.emitted for s in stats),
        elapsed_s,
        cpu_s,
        per_run,
        sum(s.drafted for s in stats),
        sum(s.accepted for s in stats),
    )


def _strategy(name: str) -> Strategy:
    if name == "plain":
        return Plain()
    if name == "self-speculative":
        return Speculate(draft=DraftPolicy(is_adaptive=True))
    return ExitEarly(ExitPolicy(parse_criterion(name)))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--slots", type=int, multiple=True, default=(1, 4, 8, 16), help="May be given more than once.")
@click.option(
    "--strategy",
    "strategies",
    multiple=True,
    help="self-speculative, or a rule of early exit; plain is always measured.",
)
@click.option("--requests", type=int, default=32, help="How many prompts.")
@click.option("--tokens", type=int, default=48, help="Tokens of each.")
@click.option("--rounds", type=int, default=3, help="How often everything is measured, in turn.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(
    bundle: Path,
    slots: tuple[int, ...],
    strategies: tuple[str, ...],
    requests: int,
    tokens: int,
    rounds: int,
    as_json: bool,
) -> None:
    """Measure the throughput of BUNDLE with several numbers of slots."""
    found = measure(bundle, strategies, slots, requests, tokens, rounds)
    if as_json:
        click.echo(json.dumps([asdict(each) for each in found]))
        return
    click.echo("strategy              slots  tokens/s   gain  gain on CPU  rows per run  acceptance")
    for each in found:
        rows = "-" if each.rows_per_run is None else f"{each.rows_per_run:.1f}"
        acceptance = "-" if each.acceptance is None else f"{each.acceptance:.0%}"
        click.echo(
            f"{each.strategy:20}  {each.slots:5}  {each.tokens_per_s:8.1f}  {each.gain:4.2f}x  {each.cpu_gain:10.2f}x"
            f"  {rows:>12}  {acceptance:>10}"
        )


if __name__ == "__main__":
    run_command(main)
