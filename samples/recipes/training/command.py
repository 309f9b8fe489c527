"""What the recipes' command lines have in common: model, data, loop, exits, and how a run ends."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from shortstack.command_options import allow_pickle_option
from shortstack.graphs.errors import RequestError
from shortstack.graphs.plan import Branch, Norm
from shortstack.samples.command import command_errors
from shortstack.samples.recipes.training.data import Example, read_examples
from shortstack.samples.recipes.training.loop import LoopSpec
from shortstack.samples.recipes.training.source import Source, open_source


@dataclass(frozen=True, slots=True)
class Common:
    """The options that every recipe has, without the loop's.

    Attributes:
        checkpoint: Where to start.
        adapter: A LoRA adapter to merge first.
        out: The run's folder.
        data: JSON lines to train on.
        held_out: JSON lines to measure on; None takes ``held_out_rows`` off the end of ``data``.
        held_out_rows: How many.
        prompt: Template of a prompt.
        completion: Template of a completion.
        max_tokens: Longer texts are cut.
        batch_size: Texts in one batch.
        device: Where to train; None picks.
        from_scratch: Draw random weights.
        allow_pickle: Read tensors from pickles.
        loop: How long and how fast.
    """

    checkpoint: str
    adapter: Path | None
    out: Path
    data: Path
    held_out: Path | None
    held_out_rows: int
    prompt: str
    completion: str
    max_tokens: int
    batch_size: int
    device: str | None
    from_scratch: bool
    allow_pickle: bool
    loop: LoopSpec

    def source(self) -> Source:
        """Open the model to train; errors as in :func:`open_source`."""
        return open_source(
            self.checkpoint, from_scratch=self.from_scratch, adapter=self.adapter, allow_pickle=self.allow_pickle
        )

    def split(self, source: Source) -> tuple[list[Example], list[Example]]:
        """Read what to train on and what to measure on.

        Raises:
            RequestError: There is too little, or it does not fit the templates.
        """
        read = functools.partial(
            read_examples,
            tokenizer=source.tokenizer,
            prompt=self.prompt,
            completion=self.completion,
            end=source.end,
            max_tokens=self.max_tokens,
        )
        examples = read(self.data)
        if self.held_out is not None:
            return examples, read(self.held_out)[: self.held_out_rows]
        if len(examples) < 2 * self.held_out_rows:
            raise RequestError(
                f"{self.data} is too small to hold {self.held_out_rows} rows out",
                found=f"{len(examples)} rows",
                remedy="lower --held-out-rows, or name a file with --held-out",
            )
        return examples[: -self.held_out_rows], examples[-self.held_out_rows :]

    def settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the run depends on, as plain data without folders."""
        loop = {k: v for k, v in asdict(self.loop).items() if k not in ("save_every", "measure_every")}
        mine = asdict(self) | {"checkpoint": Path(self.checkpoint).name, "data": self.data.name, **loop}
        for name in ("held_out", "adapter"):
            mine[name] = None if mine[name] is None else mine[name].name
        for name in ("loop", "out", "device", "allow_pickle"):
            del mine[name]
        return mine | {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}


_OPTIONS = (
    click.argument("checkpoint"),
    click.argument("out", type=click.Path(path_type=Path, file_okay=False)),
    click.option("--adapter", type=click.Path(path_type=Path), help="Merge this LoRA adapter into CHECKPOINT first."),
    click.option("--data", type=click.Path(path_type=Path), required=True, help="JSON lines to train on."),
    click.option("--held-out", type=click.Path(path_type=Path), help="JSON lines to measure on [the end of --data]."),
    click.option("--held-out-rows", type=click.IntRange(1), default=200, show_default=True, help="Rows to measure on."),
    click.option(
        "--prompt", default="{prompt}\\n", show_default=True, help="Template of a prompt over a row's fields."
    ),
    click.option("--completion", default="{completion}", show_default=True, help="Template of what is learnt."),
    click.option("--max-tokens", type=click.IntRange(2), default=512, show_default=True, help="Longer texts are cut."),
    click.option("--batch-size", type=click.IntRange(1), default=24, show_default=True, help="Texts in one batch."),
    click.option("--steps", type=click.IntRange(1), default=1000, show_default=True, help="Optimizer steps."),
    click.option("--lr", type=click.FloatRange(0, min_open=True), default=3e-4, show_default=True, help="Peak rate."),
    click.option("--warmup-steps", type=click.IntRange(0), default=20, show_default=True, help="Linear warm-up."),
    click.option("--accumulate", type=click.IntRange(1), default=1, show_default=True, help="Batches per step."),
    click.option("--weight-decay", type=click.FloatRange(0), default=0.0, show_default=True, help="Of AdamW."),
    click.option("--save-every", type=click.IntRange(1), default=50, show_default=True, help="Steps between states."),
    click.option(
        "--measure-every", type=click.IntRange(0), default=0, help="Steps between measurements; 0: at the end."
    ),
    click.option("--max-minutes", type=click.FloatRange(0, min_open=True), help="Stop training after this time."),
    click.option("--seed", type=int, default=0, show_default=True, help="Fixes data order and dropout."),
    click.option("--device", help="cpu, cuda, cuda:1, ... [a GPU if there is one]"),
    click.option("--from-scratch", is_flag=True, help="Random weights; CHECKPOINT needs config and tokenizer only."),
    allow_pickle_option,
    click.option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
)


EE_LLM_KINDS: dict[str, tuple[Branch, Norm]] = {
    "embedding": ("none", "none"),
    "norm": ("none", "own"),
    "mlp": ("mlp", "own"),
    "block": ("block", "own"),
}
"""EE-LLM's four exits: what is below the head, and whose norm it has."""

exit_layer_option = click.option(
    "--exit-layer", "exit_layers", type=click.IntRange(1), multiple=True, help="Exit to train; repeatable."
)

_EXIT_WEIGHT_OPTIONS = (
    click.option(
        "--exit-weight",
        "exit_weights",
        type=click.FloatRange(0),
        multiple=True,
        help="Weight of an exit's loss, in the order of the exits [1].",
    ),
    click.option(
        "--weight-start",
        type=click.FloatRange(0),
        default=1.0,
        show_default=True,
        help="Factor on these weights at first: below 1 warms up, above 1 decays.",
    ),
    click.option("--weight-steps", type=click.IntRange(0), default=0, show_default=True, help="Steps until it is 1."),
    click.option("--weight-style", type=click.Choice(["linear", "cosine"]), default="linear", show_default=True),
)


def exit_weight_options(body: Callable[..., Any]) -> Callable[..., Any]:
    """Add EE-LLM's options about the weights of the exits' losses: their values, and how they warm up or decay."""
    for option in reversed(_EXIT_WEIGHT_OPTIONS):
        body = option(body)
    return body


def loss_weights(given: Sequence[float], exits: int) -> tuple[float, ...]:
    """Return the weight of each exit's loss: as given, or 1 each.

    Raises:
        RequestError: There are more or fewer weights than exits.
    """
    weights = tuple(given) or (1.0,) * exits
    if len(weights) != exits:
        raise RequestError("--exit-weight", found=f"{len(weights)} weights", expected=f"one for each of {exits} exits")
    return weights


def recipe_command(body: Callable[..., dict[str, Any]]) -> click.Command:
    """Make a recipe's function a command: it gets ``loop``, ``common`` and its own options, and returns its report."""

    @functools.wraps(body)
    def command(as_json: bool, **options: Any) -> None:
        loop = LoopSpec(
            steps=options.pop("steps"),
            peak_rate=options.pop("lr"),
            **{
                name: options.pop(name)
                for name in (
                    "warmup_steps",
                    "accumulate",
                    "weight_decay",
                    "save_every",
                    "measure_every",
                    "seed",
                    "max_minutes",
                )
            },
        )
        own = {name: options.pop(name) for name in list(options) if name not in Common.__dataclass_fields__}
        for name in ("prompt", "completion"):
            options[name] = options[name].replace("\\n", "\n")
        common = Common(loop=loop, **options)
        with command_errors(f"stopped; the same command continues where {common.out} was last saved"):
            report = body(loop=loop, common=common, **own)
        print_report(report, as_json)

    for option in reversed(_OPTIONS):
        command = option(command)
    return click.command(context_settings={"max_content_width": 120})(command)


def print_report(report: Mapping[str, Any], as_json: bool) -> None:
    """Print a report: as JSON, or as a table of the depths."""
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    table = Table(title=f"{report['recipe']}: {report['tokens']} tokens in {report['training_s']:.0f} s")
    for name in ("after layer", "agreement before", "after", "accuracy before", "after", "perplexity before", "after"):
        table.add_column(name, justify="right")
    for depth, after in report["held_out_after"].items():
        before = report["held_out_before"][depth]
        cells = [f"{q[name]:.3f}" for name in ("agreement", "accuracy", "perplexity") for q in (before, after)]
        table.add_row(depth, *cells)
    Console().print(table)
