"""Trains a drafter on what a frozen model left of its own answers: the work behind the recipes of drafters."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shortstack.graphs import names
from shortstack.graphs.errors import RequestError
from shortstack.progress import progress_stages
from shortstack.samples.recipes.training.data import Example
from shortstack.samples.recipes.training.draft_cost import Costs, best_outcome
from shortstack.samples.recipes.training.draft_measure import measure_last
from shortstack.samples.recipes.training.drafter_batches import Row, TextOrder, drafted_rows, load_batch
from shortstack.samples.recipes.training.drafter_loss import DrafterLossSpec, drafter_loss, weighted
from shortstack.samples.recipes.training.drafter_measure import alphas_of_rounds, further_draft_cost, measure_drafter
from shortstack.samples.recipes.training.features import Features, extract_features
from shortstack.samples.recipes.training.loop import LoopSpec, StepLoss, run
from shortstack.samples.recipes.training.precision import autocast, is_bf16_fast
from shortstack.samples.recipes.training.report import write_report
from shortstack.samples.recipes.training.source import Source
from shortstack.samples.recipes.training.stack_loss import ExitVocab
from shortstack.samples.recipes.training.trained_drafter import TrainedDrafter

Start = Callable[[Sequence[Features], Sequence[Row]], TrainedDrafter]
"""Makes the drafter to train, from what the model computed and the texts to train on."""


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers of one file.

    Attributes:
        name: The file's name without its ending.
        rows: Training text.
        is_held_out: Which of the rows are for measuring only.
    """

    name: str
    rows: Sequence[Example]
    is_held_out: Sequence[bool]


@dataclass(frozen=True, slots=True)
class DrafterTraining:
    """What is trained, and how it is measured.

    Attributes:
        title: The drafter's kind, for report and picture.
        name: Its folder in the run's folder, and its place in the report.
        depths: The depths of the model's residual stream that it reads.
        start: Makes the drafter, new or read.
        loss: What it is trained for.
        batch_size: Texts in a batch.
        drafts: Tokens drafted in a row when measuring.
        costs: For the predicted speed-up.
    """

    title: str
    name: str
    depths: Sequence[int]
    start: Start
    loss: DrafterLossSpec
    batch_size: int
    drafts: int
    costs: Costs


def train_drafter(
    source: Source,
    answers: Sequence[Answers],
    recipe: DrafterTraining,
    loop: LoopSpec,
    epochs: float | None,
    out: Path,
    settings: Mapping[str, Any],
    features_folder: Path | None = None,
) -> dict[str, Any]:
    """Run the recipe.

    Args:
        source: The model and its tokenizer's files.
        answers: Of each file; rows of the first are held out.
        recipe: What is trained.
        loop: How long and how fast.
        epochs: How often each text is trained on, in place of the loop's steps; None keeps these.
        out: The run's folder.
        settings: What the run depends on, for its report and for resuming.
        features_folder: Where the model's activations are kept; None keeps them in the run's folder.

    Returns:
        The report, as written to ``report.json``.

    Raises:
        RequestError: No answer is long enough.
    """
    torch.manual_seed(loop.seed)
    twin, use_bf16 = source.twin.eval().requires_grad_(False), is_bf16_fast("cpu")
    folder, written = features_folder or out / "features", out / recipe.name
    with progress_stages() as stage:
        advance = stage("running the model", sum(len(row.ids) for own in answers for row in own.rows))
        sets = [
            extract_features(twin, own.rows, own.is_held_out, folder / own.name, recipe.depths, advance=advance)
            for own in answers
        ]
    trained, held = (drafted_rows(sets, held_out=held_out) for held_out in (False, True))
    if not trained or not held:
        raise RequestError(
            "--data has too few answers of two tokens or more",
            found=f"{len(trained)} to train on and {len(held)} held out",
            expected="at least one each",
            remedy="make more answers with samples.recipes.self_data",
        )
    drafter = recipe.start(sets, trained)
    order = TextOrder(sets, trained, recipe.batch_size, loop.seed)
    if epochs is not None:
        loop = _with_steps(loop, max(1, round(epochs * order.per_epoch / loop.accumulate)))

    def loss_of(step: int, index: int) -> StepLoss:
        batch = load_batch(sets, order[index], recipe.depths)
        with autocast("cpu", use_bf16):
            losses = drafter_loss(drafter, twin, batch, recipe.loss)
        parts = {f"draft {number}": float(one.detach()) for number, one in enumerate(losses, start=1)}
        return StepLoss(weighted(losses, recipe.loss.decay), parts, batch.tokens)

    def measure() -> dict[str, float]:
        drafter.write(written)
        with autocast("cpu", use_bf16):
            alphas = measure_drafter(drafter, twin, sets, held, recipe.drafts).alphas
        return {f"draft {number}": alpha for number, alpha in enumerate(alphas, start=1)}

    history = run(drafter.net, loss_of, measure, loop, out, settings)
    drafter.write(written)
    found = describe(drafter, source, sets, held, recipe, use_bf16)
    last = {twin.spec.num_hidden_layers: measure_last(twin, sets[0])}
    return write_report(out, recipe.title, settings, history, last, last, {recipe.name: found})


def describe(
    drafter: TrainedDrafter,
    source: Source,
    sets: Sequence[Features],
    held: Sequence[Row],
    recipe: DrafterTraining,
    use_bf16: bool,
) -> dict[str, Any]:
    """Return what a drafter is and what it is worth, as JSON-ready data."""
    with autocast("cpu", use_bf16):
        found = measure_drafter(drafter, source.twin, sets, held, recipe.drafts)
    cost = further_draft_cost(drafter, source.twin.spec, recipe.costs)
    said = torch.cat([torch.from_numpy(sets[0].targets[_answer(sets[0], row)]).long() for _, row in held])
    return {
        "spec": json.loads(json.dumps(asdict(drafter.net.spec))),
        "parameters": sum(parameter.numel() for parameter in drafter.net.parameters()),
        "coverage": float((drafter.net.row_of[said] >= 0).float().mean()),
        "draft_cost": cost,
        "alphas": found.alphas,
        "alphas_of_rounds": alphas_of_rounds(found),
        "fixed_length": asdict(best_outcome(found, cost, recipe.costs, (0.0,))),
        "with_threshold": asdict(best_outcome(found, cost, recipe.costs)),
    }


def _answer(features: Features, row: int) -> slice:
    return slice(int(features.answer_starts[row]), int(features.starts[row + 1]) - 1)


def draft_vocabulary(answers: Sequence[Answers], size: int, vocab_size: int, end: Sequence[int]) -> Tensor:
    """Return the ids that a drafter drafts, ascending: those that end a text, and the most frequent ones trained on."""
    said = [
        token
        for own in answers
        for row, held in zip(own.rows, own.is_held_out, strict=True)
        if not held
        for token in row.ids[row.start :]
    ]
    said += [token for token in end if token < vocab_size] * (len(said) + 1)
    return ExitVocab.most_frequent(said, size, vocab_size).ids


def end_ids(source: Source) -> tuple[int, ...]:
    """Return all ids that the generation config lets end a text."""
    found = json.loads(source.files.get(names.GENERATION_CONFIG_FILE, b"{}")).get("eos_token_id")
    listed = found if isinstance(found, list) else [found]
    return tuple(token for token in listed if type(token) is int and token >= 0)


def _with_steps(loop: LoopSpec, steps: int) -> LoopSpec:
    return LoopSpec(**{**asdict(loop), "steps": steps})
