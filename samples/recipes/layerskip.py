"""LayerSkip: train a stack so that its lower layers can draft for the whole (https://arxiv.org/abs/2404.16710).

::

    python -m shortstack.samples.recipes.layerskip CHECKPOINT OUT --data train.jsonl --exit-layer 4 --lora-rank 8

Layer dropout that grows with depth, cross-entropy at the last layer and at exits through the shared final norm and
head, a curriculum of which exits count when. Whole model or LoRA, from a checkpoint or from scratch. Two options are
ours: very early exits need many more updates than the last layer, and cost little, so ``--full-depth-every N`` runs
the layers above the deepest exit in one step of N only; and ``--exit-vocab`` trains an exit on the tokens that its
trimmed head will hold.

OUT afterwards::

    adapter/ or model/      for ``shortstack export``: ``--adapter OUT/adapter --exits OUT/adapter``, or OUT/model with
                            ``--exits OUT/model``; an exit is the shared norm and head, or rows of it
    report.json             tokens, time, settings, and the quality of every depth before and after
    training.png
    state.pt                the run itself; the same command continues where it stopped
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import click
import torch
from torch import nn

from shortstack.export.twin.exits import ExitNode, save_exits
from shortstack.export.twin.folder import save_twin
from shortstack.graphs.errors import RequestError
from shortstack.graphs.plan import ExitSpec
from shortstack.graphs.spec import ModelSpec
from shortstack.samples.recipes.training.command import exit_layer_option, recipe_command
from shortstack.samples.recipes.training.data import Batches, Example
from shortstack.samples.recipes.training.loop import LoopSpec, StepLoss, run
from shortstack.samples.recipes.training.low_rank import add_lora, save_adapter
from shortstack.samples.recipes.training.measure import DepthQuality, measure_depths
from shortstack.samples.recipes.training.precision import autocast, is_bf16_fast, pick_device
from shortstack.samples.recipes.training.report import depth_lines, write_report
from shortstack.samples.recipes.training.schedules import Curriculum, ExitCurriculum, Scale, exit_weights, layer_dropout
from shortstack.samples.recipes.training.source import Source
from shortstack.samples.recipes.training.stack_loss import ExitVocab, stack_loss


@dataclass(frozen=True, slots=True)
class LayerSkipSpec:
    """What is trained, without the loop's settings.

    Attributes:
        exit_layers: Exits that are trained, each the number of layers run before it.
        p_max: Layer dropout at the last layer.
        e_scale: Weight of the exits' losses.
        scale: How weights fall with depth.
        curriculum: Which exits count when.
        every: R of the rotational curriculum.
        full_depth_every: One step in this many runs all layers; the others stop at the deepest exit.
        exit_vocab: Rows of the exits' heads in training; None is the whole vocabulary.
        lora_rank: Rank of the adapters; 0 trains all weights.
        lora_rank_below: Their rank below the deepest exit.
        distill: Weight of the original model's logits in the last layer's loss.
        from_scratch: Start from random weights.
        batch_size: Texts in one batch.
        report_layers: Depths that are measured and not trained.
    """

    exit_layers: tuple[int, ...]
    p_max: float
    e_scale: float
    scale: Scale
    curriculum: Curriculum
    every: int
    full_depth_every: int
    exit_vocab: int | None
    lora_rank: int
    lora_rank_below: int
    distill: float
    from_scratch: bool
    batch_size: int
    report_layers: tuple[int, ...] = ()

    @property
    def measured_layers(self) -> tuple[int, ...]:
        """The depths that a report shows, without the last layer."""
        return tuple(sorted({*self.exit_layers, *self.report_layers}))


def train(
    source: Source, examples: Sequence[Example], held_out: Sequence[Example], recipe: LayerSkipSpec, loop: LoopSpec,
    out: Path, device: str, settings: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Run the recipe.

    Args:
        source: The model and its tokenizer's files.
        examples: What to train on.
        held_out: What to measure on.
        recipe: What is trained.
        loop: How long and how fast.
        out: The run's folder.
        device: Where to train.
        settings: What the run depends on, for its report and for resuming.

    Returns:
        The report, as written to ``report.json``.
    """
    torch.manual_seed(loop.seed)
    twin = source.twin
    last = twin.spec.num_hidden_layers
    use_bf16 = is_bf16_fast(device)
    twin.to(device)
    batches = Batches(examples, recipe.batch_size, loop.seed)
    curriculum = ExitCurriculum(recipe.exit_layers, recipe.curriculum, recipe.every, last)
    vocab = None
    if recipe.exit_vocab is not None:
        said = [token for example in examples for token in example.ids[example.start :]]
        vocab = ExitVocab.most_frequent(said, recipe.exit_vocab, twin.spec.vocab_size).to(device)

    def measure() -> dict[int, DepthQuality]:
        ids = None if vocab is None else vocab.ids
        return measure_depths(twin, held_out, recipe.measured_layers, device, use_bf16=use_bf16, exit_ids=ids)

    before = measure()
    teacher = source.copy().to(device).eval().requires_grad_(False) if recipe.distill else None
    lora = None
    if recipe.lora_rank:
        lora = add_lora(twin, recipe.lora_rank, recipe.lora_rank_below, max(recipe.exit_layers, default=0))
        if use_bf16:
            _shrink_frozen(twin)
        twin.to(device)

    def loss_of(step: int, index: int) -> StepLoss:
        batch = batches[index].to(device)
        is_full = step % recipe.full_depth_every == 0
        enabled = curriculum.enabled(step, loop.steps) if is_full else recipe.exit_layers
        weights = exit_weights(last, enabled, recipe.e_scale, recipe.scale)
        if not is_full:
            weights = {depth: 1 / len(enabled) for depth in enabled}
        twin.layer_dropout = layer_dropout(last, recipe.p_max, step / loop.steps, from_scratch=recipe.from_scratch)
        with autocast(device, use_bf16):
            loss, parts = stack_loss(twin, batch, weights, vocab, teacher if is_full else None, recipe.distill)
        return StepLoss(loss, parts, batch.tokens)

    history = run(twin, loss_of, lambda: depth_lines(measure(), last), loop, out, settings)
    after = measure()
    if lora is not None:
        save_adapter(made := out / "adapter", lora, twin, source.name)
    else:
        shutil.rmtree(made := out / "model", ignore_errors=True)
        save_twin(twin, made, source.files)
    if recipe.exit_layers:
        save_exits(made, twin.spec, [_plain_exit(twin.spec, depth, vocab) for depth in recipe.exit_layers])
    return write_report(out, "LayerSkip", settings, history, before, after)


def _plain_exit(spec: ModelSpec, exit_layer: int, vocab: ExitVocab | None) -> ExitNode:
    """Return the exit that was trained: the shared final norm and head, or the rows of it that it learnt."""
    node = ExitNode(spec, ExitSpec(exit_layer, draft_vocab=None if vocab is None else len(vocab.ids)))
    if vocab is not None:
        node.head.ids = vocab.ids
    return node


def _shrink_frozen(twin: nn.Module) -> None:
    """Store frozen matrices in bfloat16, in which they are multiplied anyway."""
    for parameter in twin.parameters():
        if not parameter.requires_grad and parameter.ndim == 2:
            parameter.data = parameter.data.to(torch.bfloat16)


@recipe_command
@exit_layer_option
@click.option("--report-layer", "report_layers", type=click.IntRange(1), multiple=True, help="Measure this depth too.")
@click.option("--p-max", type=click.FloatRange(0, 1), default=0.1, show_default=True, help="Layer dropout at the top.")
@click.option("--e-scale", type=click.FloatRange(0), default=1.0, show_default=True, help="Weight of exits' losses.")
@click.option("--scale", type=click.Choice(["layerskip", "equal"]), default="layerskip", show_default=True,
              help="How exits are weighed: as in the paper, later ones more, or equally.")  # fmt: skip
@click.option("--curriculum", type=click.Choice(["rotational", "gradual", "all"]), default="rotational",
              show_default=True, help="Which exits count in a step.")  # fmt: skip
@click.option(
    "--every", type=click.IntRange(1), default=None, help="R of the rotational curriculum [all exits in turn]."
)
@click.option("--full-depth-every", type=click.IntRange(1), default=1, show_default=True,
              help="Run the layers above the deepest exit in one step of N.")  # fmt: skip
@click.option("--exit-vocab", type=click.IntRange(16), help="Train exits on the N most frequent tokens only.")
@click.option("--lora-rank", type=click.IntRange(0), default=0, show_default=True, help="LoRA; 0 trains all weights.")
@click.option("--lora-rank-below", type=click.IntRange(1), help="Rank below the deepest exit [--lora-rank].")
@click.option("--distill", type=click.FloatRange(0, 1), default=0.0, show_default=True,
              help="Weight of the original model's logits in the last layer's loss.")  # fmt: skip
def main(loop: LoopSpec, common: Any, **options: Any) -> dict[str, Any]:
    """Train CHECKPOINT's stack to exit early; write adapter or model, report and picture to OUT."""
    exits = tuple(sorted(set(options["exit_layers"])))
    source = common.source()
    depth = source.twin.spec.num_hidden_layers
    if any(exit_layer >= depth for exit_layer in (*exits, *options["report_layers"])):
        raise RequestError(
            "--exit-layer or --report-layer",
            found=[*exits, *options["report_layers"]],
            expected=f"below the {depth} layers of the model",
        )
    recipe = LayerSkipSpec(
        exit_layers=exits,
        p_max=options["p_max"],
        e_scale=options["e_scale"],
        scale=cast(Scale, options["scale"]),
        curriculum=cast(Curriculum, options["curriculum"]),
        every=options["every"] or max(len(exits), 1),
        full_depth_every=options["full_depth_every"] if exits else 1,
        exit_vocab=options["exit_vocab"],
        lora_rank=options["lora_rank"],
        lora_rank_below=options["lora_rank_below"] or options["lora_rank"],
        distill=options["distill"],
        from_scratch=common.from_scratch,
        batch_size=common.batch_size,
        report_layers=options["report_layers"],
    )
    examples, held_out = common.split(source)
    device = pick_device(common.device)
    return train(source, examples, held_out, recipe, loop, common.out, device, common.settings(options))


if __name__ == "__main__":
    main()
