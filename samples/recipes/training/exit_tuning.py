"""Trains exits on what a frozen model computed, and measures what they are worth: the work behind ``ee_tuning``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shortstack.export.twin.exits import ExitNode, save_exits
from shortstack.export.twin.model import Twin
from shortstack.graphs.errors import RequestError
from shortstack.graphs.plan import ExitSpec
from shortstack.progress import progress_stages
from shortstack.samples.recipes.training.data import Example
from shortstack.samples.recipes.training.draft_cost import Costs, best_outcome, draft_cost
from shortstack.samples.recipes.training.draft_measure import measure_drafts, measure_exit, measure_last
from shortstack.samples.recipes.training.exit_batches import RowOrder, load_spans
from shortstack.samples.recipes.training.exit_loss import ExitLossSpec, exit_loss, weighted_sum
from shortstack.samples.recipes.training.exit_start import Start, new_exit
from shortstack.samples.recipes.training.features import Features, extract_features
from shortstack.samples.recipes.training.loop import History, LoopSpec, StepLoss, run
from shortstack.samples.recipes.training.precision import autocast, is_bf16_fast
from shortstack.samples.recipes.training.report import write_report
from shortstack.samples.recipes.training.schedules import ee_llm_weight
from shortstack.samples.recipes.training.source import Source
from shortstack.samples.recipes.training.stack_loss import ExitVocab

HELD_OUT_EVERY = 10


@dataclass(frozen=True, slots=True)
class ExitWeights:
    """EE-LLM's weight of each exit's loss.

    Attributes:
        final: By exit, in the order of the exits.
        start: Factor on them at step 0; above 1 is a decay.
        warmup_steps: Steps until the factor is 1.
        style: ``linear`` or ``cosine``.
    """

    final: tuple[float, ...]
    start: float
    warmup_steps: int
    style: Literal["linear", "cosine"]

    def at(self, step: int) -> tuple[float, ...]:
        """Return the weights of one step."""
        return tuple(ee_llm_weight(step, self.warmup_steps, self.start * w, w, self.style) for w in self.final)


@dataclass(frozen=True, slots=True)
class TuningSpec:
    """What is trained, without the loop's settings.

    Attributes:
        exits: The exits.
        start: How they start.
        loss: What they are trained for.
        weights: How much each counts.
        batch_size: Rows in a batch.
        drafts: Tokens drafted in a row when measuring.
        costs: Costs for the predicted speed-up.
    """

    exits: tuple[ExitSpec, ...]
    start: Start
    loss: ExitLossSpec
    weights: ExitWeights
    batch_size: int
    drafts: int
    costs: Costs


def tune(
    source: Source,
    rows: Sequence[Example],
    is_held_out: Sequence[bool],
    recipe: TuningSpec,
    loop: LoopSpec | None,
    out: Path,
    settings: Mapping[str, Any],
    features_folder: Path | None = None,
) -> dict[str, Any]:
    """Run the recipe.

    Args:
        source: The model and its tokenizer's files.
        rows: Answers.
        is_held_out: Which rows are never trained on.
        recipe: What is trained.
        loop: How long and how fast; None takes no gradient step.
        out: The run's folder.
        settings: What the run depends on, for its report and for resuming.
        features_folder: Where the model's activations are kept; None keeps them in the run's folder.

    Returns:
        The report, as written to ``report.json``.
    """
    torch.manual_seed(0 if loop is None else loop.seed)
    twin = source.twin.eval().requires_grad_(False)
    depths = tuple(e.exit_layer for e in recipe.exits)
    middles = tuple(e.exit_layer for e in recipe.exits if e.branch == "mlp")
    trained_on = [row for row, held in enumerate(is_held_out) if not held]
    with progress_stages() as stage:
        advance = stage("running the model", sum(len(row.ids) for row in rows))
        features = extract_features(
            twin, rows, is_held_out, features_folder or out / "features", depths, middles=middles, advance=advance
        )
        plain = {e.exit_layer: _plain_exit(source, e, rows, is_held_out) for e in recipe.exits}
        before = {depth: measure_exit(node, twin, features) for depth, node in plain.items()}
        nodes: dict[int, ExitNode] = {}
        for exit_spec in recipe.exits:
            depth = exit_spec.exit_layer
            fitted = 3 * len(trained_on) if exit_spec.sees_state else len(trained_on)
            advance = stage(f"starting exit {depth}", fitted)
            nodes[depth] = new_exit(twin, exit_spec, plain[depth].ids, features, trained_on, recipe.start, advance)
    history = History()
    if loop is not None:
        history = _train(nodes, source, features, trained_on, recipe, loop, out, settings)
    save_exits(out, twin.spec, nodes.values())
    after = {depth: measure_exit(node, twin, features) for depth, node in nodes.items()}
    last = {twin.spec.num_hidden_layers: measure_last(twin, features)}
    report = write_report(out, "EE-Tuning", settings, history, before | last, after | last)
    report["exits"] = [describe(node, twin, features, recipe.drafts, recipe.costs) for node in nodes.values()]
    partial = out / ".report.partial"
    partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, out / "report.json")
    return report


def _train(
    nodes: Mapping[int, ExitNode],
    source: Source,
    features: Features,
    trained_on: Sequence[int],
    recipe: TuningSpec,
    loop: LoopSpec,
    out: Path,
    settings: Mapping[str, Any],
) -> History:
    twin, use_bf16 = source.twin, is_bf16_fast("cpu")
    order = RowOrder(trained_on, recipe.batch_size, loop.seed)
    whole_rows = any(e.branch == "block" for e in recipe.exits)

    def loss_of(step: int, index: int) -> StepLoss:
        batch = load_spans(features, order[index], tuple(nodes), whole_rows=whole_rows)
        with autocast("cpu", use_bf16):
            losses = {depth: exit_loss(node, twin, batch, recipe.loss) for depth, node in nodes.items()}
        weights = dict(zip(nodes, recipe.weights.at(step), strict=True))
        parts = {f"exit {depth}": float(one.loss.detach()) for depth, one in losses.items()}
        return StepLoss(weighted_sum(losses, weights), parts, sum(batch.lengths))

    def measure() -> dict[str, float]:
        return {
            f"exit {depth}, draft {number}": alpha
            for depth, node in nodes.items()
            for number, alpha in enumerate(measure_drafts(node, twin, features, recipe.drafts).alphas, start=1)
        }

    trained = nn.ModuleDict({str(depth): node for depth, node in nodes.items()})
    return run(trained, loss_of, measure, loop, out, settings)


def _plain_exit(source: Source, exit_spec: ExitSpec, rows: Sequence[Example], is_held_out: Sequence[bool]) -> ExitNode:
    """Return the exit that needs no training, with the ids that the trained one will have."""
    node = ExitNode(source.twin.spec, ExitSpec(exit_spec.exit_layer, exit_spec.draft_vocab)).requires_grad_(False)
    if exit_spec.draft_vocab is not None:
        node.head.ids = draft_ids(rows, is_held_out, exit_spec.draft_vocab, source.twin.spec.vocab_size)
    return node


def hold_out(rows: Sequence[Example], file: Path) -> list[bool]:
    """Return which rows are never trained on: the first and every tenth after it.

    Raises:
        RequestError: Nothing is left to train on.
    """
    is_held_out = [index % HELD_OUT_EVERY == 0 for index in range(len(rows))]
    if all(is_held_out):
        raise RequestError(
            f"{file}: too short",
            found=f"{len(rows)} row",
            expected="at least 2, of which the first is held out",
            remedy="make more answers with samples.recipes.self_data",
        )
    return is_held_out


def draft_ids(rows: Sequence[Example], is_held_out: Sequence[bool], size: int, vocab_size: int) -> Tensor:
    """Return the ids that a trimmed head keeps, ascending: the most frequent ones of the answers trained on."""
    said = [i for row, held in zip(rows, is_held_out, strict=True) if not held for i in row.ids[row.start :]]
    return ExitVocab.most_frequent(said, size, vocab_size).ids


def describe(node: ExitNode, twin: Twin, features: Features, drafts: int, costs: Costs) -> dict[str, Any]:
    """Return what one exit is worth as a draft source, as JSON-ready data."""
    exit_spec = node.exit_spec
    found = measure_drafts(node, twin, features, drafts)
    cost = draft_cost(twin.spec, exit_spec, costs)
    return {
        "spec": asdict(exit_spec),
        "parameters": sum(parameter.numel() for parameter in node.parameters()),
        "draft_cost": cost,
        "alphas": found.alphas,
        "fixed_length": asdict(best_outcome(found, cost, costs, (0.0,))),
        "with_threshold": asdict(best_outcome(found, cost, costs)),
    }
