"""Share keys and values between layers: convert a standard checkpoint to any K,V map, and uptrain it.

::

    python -m shortstack.samples.recipes.kv_sharing CHECKPOINT OUT --data train.jsonl --kv-map pizza-bottom:4

A map is a placement, an alias (``cla:2``, ``lckv:2``, ``yoco``) or a list, see :mod:`shortstack.graphs.kv_map`. Where
some layers are to see only the last W positions, give ``--sliding-window W`` too::

    --kv-map yoco --sliding-window 1024         the self-decoder slides: all layers below the one whose K,V are shared
    --kv-map 0s_1s_2_2 --sliding-window 1024    the marked layers slide, as in LCKV's ``layer_types``

All other layers then see every position, whatever windows CHECKPOINT has; without the option its windows stay.

Where no layer uses K,V of a layer above it, training is that of any model. Where some do (middle and top), their groups
run in passes, most of them without gradient (https://arxiv.org/abs/2410.14442), and a step takes longer. The loss is
cross-entropy at the last layer, and at exits if there are any, through the shared final norm and head.

OUT afterwards::

    model/          ``shortstack export OUT/model BUNDLE``, with ``--exits OUT/model`` if exits were trained
    report.json     tokens, time, settings, map and windows, K,V bytes per token, and the quality of every depth: of the
                    model that it was (``held_out_before``), as converted (``held_out_converted``), as trained
                    (``held_out_after``)
    training.png
    state.pt        the run itself; the same command continues where it stopped
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import click
import torch

from shortstack.export.twin.exits import ExitNode, save_exits
from shortstack.export.twin.folder import check_sharing_is_saved, save_twin
from shortstack.export.twin.model import Passes, Twin
from shortstack.graphs.errors import RequestError
from shortstack.graphs.kv_bytes import kv_bytes_per_token
from shortstack.graphs.kv_map import check_boundaries
from shortstack.graphs.plan import ExitSpec
from shortstack.samples.recipes.training.command import exit_layer_option, loss_weights, recipe_command
from shortstack.samples.recipes.training.data import Batches, Example
from shortstack.samples.recipes.training.kv_convert import KeysValues, parse_sharing, share_keys_values
from shortstack.samples.recipes.training.loop import LoopSpec, StepLoss, run
from shortstack.samples.recipes.training.measure import DepthQuality, measure_depths
from shortstack.samples.recipes.training.precision import autocast, is_bf16_fast, pick_device
from shortstack.samples.recipes.training.report import depth_lines, write_report
from shortstack.samples.recipes.training.schedules import Scale, exit_weights
from shortstack.samples.recipes.training.source import Source
from shortstack.samples.recipes.training.stack_loss import stack_loss

_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class KVSharingSpec:
    """What becomes of the model, without the loop's settings.

    Attributes:
        kv_map: Whose K,V each layer uses.
        keys_values: What a producer's W_K and W_V start as.
        passes: How often iterated groups run in a step.
        exit_layers: Exits that are trained with it, each the number of layers run before it, none inside such a group.
        exit_weights: EE-LLM's weight of each exit's loss, the last layer's being 1; without any, LayerSkip's rules.
        e_scale: LayerSkip's weight of the exits' losses.
        scale: How its weights fall with depth.
        batch_size: Texts in one batch.
        windows: How many positions each layer sees, 0 for all; without any, as many as before.
    """

    kv_map: tuple[int, ...]
    keys_values: KeysValues = "mean"
    passes: Passes = field(default_factory=Passes)
    exit_layers: tuple[int, ...] = ()
    exit_weights: tuple[float, ...] = ()
    e_scale: float = 1.0
    scale: Scale = "layerskip"
    batch_size: int = 24
    windows: tuple[int, ...] = ()

    def loss_weights(self) -> dict[int, float]:
        """Return the weight of each depth's loss."""
        last = len(self.kv_map)
        if self.exit_weights:
            return {**dict(zip(self.exit_layers, self.exit_weights, strict=True)), last: 1.0}
        if not self.exit_layers:
            return {last: 1.0}
        return exit_weights(last, self.exit_layers, self.e_scale, self.scale)


def train(
    source: Source, examples: Sequence[Example], held_out: Sequence[Example], recipe: KVSharingSpec, loop: LoopSpec,
    out: Path, device: str, settings: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Convert and uptrain; arguments and result as those of ``layerskip.train``."""
    torch.manual_seed(loop.seed)
    original = source.twin.to(device).eval()
    twin = share_keys_values(original, recipe.kv_map, recipe.keys_values, recipe.windows)
    check_sharing_is_saved(twin.spec)
    twin.passes = recipe.passes
    last = twin.spec.num_hidden_layers
    use_bf16 = is_bf16_fast(device)
    batches = Batches(examples, recipe.batch_size, loop.seed)
    weights = recipe.loss_weights()

    def measure(model: Twin) -> dict[int, DepthQuality]:
        return measure_depths(model, held_out, recipe.exit_layers, device, use_bf16=use_bf16)

    def loss_of(step: int, index: int) -> StepLoss:
        batch = batches[index].to(device)
        with autocast(device, use_bf16):
            loss, parts = stack_loss(twin, batch, weights, None, None, 0.0)
        return StepLoss(loss, parts, batch.tokens)

    before, converted = measure(original), measure(twin)
    history = run(twin, loss_of, lambda: depth_lines(measure(twin), last), loop, out, settings)
    shutil.rmtree(made := out / "model", ignore_errors=True)
    save_twin(twin, made, source.files)
    if recipe.exit_layers:
        save_exits(made, twin.spec, [ExitNode(twin.spec, ExitSpec(depth)) for depth in recipe.exit_layers])
    extra = {
        "kv_map": list(recipe.kv_map),
        "windows": list(twin.spec.windows),
        "kv_bytes_per_token": {  # in a float32 bundle; one in float16 takes half
            "before": kv_bytes_per_token(original.spec, _FLOAT32_BYTES),
            "after": kv_bytes_per_token(twin.spec, _FLOAT32_BYTES),
        },
        "held_out_converted": {str(depth): quality.to_json() for depth, quality in converted.items()},
    }
    return write_report(out, "KV sharing", settings, history, before, measure(twin), extra)


@recipe_command
@click.option("--kv-map", required=True, help="pizza-bottom:4, cla:2, lckv:2, yoco, 0,0,2,2, ...: whose K,V.")
@click.option("--sliding-window", type=click.IntRange(1),
              help="Positions that sliding layers see: yoco's lower half, or layers marked s (0s_1s_2_2).")  # fmt: skip
@click.option("--keys-values", type=click.Choice(["mean", "target"]), default="mean", show_default=True,
              help="K,V weights that are shared: the mean of all layers that use them, or those of their own layer. "
              "From scratch always the latter.")  # fmt: skip
@click.option("--passes-without-gradient", type=click.IntRange(0), default=Passes().without_gradient, show_default=True,
              help="Of middle and top maps, in a step.")  # fmt: skip
@click.option("--passes-with-gradient", type=click.IntRange(1), default=Passes().with_gradient, show_default=True,
              help="After them; with one, no gradient reaches K,V from the layers below that use them.")  # fmt: skip
@exit_layer_option
@click.option("--exit-weight", "weights", type=click.FloatRange(0), multiple=True,
              help="EE-LLM's weight of an exit's loss, in the order of the exits [LayerSkip's weights].")  # fmt: skip
@click.option("--e-scale", type=click.FloatRange(0), default=1.0, show_default=True, help="Weight of exits' losses.")
@click.option("--scale", type=click.Choice(["layerskip", "equal"]), default="layerskip", show_default=True,
              help="How exits are weighed: as in LayerSkip's paper, later ones more, or equally.")  # fmt: skip
def main(loop: LoopSpec, common: Any, **options: Any) -> dict[str, Any]:
    """Make CHECKPOINT's layers share keys and values, and uptrain it; write model, report and picture to OUT."""
    torch.manual_seed(loop.seed)  # from scratch it draws the weights
    source = common.source()
    layers = source.twin.spec.num_hidden_layers
    kv_map, windows = parse_sharing(options["kv_map"], options["sliding_window"], layers)
    given = options["exit_layers"]
    exit_layers = tuple(sorted(set(given)))
    if any(exit_layer >= layers for exit_layer in exit_layers):
        raise RequestError("--exit-layer", found=list(exit_layers), expected=f"below the {layers} layers of the model")
    check_boundaries(kv_map, exit_layers)
    by_depth = dict(zip(given, loss_weights(options["weights"], len(given)), strict=True)) if options["weights"] else {}
    recipe = KVSharingSpec(
        kv_map=kv_map,
        # the mean of random weights is smaller than a random weight
        keys_values="target" if common.from_scratch else cast(KeysValues, options["keys_values"]),
        passes=Passes(options["passes_without_gradient"], options["passes_with_gradient"]),
        exit_layers=exit_layers,
        exit_weights=tuple(by_depth[depth] for depth in exit_layers if by_depth),
        e_scale=options["e_scale"],
        scale=cast(Scale, options["scale"]),
        batch_size=common.batch_size,
        windows=windows,
    )
    examples, held_out = common.split(source)
    chosen = {"kv_map": list(kv_map), "windows": list(windows) or None, "keys_values": recipe.keys_values}
    settings = common.settings(options | chosen)
    return train(source, examples, held_out, recipe, loop, common.out, pick_device(common.device), settings)


if __name__ == "__main__":
    main()
