"""`shortstack batch`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

import click

from shortstack.command_options import Command, option_group, provider_option, refuse_given, threads_option
from shortstack.command_paths import BundlePath
from shortstack.graphs.arguments import expect, is_whole
from shortstack.graphs.bundle import Bundle, open_bundle
from shortstack.graphs.errors import RequestError
from shortstack.progress import progress_stages
from shortstack.runtime.batch.answers import answer, digest_of, is_failure, open_answers, write
from shortstack.runtime.batch.lines import Line, read_lines
from shortstack.runtime.commands.batch_totals import Totals
from shortstack.runtime.commands.drafting import Drafting, drafting_options
from shortstack.runtime.commands.generate import make_strategy
from shortstack.runtime.commands.options import (
    Exiting,
    Showing,
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
from shortstack.runtime.model import Model
from shortstack.runtime.request import RequestOptions, StrategyName, make_request
from shortstack.runtime.text.tokenizer import Tokenizer
from shortstack.runtime.workers.ray_pool import Work, open_pool

Answered = tuple[dict[str, Any], Mapping[str, Any]]
"""The answer to a line as it is written, and its counts."""

_ALONE = ("upper_providers", "upper_threads")


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
@option_group(
    "More machines",
    click.option(
        "--ray",
        metavar="ADDRESS",
        help="Spread the prompts over the machines of a Ray cluster: HOST:PORT, auto for the one of this machine, or "
        "local to start one here.",
    ),
    click.option("--workers", type=click.IntRange(1), metavar="N", help="Engines.  [default: one for each machine]"),
)
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
    ray: str | None,
    workers: int | None,
    as_json: bool,
) -> int:
    """Answer the PROMPTS of a jsonl file with the model in BUNDLE, several at once.

    A line is {"prompt": ...}, {"messages": [...]} or {"text": ...}, with an "id" and options of its own if it likes, or
    a line of OpenAI's batch format. Each text is the one that the prompt gets alone. A stopped batch goes on where it
    stopped. Exits with 2 where lines failed; FILE says why.
    """
    showing = Showing(show_exits=False, report=None, no_sweep=False, as_json=as_json)
    refuse_options_without_effect(strategy, None, exit_layers, drafting, exiting, sampling.temperature, showing)
    refuse_given(_ALONE, "in a batch all segments share the machine", "leave it out")
    if ray is None:
        refuse_given(("workers",), "one engine answers all prompts", "add --ray local")
    else:
        _check_counts(slots, threads)
        refuse_given(("providers",), "workers compute on CPUs", "leave it out")
    if strategy == "early-exit":
        exiting.check()
    if out.exists() and prompts.exists() and out.samefile(prompts):
        raise RequestError(f"--out {out} is the file of the prompts", remedy="choose another file")
    if not out.parent.is_dir() or out.is_dir():
        raise RequestError(f"--out {out} cannot be written", remedy="name a file in a folder that exists")
    opened = open_bundle(bundle)
    slots = choose_slots(opened, slots)
    model = None if ray is not None else Model(opened, providers=list(providers) or None, threads=threads, slots=slots)
    policy = None
    if strategy == "early-exit":
        policy = exiting.policy(opened, exit_layers, exiting.load_profile(opened))
    tokenizer = model.tokenizer if model else Tokenizer.load(opened.folder, opened.manifest.files)
    drafting.policy(sampling)
    drafts = drafting.speculate(exit_layers, sampling, tokenizer) if strategy == "self-speculative" else None
    options: RequestOptions = {
        "strategy": make_strategy(strategy or "plain", drafts, policy),
        "sampling": sampling,
        "max_new_tokens": max_new_tokens,
        "stop": stop,
    }
    lines = read_lines(prompts, make_request("any", **options), tokenizer)
    for number, line in enumerate(lines, 1):
        try:
            line.request.strategy.exits_in(opened.manifest.plan)
        except RequestError as error:
            raise RequestError(f"{prompts}, prompt {number} ({line.id}): {error}") from None
    totals = Totals()
    with (
        nullcontext() if ray is None else open_pool(ray, workers, threads) as pool,
        open_answers(out, overwrite=overwrite) as (file, done),
    ):
        left = _left(lines, done, opened, out)
        started = time.perf_counter()
        if model is not None:
            found = _generated(model, left)
        else:
            assert pool is not None
            found = pool.answers(Work(Path(bundle).absolute(), slots, options), left)
        _write_all(found, len(left), file, totals)
        totals.elapsed_s = time.perf_counter() - started
    if model is not None and (ran := model.engine_stats) is not None and ran.runs[-1]:
        totals.rows_per_run = ran.rows[-1] / ran.runs[-1]
    click.echo(json.dumps(totals.to_json()) if as_json else totals.line())
    return 2 if totals.failed else 0


def _check_counts(slots: int | None, threads: int | None) -> None:
    """Refuse what each worker would refuse."""
    for name, value in (("slots", slots), ("threads", threads)):
        expect(value is None or is_whole(value, 1), name, value, "a whole number, 1 or more")


def _left(lines: list[Line], done: Mapping[str, str | None], bundle: Bundle, out: Path) -> list[tuple[Line, str]]:
    """Return the lines that have no answer yet, each with the digest of its request.

    Raises:
        RequestError: An answer is that to another request of the same id.
    """
    weights = bundle.manifest.weights_sha256
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


def _generated(model: Model, lines: Sequence[tuple[Line, str]]) -> Iterator[Answered]:
    for number, result in model.stream_batch((line.request for line, _ in lines), keep_going=True):
        yield answer(*lines[number], result), result.stats.to_json()


def _write_all(found: Iterator[Answered], count: int, file: IO[bytes], totals: Totals) -> None:
    with progress_stages() as stage:
        advance = stage("Generating", count)
        for entry, stats in found:
            write(file, entry)
            if is_failure(entry):
                totals.failed += 1
            else:
                totals.count(stats)
            advance(1)
