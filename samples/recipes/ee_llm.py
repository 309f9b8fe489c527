r"""EE-LLM: train a stack and its exits together, all weights (https://arxiv.org/abs/2312.04916).

::

    python -m shortstack.samples.recipes.ee_llm CHECKPOINT OUT --data train.jsonl --exit-layer 6 --exit-layer 12 \
        --exit-weight 0.25 --exit-weight 0.5

The loss is the last layer's cross-entropy plus a weighted sum of the exits'; weights may warm up or decay, and tokens
may be weighed with the exit's own confidence. From a checkpoint, where exits start as copies, or from scratch. For a
frozen model use ``ee_tuning``.

OUT afterwards::

    model/          the checkpoint with its exits: ``shortstack export OUT/model BUNDLE --exits OUT/model``
    report.json     tokens, time, settings, and the quality of every depth before and after
    training.png
    state.pt        the run itself; the same command continues where it stopped
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import torch
from torch import Tensor, nn
from torch.nn import functional

from shortstack.export.twin.exits import ExitNode, save_exits
from shortstack.export.twin.folder import save_twin
from shortstack.export.twin.model import Twin
from shortstack.graphs.errors import RequestError
from shortstack.graphs.plan import ExitSpec
from shortstack.samples.recipes.training.command import (
    EE_LLM_KINDS,
    exit_layer_option,
    exit_weight_options,
    loss_weights,
    recipe_command,
)
from shortstack.samples.recipes.training.data import Batch, Batches, Example
from shortstack.samples.recipes.training.exit_start import copy_from_model
from shortstack.samples.recipes.training.loop import LoopSpec, StepLoss, run
from shortstack.samples.recipes.training.measure import exit_stream, measure_depths
from shortstack.samples.recipes.training.precision import autocast, is_bf16_fast, pick_device
from shortstack.samples.recipes.training.report import depth_lines, write_report
from shortstack.samples.recipes.training.schedules import ee_llm_weight
from shortstack.samples.recipes.training.source import Source


@dataclass(frozen=True, slots=True)
class EELLMSpec:
    """What is trained, without the loop's settings.

    Attributes:
        exits: The exits.
        weights: Weight of each exit's loss; the last layer's is 1.
        weight_start: Factor on these weights at step 0.
        weight_steps: Steps until the factor is 1.
        weight_style: How it goes there.
        is_token_weighted: Weigh each token's exit loss with the exit's top-1 probability, detached.
        batch_size: Texts in one batch.
    """

    exits: tuple[ExitSpec, ...]
    weights: tuple[float, ...]
    weight_start: float
    weight_steps: int
    weight_style: Literal["linear", "cosine"]
    is_token_weighted: bool
    batch_size: int


class StackWithExits(nn.Module):
    """A model and its exits, trained as one."""

    def __init__(self, twin: Twin, exits: Sequence[ExitSpec], *, is_fresh: bool) -> None:
        super().__init__()
        self.twin = twin
        self.exits = nn.ModuleDict({str(spec.exit_layer): _new_exit(twin, spec, is_fresh) for spec in exits})

    def nodes(self) -> dict[int, ExitNode]:
        """Return the exits by depth."""
        return {int(depth): node for depth, node in self.exits.items() if isinstance(node, ExitNode)}


def _new_exit(twin: Twin, spec: ExitSpec, is_fresh: bool) -> ExitNode:
    """Make an exit that starts as EE-LLM's: copied from a trained model, its own random start in a fresh one."""
    node = ExitNode(twin.spec, spec)
    if not is_fresh:
        copy_from_model(node, twin)
    return node


def ee_llm_loss(
    stack: StackWithExits, batch: Batch, weights: Mapping[int, float], *, is_token_weighted: bool
) -> tuple[Tensor, dict[str, float]]:
    """Return L_last + sum_i w_i L_i in nats per token, and its parts by name."""
    twin, nodes = stack.twin, stack.nodes()
    last = twin.spec.num_hidden_layers
    found = twin.boundaries(batch.ids, [*nodes, last])
    loss = functional.cross_entropy(_rows(twin.logits, found[last].hidden, batch), batch.targets)
    parts = {"last": float(loss.detach())}
    for depth, node in nodes.items():
        stream = exit_stream(twin, node, found[depth], batch.ids)
        said = _rows(lambda x, node=node: node.logits(x, twin), stream, batch).log_softmax(-1)
        nats = functional.nll_loss(said, batch.targets, reduction="none")
        parts[f"exit {depth}"] = float(nats.detach().mean())
        if is_token_weighted:
            nats = nats * said.detach().amax(-1).exp()
        loss = loss + weights[depth] * nats.mean()
    return loss, parts


def _rows(logits: Any, stream: Tensor, batch: Batch) -> Tensor:
    found: Tensor = logits(stream.flatten(0, 1)[batch.rows])
    return found.float()  # [rows, vocab]


def train(
    source: Source, examples: Sequence[Example], held_out: Sequence[Example], recipe: EELLMSpec, loop: LoopSpec,
    out: Path, device: str, settings: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Run the recipe; arguments and result as those of ``layerskip.train``."""
    torch.manual_seed(loop.seed)
    last = source.twin.spec.num_hidden_layers
    stack = StackWithExits(source.twin, recipe.exits, is_fresh=bool(settings["from_scratch"])).to(device)
    nodes, depths = stack.nodes(), [spec.exit_layer for spec in recipe.exits]
    use_bf16 = is_bf16_fast(device)
    batches = Batches(examples, recipe.batch_size, loop.seed)

    def measure() -> Any:
        return measure_depths(stack.twin, held_out, depths, device, use_bf16=use_bf16, exits=nodes)

    def loss_of(step: int, index: int) -> StepLoss:
        batch = batches[index].to(device)
        factor = ee_llm_weight(step, recipe.weight_steps, recipe.weight_start, 1.0, recipe.weight_style)
        weights = {depth: factor * weight for depth, weight in zip(depths, recipe.weights, strict=True)}
        with autocast(device, use_bf16):
            loss, parts = ee_llm_loss(stack, batch, weights, is_token_weighted=recipe.is_token_weighted)
        return StepLoss(loss, parts, batch.tokens)

    before = measure()
    history = run(stack, loss_of, lambda: depth_lines(measure(), last), loop, out, settings)
    shutil.rmtree(out / "model", ignore_errors=True)
    save_twin(stack.twin, out / "model", source.files)
    save_exits(out / "model", stack.twin.spec, nodes.values(), dtype="float32")
    return write_report(out, "EE-LLM", settings, history, before, measure())


@recipe_command
@exit_layer_option
@click.option(
    "--kind", type=click.Choice(list(EE_LLM_KINDS)), default="norm", show_default=True, help="Below the head."
)
@click.option(
    "--head",
    type=click.Choice(["shared", "own"]),
    default="shared",
    show_default=True,
    help="Tied to the model's LM head, or untied.",
)
@exit_weight_options
@click.option("--token-weighted", is_flag=True, help="Weigh tokens with the exit's own confidence.")  # fmt: skip
def main(loop: LoopSpec, common: Any, **options: Any) -> dict[str, Any]:
    """Train CHECKPOINT and exits together, all weights; write model, exits, report and picture to OUT."""
    source = common.source()
    layers = source.twin.spec.num_hidden_layers
    exit_layers = tuple(sorted(set(options["exit_layers"])))
    if not exit_layers or exit_layers[-1] >= layers:
        raise RequestError(
            "--exit-layer", found=list(exit_layers), expected=f"at least one, below the {layers} layers of the model"
        )
    branch, norm = EE_LLM_KINDS[options["kind"]]
    recipe = EELLMSpec(
        exits=tuple(ExitSpec(depth, branch=branch, norm=norm, head=options["head"]) for depth in exit_layers),
        weights=loss_weights(options["exit_weights"], len(exit_layers)),
        weight_start=options["weight_start"],
        weight_steps=options["weight_steps"],
        weight_style=options["weight_style"],
        is_token_weighted=options["token_weighted"],
        batch_size=common.batch_size,
    )
    examples, held_out = common.split(source)
    device = pick_device(common.device)
    return train(source, examples, held_out, recipe, loop, common.out, device, common.settings(options))


if __name__ == "__main__":
    main()
