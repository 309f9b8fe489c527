"""A model's own greedy answers as training data, for exits that must predict what the whole model will predict.

::

    python -m shortstack.samples.recipes.self_data MODEL OUT.jsonl --prompts questions.jsonl --self-prompted 500

MODEL is a bundle, or a checkpoint, which is exported to a temporary bundle first. A row of OUT, one JSON object each::

    {"p": [ids of the prompt, chat template applied], "o": [ids of the answer, the stopping one included], "k": kind}

``k`` is ``prompt`` for a prompt from the file and ``self`` for one that the model asked itself: a user's turn sampled
at temperature 1 and top-p 0.95 behind the chat template's empty user turn, up to the token that ends it; empty, endless
and garbled turns are thrown away. The rows of the file's prompts come first, in its order.

Rows are made one after another, or with ``--slots`` several at once; they are the same. Where the bundle has an exit,
it drafts as far as the runtime's adaptive rule, which measures costs and acceptance, predicts a gain; the answers are
the same either way. A quantized bundle is faster, and its answers are those of the quantized model.

A run that was stopped, however hard, continues where it was when it is started again with the same settings, which are
kept in ``OUT.jsonl.settings.json``; only ``--self-prompted`` may grow.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shortstack.graphs import names
from shortstack.graphs.errors import RequestError
from shortstack.runtime.model import Model, load
from shortstack.samples.command import run_command
from shortstack.samples.recipes.self_data_file import RowFile, read_prompts
from shortstack.samples.recipes.self_data_rows import Row, Writer

_ANSWERS_DEPEND_ON = (
    names.WEIGHTS_FILE,
    names.TOKENIZER_FILE,
    names.TOKENIZER_CONFIG_FILE,
    names.CHAT_TEMPLATE_FILE,
    names.GENERATION_CONFIG_FILE,
)


@dataclass(frozen=True, slots=True)
class Summary:
    """What one run did.

    Attributes:
        out: The file.
        rows: Rows in it now.
        made: Rows of this run; the others were there before.
        skipped: Prompts that are longer than allowed.
        ended: Rows of this run whose answer came to an end by itself.
        answer_tokens: Tokens of this run's answers.
        decoded_tokens: Tokens that this run decoded: answers, questions, and questions thrown away.
        elapsed_s: Seconds of this run, loading left out.
    """

    out: str
    rows: int
    made: int
    skipped: int
    ended: int
    answer_tokens: int
    decoded_tokens: int
    elapsed_s: float

    @property
    def tokens_per_s(self) -> float:
        """Decoded tokens per second, prefill and questions included."""
        return self.decoded_tokens / self.elapsed_s if self.elapsed_s > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        return asdict(self) | {"tokens_per_s": self.tokens_per_s}

    def line(self) -> str:
        """Return it for people."""
        if not self.made:
            return f"{self.out}: {self.rows} rows, nothing left to do"
        skipped = f"; prompts left out because they are too long: {self.skipped}" if self.skipped else ""
        return (
            f"{self.out}: {self.rows} rows, new: {self.made} with {self.answer_tokens} tokens of answers "
            f"({self.ended / self.made:.0%} ended by themselves), {self.elapsed_s:.0f} s, "
            f"{self.tokens_per_s:.1f} tokens/s{skipped}"
        )


def write_rows(
    model: Model,
    out: Path,
    prompts: Sequence[str] = (),
    self_prompted: int = 0,
    *,
    max_new_tokens: int = 160,
    max_prompt_tokens: int = 1024,
    seed: int = 0,
    exit_layer: int | None = None,
    overwrite: bool = False,
) -> Summary:
    """Write a file of rows, or continue one.

    Args:
        model: The model.
        out: The file.
        prompts: Prompts to answer.
        self_prompted: How many questions the model asks itself.
        max_new_tokens: Longest answer.
        max_prompt_tokens: Longest prompt, chat template included.
        seed: Fixes the questions.
        exit_layer: The exit that drafts; None takes the lowest, if there is one.
        overwrite: Begin again, whatever is there.

    Raises:
        RequestError: The file was begun with other settings or is damaged, or there is nothing to do.
    """
    for option, value, least in (
        ("--self-prompted", self_prompted, 0),
        ("--max-new-tokens", max_new_tokens, 1),
        ("--max-prompt-tokens", max_prompt_tokens, 1),
        ("--seed", seed, 0),
    ):
        if value < least:
            raise RequestError(option, found=value, expected=f"{least} or more")
    limits = {"max_new_tokens": max_new_tokens, "max_prompt_tokens": max_prompt_tokens, "seed": seed}
    writer = Writer(model, exit_layer=exit_layer, **limits)
    jobs = writer.encode(prompts)
    total = len(jobs) + self_prompted
    if total < 1:
        raise RequestError(
            "there is no prompt to answer" + (f": all {len(prompts)} are too long" if prompts else ""),
            remedy="give --prompts FILE, --self-prompted N or a larger --max-prompt-tokens",
        )
    settings = {"model": model.bundle.manifest.source_name, "model_sha256": _identity(model), **limits}
    settings["prompts_sha256"] = hashlib.sha256(json.dumps(jobs).encode()).hexdigest()
    made: list[Row] = []
    with RowFile(out, settings, overwrite=overwrite) as file, _progress(total, file.rows) as advance:
        started = time.perf_counter()

        def make(index: int) -> Row:
            return writer.answer(jobs[index]) if index < len(jobs) else writer.ask_and_answer(index - len(jobs))

        for row in _in_order(make, range(file.rows, total), model.slots):
            made.append(row)
            file.append(row.to_json())
            advance(row.tokens)
        elapsed_s = time.perf_counter() - started
    return Summary(
        out=str(out),
        rows=file.rows,
        made=len(made),
        skipped=len(prompts) - len(jobs),
        ended=sum(row.answer[-1] in model.tokenizer.eos_token_ids for row in made),
        answer_tokens=sum(len(row.answer) for row in made),
        decoded_tokens=sum(row.tokens for row in made),
        elapsed_s=elapsed_s,
    )


def _in_order(make: Callable[[int], Row], numbers: range, slots: int) -> Iterator[Row]:
    """Yield the rows of some numbers in their order; as many are made at once as the model has slots.

    A row takes several generations, one after the other. So each is made by a thread, and the threads share the runs.
    """
    if slots == 1:
        yield from map(make, numbers)
        return
    with ThreadPoolExecutor(slots) as pool:
        waiting: deque[Future[Row]] = deque()
        try:
            for number in numbers:
                waiting.append(pool.submit(make, number))
                if len(waiting) == 2 * slots:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _identity(model: Model) -> str:
    """Return a hash over all that the answers depend on; not over the graphs, whose exits change no answer."""
    manifest = model.bundle.manifest
    files = {name: manifest.files[name].sha256 for name in _ANSWERS_DEPEND_ON if name in manifest.files}
    content = {"files": files, "dtype": manifest.dtype, "cache": manifest.cache_type, "length": manifest.max_length}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _progress(total: int, done: int) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with a row's tokens; a bar with rows, speed and time left, if stderr is a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("Answering"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:.1f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total, completed=done, speed=0.0)
        started, tokens = time.perf_counter(), 0

        def advance(row_tokens: int) -> None:
            nonlocal tokens
            tokens += row_tokens
            progress.update(task, advance=1, speed=tokens / (time.perf_counter() - started))

        yield advance


@contextlib.contextmanager
def open_model(
    source: str,
    *,
    threads: int | None = None,
    exit_layer: int | None = None,
    adapter: Path | None = None,
    slots: int = 1,
) -> Iterator[Model]:
    """Load a bundle, or export a checkpoint to a temporary one, cut at the exit if there is one, and load that.

    Raises:
        ShortstackError: It is neither, or cannot be exported.
    """
    if (Path(source).expanduser() / names.MANIFEST_FILE).is_file():
        if adapter is not None:
            raise RequestError(f"--adapter merges into a checkpoint, and {source} is a bundle", remedy="drop it")
        yield load(Path(source).expanduser(), threads=threads, slots=slots)
        return
    from shortstack.export.assemble import export_bundle
    from shortstack.export.spec import ExportSpec

    with tempfile.TemporaryDirectory(prefix="shortstack-self-data-") as folder:
        exit_layers = () if exit_layer is None else (exit_layer,)
        bundle = export_bundle(ExportSpec(source, Path(folder) / "bundle", exit_layers, adapter=adapter))
        yield Model(bundle, threads=threads, slots=slots)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--prompts", "prompts_file", type=click.Path(path_type=Path), help="JSON lines, or one prompt a line.")
@click.option("--field", help="The field that holds the prompt.  [default: prompt, question, turns[0] or utterance]")
@click.option("--self-prompted", type=int, default=0, metavar="N", help="Questions that the model asks itself.")
@click.option("--max-new-tokens", "-n", type=int, default=160, help="Longest answer.")
@click.option("--max-prompt-tokens", type=int, default=1024, help="Leave out longer prompts.")
@click.option("--seed", type=int, default=0, help="Fixes the questions that the model asks itself.")
@click.option("--exit-layer", "-e", type=int, metavar="E", help="The exit that drafts; a checkpoint is cut there.")
@click.option("--adapter", type=click.Path(path_type=Path), help="A LoRA adapter to merge into a checkpoint.")
@click.option("--threads", type=int, help="Threads.  [default: all usable cores]")
@click.option("--slots", type=int, default=1, metavar="N", help="How many rows are made at once; they are the same.")
@click.option("--overwrite", is_flag=True, help="Begin again, whatever OUT holds.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def self_data(
    model: str,
    out: Path,
    prompts_file: Path | None,
    field: str | None,
    self_prompted: int,
    max_new_tokens: int,
    max_prompt_tokens: int,
    seed: int,
    exit_layer: int | None,
    adapter: Path | None,
    threads: int | None,
    slots: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write the greedy answers of MODEL (a bundle or a checkpoint) to prompts, as token ids, to OUT; resumable."""
    prompts = [] if prompts_file is None else read_prompts(prompts_file, field)
    if prompts_file is None and self_prompted < 1:
        raise RequestError("there is no prompt to answer", remedy="give --prompts FILE or --self-prompted N")
    with open_model(model, threads=threads, exit_layer=exit_layer, adapter=adapter, slots=slots) as opened:
        summary = write_rows(
            opened,
            out,
            prompts,
            self_prompted,
            max_new_tokens=max_new_tokens,
            max_prompt_tokens=max_prompt_tokens,
            seed=seed,
            exit_layer=exit_layer,
            overwrite=overwrite,
        )
    click.echo(json.dumps(summary.to_json()) if as_json else summary.line())


def main() -> None:
    """Run the command; a known error is one line and its exit code."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # removes a temporary bundle
    run_command(self_data, when_interrupted="stopped; the same command, without --overwrite, continues from here")


if __name__ == "__main__":
    main()
