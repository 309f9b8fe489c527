"""``python -m shortstack.samples.bench.batch_rivals``: several sequences at once, against other engines.

Every engine gets the same prompts, all of one length, so that none has to pad, and decodes the same number of tokens of
each greedily: one text after the other, and all at once. Prompts are part of the time. The engines take turns, each in
a process of its own with the same number of threads; medians over the rounds are printed.

onnxruntime-genai gets all texts as one batch of its generator. llama.cpp gets them as sequences of one context: prompts
one by one, then one row of each sequence in every run, which is what its server does for busy slots.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from shortstack.graphs.texts.prompts import prompts
from shortstack.runtime.text.tokenizer import Tokenizer
from shortstack.samples.bench.artifacts import PRECISIONS, Precision, open_artifacts
from shortstack.samples.bench.pipe import WorkerProcess, bundle_worker
from shortstack.samples.bench.rivals import find_rivals
from shortstack.samples.bench.settings import cut
from shortstack.samples.command import run_command
from shortstack.samples.fetch_model import cache_folder, default_model_path

_OURS = "shortstack"
_REST_S = 0.2  # in which the threads of the engine before stop spinning


@dataclass(frozen=True, slots=True)
class Compared:
    """One engine; medians over the rounds.

    Attributes:
        engine: Its name.
        alone_tokens_per_s: New tokens per second, one text after the other.
        batch_tokens_per_s: The same with all texts at once.
        gain: Times the speed of one text after the other; the median of the rounds' ratios.
        cpu_gain: The same with CPU seconds in place of those on the clock.
        of_ours: Our speed in a batch over this engine's; the median of the rounds' ratios.
        same_texts: Texts that came out of the batch as they did alone.
    """

    engine: str
    alone_tokens_per_s: float
    batch_tokens_per_s: float
    gain: float
    cpu_gain: float
    of_ours: float
    same_texts: int


@dataclass(frozen=True, slots=True)
class Engine:
    """The processes of one engine: one that decodes texts alone, and one that decodes them together."""

    alone: WorkerProcess
    together: WorkerProcess


def compare(
    engines: dict[str, Engine], texts: Sequence[Sequence[int]], tokens: int, rounds: int, say: Callable[[str], None]
) -> list[Compared]:
    """Let all engines decode the texts in turn.

    Args:
        engines: Ours and the others, by name.
        texts: Prompts of one length.
        tokens: New tokens of each.
        rounds: How often; one more run before warms up.
        say: Told which round begins.
    """
    alone: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
    together: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
    for turn in range(rounds + 1):
        say(f"round {turn} of {rounds}")
        for name, engine in engines.items():
            time.sleep(_REST_S)
            parts = [engine.alone.ask("batch", prompts=[list(text)], tokens=tokens) for text in texts]
            time.sleep(_REST_S)
            whole = engine.together.ask("batch", prompts=[list(text) for text in texts], tokens=tokens)
            if turn:
                alone[name].append(_joined(parts))
                together[name].append(whole)
    count = len(texts) * tokens
    return [
        Compared(
            engine=name,
            alone_tokens_per_s=statistics.median(count / one["elapsed_s"] for one in alone[name]),
            batch_tokens_per_s=statistics.median(count / one["elapsed_s"] for one in together[name]),
            gain=_median_ratio(alone[name], together[name], "elapsed_s"),
            cpu_gain=_median_ratio(alone[name], together[name], "cpu_s"),
            of_ours=_median_ratio(together[name], together[_OURS], "elapsed_s"),
            same_texts=sum(
                one == other for one, other in zip(alone[name][-1]["tokens"], together[name][-1]["tokens"], strict=True)
            ),
        )
        for name in engines
    ]


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "tokens": [part["tokens"][0] for part in parts],
        "elapsed_s": sum(part["elapsed_s"] for part in parts),
        "cpu_s": sum(part["cpu_s"] for part in parts),
    }


def _median_ratio(above: Sequence[dict[str, Any]], below: Sequence[dict[str, Any]], key: str) -> float:
    ratios: list[float] = [a[key] / b[key] for a, b in zip(above, below, strict=True)]
    return statistics.median(ratios)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--checkpoint", type=click.Path(path_type=Path, exists=True), help="Another model than the default one.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="int4", help="Of the models under comparison.")
@click.option("--preset", help="How `shortstack quantize` makes ours.  [default: the precision's name]")
@click.option("--method", help="How `shortstack quantize` rounds: changes no speed.  [default: the preset's]")
@click.option("--texts", "count", type=click.IntRange(1), default=8, help="Texts decoded at once.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=64, help="Length of every prompt.")
@click.option("--tokens", type=click.IntRange(1), default=64, help="New tokens of each text.")
@click.option("--rounds", type=click.IntRange(1), default=5, help="How often everything is measured, in turn.")
@click.option("--threads", type=click.IntRange(1), default=2, help="Of each engine.")
@click.option("--genai-python", default=sys.executable, help="An interpreter that has onnxruntime-genai.")
@click.option("--llama-python", default=sys.executable, help="An interpreter that has llama-cpp-python.")
@click.option("--cache", type=click.Path(path_type=Path), help="Where models are kept.  [default: bench in our cache]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(
    checkpoint: Path | None,
    precision: Precision,
    preset: str | None,
    method: str | None,
    count: int,
    prompt_tokens: int,
    tokens: int,
    rounds: int,
    threads: int,
    genai_python: str,
    llama_python: str,
    cache: Path | None,
    as_json: bool,
) -> None:
    """Compare batches with those of onnxruntime-genai and llama.cpp, as far as these are installed."""
    source = checkpoint or default_model_path()
    models = open_artifacts(source, cache or cache_folder() / "bench", precision, preset, method)
    bundle = models.bundle(None)
    rivals = find_rivals(models, genai_python, llama_python)
    tokenizer = Tokenizer.load(bundle)
    texts = [cut(tokenizer.encode(prompts()[number % len(prompts())]), prompt_tokens) for number in range(count)]
    with ExitStack() as stack:
        engines = {
            _OURS: Engine(
                stack.enter_context(bundle_worker(bundle, threads)),
                stack.enter_context(bundle_worker(bundle, threads, count)),
            )
        }
        for rival in rivals:
            worker = stack.enter_context(rival.start(threads))
            engines[f"{rival.name} {rival.version}"] = Engine(worker, worker)
        found = compare(engines, texts, tokens, rounds, lambda line: click.echo(line, err=True))
    if as_json:
        click.echo(json.dumps([asdict(each) for each in found]))
        return
    click.echo(
        f"{models.description}, {count} texts, prompts of {prompt_tokens}, {tokens} new tokens, {threads} threads"
    )
    click.echo("engine                       alone tok/s  batch tok/s   gain  gain on CPU  ours over it  same texts")
    for each in found:
        click.echo(
            f"{each.engine:27}  {each.alone_tokens_per_s:11.1f}  {each.batch_tokens_per_s:11.1f}  {each.gain:4.2f}x"
            f"  {each.cpu_gain:10.2f}x  {each.of_ours:11.2f}x  {each.same_texts:3} of {count}"
        )


if __name__ == "__main__":
    run_command(main)
