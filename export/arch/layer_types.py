"""Which layers of a model see everything, and which slide: the ways in which configs say so.

Each function reads the type of each layer, for :attr:`Family.layer_types`.
"""

from __future__ import annotations

from collections.abc import Callable

from shortstack.export.arch.family import FULL, SLIDING
from shortstack.export.checkpoint.config import Config, not_one_of, positive
from shortstack.graphs.errors import CheckpointError, shortened

LayerTypes = Callable[[Config, int], tuple[str, ...]]


def listed(config: Config, layers: int) -> tuple[str, ...]:
    """Read ``layer_types``; without it, every layer sees everything.

    Raises:
        CheckpointError: It has more or fewer entries than the model has layers.
        UnsupportedError: An entry is another type of layer.
    """
    if "layer_types" not in config:
        return (FULL,) * layers
    types = config.read_strings("layer_types")
    if len(types) != layers:
        where = config.where("layer_types")
        raise CheckpointError(where, found=f"{len(types)} entries", expected=f"num_hidden_layers = {layers}")
    for layer, kind in enumerate(types):
        if kind not in (FULL, SLIDING):
            raise not_one_of(config.where(f"layer_types[{layer}]"), kind, (FULL, SLIDING))
    return types


def listed_or(default: LayerTypes) -> LayerTypes:
    """Return a reader of ``layer_types`` that falls back to another one where the field is absent."""
    return lambda config, layers: listed(config, layers) if "layer_types" in config else default(config, layers)


def every(period: int, key: str | None = "sliding_window_pattern") -> LayerTypes:
    """Return a reader of models in which each ``period``-th layer sees everything and the others slide.

    Args:
        period: The period where no field gives one.
        key: The field of older configs that gives it; None for none.
    """

    def read(config: Config, layers: int) -> tuple[str, ...]:
        found = period if key is None else positive(config, key, period)
        return tuple(SLIDING if (layer + 1) % found else FULL for layer in range(layers))

    return listed_or(read)


def all_slide(default: int | None, *, is_listed: bool = True) -> LayerTypes:
    """Return a reader of models in which all layers slide, unless ``sliding_window`` is null or 0.

    Args:
        default: The window of a config without the field; None for none.
        is_listed: ``layer_types`` wins; otherwise transformers does not read it, and it must say the same.
    """

    def read(config: Config, layers: int) -> tuple[str, ...]:
        window = config.data.get("sliding_window", default)
        types = (FULL if window in (None, 0) else SLIDING,) * layers
        if "layer_types" in config and not is_listed and listed(config, layers) != types:
            raise CheckpointError(
                f"{config.where('layer_types')} contradicts sliding_window",
                found=shortened(repr(config.data["layer_types"]), limit=80),
                expected=f"{types[0]} for all layers, as sliding_window {window} says",
            )
        return types

    return listed_or(read) if is_listed else read


def upper_slide(config: Config, layers: int) -> tuple[str, ...]:
    """Read the layers of Qwen2 and Qwen3: with ``use_sliding_window``, those from ``max_window_layers`` on slide."""
    if "layer_types" in config:
        return listed(config, layers)
    if not config.read(bool, "use_sliding_window", False) or config.data.get("sliding_window", 4096) is None:
        return (FULL,) * layers
    first = config.read(int, "max_window_layers", 28)
    return tuple(SLIDING if layer >= first else FULL for layer in range(layers))
