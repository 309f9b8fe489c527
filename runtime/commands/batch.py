"""`shortstack batch`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import click

from shortstack.command_options import Command, option_group, provider_option, refuse_given, threads_option
from shortstack.command_paths import BundlePath
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.errors import RequestError
from shortstack.progress import progress_stages
from shortstack.runtime.batch.answers import answer, digest_of, failure, open_answers, write
from shortstack.runtime.batch.lines import Line, read_lines
from shortstack.runtime.commands.generate import make_strategy
from shortstack.runtime.commands.options import (
    Drafting,
    Exiting,
    Showing,
    drafting_options,
    exit_layers_option,
    exiting_options,
    max_new_tokens_option,
    refuse_options_without_effect,
    sampling_options,
    stop_option,
    strategy_option,
)
from shortstack.runtime.commands.slots import choose_slots, slots_option
from shortstack.runtime.decode.sampling import SamplingParams
from shortstack.runtime.decode.step import Stats
from shortstack.runtime.model import Model
from shortstack.runtime.request import Request, StrategyName
from shortstack.runtime.result import Result

_ALONE = ("upper_providers", "upper_threads")


@dataclass(slots=True)
class Totals:
    """What a batch did.

    Attributes:
        answers: Lines that were answered.
        failed: Lines that were not.
        tokens: Tokens of all answers.
        drafted: Tokens drafted.
        accepted: Those of them that the whole model agreed with.
        exits: Tokens by the number of layers run to predict them.
        elapsed_s: Seconds from the first prompt to the last token.
        rows_per_run: Rows in a run of the uppermost layers; None where sequences run one by one.
    """

    answers: int = 0
    failed: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    exits: dict[int, int] = field(default_factory=dict)
    elapsed_s: float = 0.0
    rows_per_run: float | None = None

    def count(self, stats: Stats) -> None:
        """Count one finished generation."""
        self.answers += 1
        self.tokens += stats.emitted
        self.drafted += stats.drafted
        self.accepted += stats.accepted
        for depth, count in stats.exits.items():
            self.exits[depth] = self.exits.get(depth, 0) + count

    def to_json(self) -> dict[str, Any]:
        """Return them as JSON-ready data."""
        return {
            "answers": self.answers,
            "failed": self.failed,
            "tokens": self.tokens,
            "elapsed_s": self.elapsed_s,
            "tokens_per_s": self.tokens / self.elapsed_s if self.elapsed_s else 0.0,
            "rows_per_run": self.rows_per_run,
            "acceptance": self.accepted / self.drafted if self.drafted else None,
            "exits": {str(depth): count for depth, count in sorted(self.exits.items())},
        }

    def line(self) -> str:
        """Return them as one line."""
        speed = self.tokens / self.elapsed_s if self.elapsed_s else 0.0
        parts = [f"{self.answers} answers, {self.tokens} tokens, {speed:.1f} tokens/s"]
        if self.rows_per_run:
            parts.append(f"{self.rows_per_run:.1f} rows per run")
        if self.drafted:
            parts.append(f"acceptance {self.accepted / self.drafted:.0%}")
        if len(self.exits) > 1:
            shares = ", ".join(f"{depth}: {count / self.tokens:.0%}" for depth, count in sorted(self.exits.items()))
            parts.append(f"decided after layers {shares}")
        if self.failed:
            parts.append(f"{self.failed} failed")
        return "; ".join(parts)


@click.command(cls=Command)
@click.argument("bundle", type=BundlePath())
@click.argument("prompts", type=click.Path(path_type=Path))
@option_group(
    "Batch",
    click.option(
        "--out",
        "-o",
        type=click.Path(path_type=Path),
        metavar="FILE",
        required=True,
        help="Where answers go, a line each, as they come. Lines whose id is there already are not run again.",
    ),
    slots_option,
    click.option("--overwrite", is_flag=True, help="Begin FILE anew."),
)
@option_group(
    "Decoding",
    strategy_option,
    exit_layers_option,
    max_new_tokens_option,
    stop_option,
)
@sampling_options
@drafting_options
@exiting_options
@option_group("Machine", provider_option, threads_option)
@option_group("Output", click.option("--json", "as_json", is_flag=True, help="Print the statistics as JSON."))
def batch(
    bundle: str,
    prompts: Path,
    out: Path,
    slots: int | None,
    overwrite: bool,
    strategy: StrategyName | None,
    exit_layers: tuple[int, ...],
    max_new_tokens: int,
    stop: tuple[str, ...],
    sampling: SamplingParams,
    drafting: Drafting,
    exiting: Exiting,
    providers: tuple[str, ...],
    threads: int | None,
    as_json: bool,
) -> int:
    """Answer the PROMPTS of a jsonl file with the model in BUNDLE, several at once.

    A line is {"prompt": ...}, {"messages": [...]} or {"text": ...}, with an "id" and options of its own if it likes, or
    a line of OpenAI's batch format. Each text is the one that the prompt gets alone. A stopped batch goes on where it
    stopped. Exits with 2 where lines failed; FILE says why.
    """
    showing = Showing(show_exits=False, report=None, no_sweep=False, as_json=as_json)
    refuse_options_without_effect(strategy, None, exit_layers, exiting, sampling.temperature, showing)
    refuse_given(_ALONE, "in a batch all segments share the machine", "leave it out")
    if strategy == "early-exit":
        exiting.check()
    if out.exists() and prompts.exists() and out.samefile(prompts):
        raise RequestError(f"--out {out} is the file of the prompts", remedy="choose another file")
    if not out.parent.is_dir() or out.is_dir():
        raise RequestError(f"--out {out} cannot be written", remedy="name a file in a folder that exists")
    opened = open_bundle(bundle)
    slots = choose_slots(opened, slots)
    model = Model(opened, providers=list(providers) or None, threads=threads, slots=slots)
    policy = None
    if strategy == "early-exit":
        policy = exiting.policy(model, exit_layers, exiting.load_profile(model))
    chosen = make_strategy(strategy or "plain", exit_layers, drafting.policy(sampling), policy)
    defaults = Request("any", chosen, sampling, max_new_tokens=max_new_tokens, stop=stop)
    lines = read_lines(prompts, defaults, model.tokenizer)
    for number, line in enumerate(lines, 1):
        try:
            line.request.strategy.exits_in(model.bundle.manifest.plan)
        except RequestError as error:
            raise RequestError(f"{prompts}, prompt {number} ({line.id}): {error}") from None
    with open_answers(out, overwrite=overwrite) as (file, done):
        totals = _run(model, _left(lines, done, model, out), file)
    click.echo(json.dumps(totals.to_json()) if as_json else totals.line())
    return 2 if totals.failed else 0


def _left(lines: list[Line], done: Mapping[str, str | None], model: Model, out: Path) -> list[tuple[Line, str]]:
    """Return the lines that have no answer yet, each with the digest of its request.

    Raises:
        RequestError: An answer is that to another request of the same id.
    """
    weights = model.bundle.manifest.weights_sha256
    digests = {line.id: digest_of(line, weights) for line in lines}
    for line in lines:
        if done.get(line.id) is not None and done[line.id] != digests[line.id]:
            raise RequestError(
                f"{out} has an answer with the id {line.id} to another prompt, or with other options or another model",
                remedy="choose another file, or pass --overwrite",
            )
    left = [(line, digests[line.id]) for line in lines if line.id not in done]
    if done:
        click.echo(f"{out}: {len(lines) - len(left)} of {len(lines)} answers are there already", err=True)
    return left


def _run(model: Model, lines: list[tuple[Line, str]], file: IO[bytes]) -> Totals:
    totals = Totals()
    started = time.perf_counter()
    with progress_stages() as stage:
        advance = stage("Generating", len(lines))
        for number, result in model.stream_batch((line.request for line, _ in lines), keep_going=True):
            write(file, _entry(*lines[number], result))
            if result.error is None:
                totals.count(result.stats)
            else:
                totals.failed += 1
            advance(1)
    totals.elapsed_s = time.perf_counter() - started
    if (found := model.engine_stats) is not None and found.runs[-1]:
        totals.rows_per_run = found.rows[-1] / found.runs[-1]
    return totals


def _entry(line: Line, digest: str, result: Result) -> dict[str, Any]:
    if result.error is not None:
        return failure(line, result.error)
    return answer(line, digest, result.text, result.tokens, result.finish_reason, result.stats)
