"""What the command lines of drafters' recipes have in common: answers, training-time test, measurement."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from torch import Tensor

from shortstack.graphs.errors import RequestError
from shortstack.graphs.spec import ModelSpec
from shortstack.samples.recipes.training.command import Common
from shortstack.samples.recipes.training.data import read_examples
from shortstack.samples.recipes.training.draft_cost import ROW_COSTS, Costs, read_row_costs
from shortstack.samples.recipes.training.drafter_batches import Row
from shortstack.samples.recipes.training.drafter_loss import DrafterLossSpec
from shortstack.samples.recipes.training.drafter_training import (
    Answers,
    DrafterTraining,
    draft_vocabulary,
    end_ids,
    train_drafter,
)
from shortstack.samples.recipes.training.features import Features
from shortstack.samples.recipes.training.loop import LoopSpec
from shortstack.samples.recipes.training.source import Source
from shortstack.samples.recipes.training.trained_drafter import TrainedDrafter

DRAFT_VOCAB = 8192

_OPTIONS = (
    click.option("--more-data", type=click.Path(path_type=Path), multiple=True,
                 help="Further JSON lines, all of them trained on; repeatable."),
    click.option("--draft-vocab", type=click.IntRange(2), help="Draft the N most frequent ids of the answers [8192]."),
    click.option("--unroll", type=click.IntRange(1), default=3, show_default=True,
                 help="Steps of the training-time test: drafts in a row in training."),
    click.option("--step-decay", type=click.FloatRange(0, 1, min_open=True), default=0.8, show_default=True,
                 help="Weight of a step's loss in that of the step before."),
    click.option("--hard", type=click.FloatRange(0, 1), default=0.0, show_default=True,
                 help="Part of the loss on the model's most likely token alone, not on its distribution."),
    click.option("--regression", type=click.FloatRange(0), default=0.0, show_default=True,
                 help="Weight of the distance between states guessed and true."),
    click.option("--epochs", type=click.FloatRange(0, min_open=True),
                 help="Train on each text so often [as --steps says]."),
    click.option("--features", type=click.Path(path_type=Path), help="Where activations are kept [RUN/features]."),
    click.option("--draft-tokens", type=click.IntRange(1), default=4, show_default=True, help="Drafts to measure."),
    click.option("--row-costs", default=",".join(f"{m}:{c}" for m, c in ROW_COSTS.items()), show_default=True,
                 help="c(M), for the predicted speed-up."),
    click.option("--launch-cost", type=click.FloatRange(0), default=0.0, show_default=True,
                 help="What a run costs besides its weights, in plain steps."),
)  # fmt: skip


def drafter_options(body: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that the recipes of drafters share."""
    for option in reversed(_OPTIONS):
        body = option(body)
    return body


def check_request(common: Common, options: Mapping[str, Any], of_sizes: Sequence[str]) -> Costs:
    """Check the options that need no model, and return the costs that they say.

    Args:
        common: Those of every recipe.
        options: Those of this one.
        of_sizes: Which of them say what a new drafter is.

    Raises:
        RequestError: They do not go together.
    """
    if common.from_scratch:
        raise RequestError("--from-scratch trains a stack", remedy="train it with samples.recipes.ee_llm first")
    if common.held_out is not None:
        raise RequestError("--held-out", expected="--held-out-rows: rows of the end of --data are held out")
    costs = Costs(read_row_costs(options["row_costs"]), options["launch_cost"])
    given = [name for name in of_sizes if options[name]]
    if options["init"] is not None and given:
        flags = {"depths": "depth", "kv_layers": "kv-layer"}
        raise RequestError(
            "--init continues a drafter as it is",
            found=", ".join(f"--{flags.get(name, name.replace('_', '-'))}" for name in given),
            expected="no options that change its sizes",
        )
    return costs


def draft_rows(options: Mapping[str, Any], model: ModelSpec) -> int:
    """Return how many token ids a new drafter drafts.

    Raises:
        RequestError: More than the model has.
    """
    found = min(DRAFT_VOCAB, model.vocab_size) if options["draft_vocab"] is None else options["draft_vocab"]
    if found > model.vocab_size:
        raise RequestError(
            "--draft-vocab", found=found, expected=f"at most the {model.vocab_size} token ids of the model"
        )
    return int(found)


def read_answers(common: Common, more: Sequence[Path], source: Source) -> list[Answers]:
    """Read the answers: those of ``--data`` with the rows held out, then those of each further file.

    Raises:
        RequestError: A file cannot be read or is too small, or two have the same name.
    """
    trained, held = common.split(source)
    answers = [Answers(common.data.stem, [*trained, *held], [False] * len(trained) + [True] * len(held))]
    read = functools.partial(
        read_examples, tokenizer=source.tokenizer, prompt=common.prompt, completion=common.completion,
        end=source.end, max_tokens=common.max_tokens,
    )  # fmt: skip
    for file in more:
        rows = read(file)
        answers.append(Answers(file.stem, rows, [False] * len(rows)))
    found = [own.name for own in answers]
    if len(set(found)) < len(found):
        raise RequestError(
            "--data and --more-data", found=", ".join(found), expected="files of different names: what the model "
            "computes is kept by name",
        )  # fmt: skip
    return answers


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of drafter, and one of it.

    Attributes:
        title: What it is called in report and picture.
        name: Its folder in the run's folder, and its place in the report.
        depths: The depths of the model's residual stream that it reads.
        draft_vocab: How many token ids it drafts.
        kept: The one to continue; None makes a new one.
        make: Makes a new one from the token ids that it drafts, and what it is trained on.
    """

    title: str
    name: str
    depths: Sequence[int]
    draft_vocab: int
    kept: TrainedDrafter | None
    make: Callable[[Tensor, Sequence[Features], Sequence[Row]], TrainedDrafter]


def train(
    source: Source, kind: Kind, costs: Costs, loop: LoopSpec, common: Common, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Train a drafter, and print what it is worth; errors as in :func:`read_answers` and :func:`train_drafter`."""
    answers = read_answers(common, options["more_data"], source)

    def start(sets: Sequence[Features], rows: Sequence[Row]) -> TrainedDrafter:
        if kind.kept is not None:
            return kind.kept
        ids = draft_vocabulary(answers, kind.draft_vocab, source.twin.spec.vocab_size, end_ids(source))
        return kind.make(ids, sets, rows)

    recipe = DrafterTraining(
        title=kind.title,
        name=kind.name,
        depths=kind.depths,
        start=start,
        loss=DrafterLossSpec(options["unroll"], options["step_decay"], options["hard"], options["regression"]),
        batch_size=common.batch_size,
        drafts=options["draft_tokens"],
        costs=costs,
    )
    plain = {name: value for name, value in options.items() if name != "features"} | {
        "init": None if options["init"] is None else str(options["init"]),
        "more_data": [file.name for file in options["more_data"]],
    }
    report = train_drafter(
        source, answers, recipe, loop, options["epochs"], common.out, common.settings(plain), options["features"]
    )
    if not click.get_current_context().params["as_json"]:
        _show(report[recipe.name])
    return report


def _show(found: Mapping[str, Any]) -> None:
    """Print what a drafter is worth."""
    table = Table(title="drafting on held-out answers, speed-ups predicted")
    for name in ("parameters", "cost of a draft", "alpha of draft 1, 2, ...", "fixed length", "with threshold"):
        table.add_column(name, justify="right")
    cells = []
    for kind in ("fixed_length", "with_threshold"):
        policy = found[kind]["policy"]
        sure = f", p >= {policy['threshold']}" if policy["threshold"] else ""
        cells.append(f"{found[kind]['speed_up']:.2f}x ({policy['drafts']} drafts{sure})")
    alphas = " ".join(f"{alpha:.2f}" for alpha in found["alphas"])
    table.add_row(f"{found['parameters'] / 1e6:.1f} M", f"{found['draft_cost']:.3f}", alphas, *cells)
    Console().print(table)
