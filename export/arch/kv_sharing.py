"""Reads from a Llama-like config which layers share keys and values, and which positions each layer sees.

A config can describe it in two ways::

    kv_map: [0, 0, 2, 2]             the twin's own fields, as in ModelSpec: which layer's K,V each layer uses,
    windows: [64, 64, 0, 0]          how many positions it sees, its own included (0 means all),
    masks_diagonal: true             and whether no layer sees its own position

    num_kv_shared_layers: 2          the fields of Gemma 3n and 4: this many top layers share K,V, and each uses that
    layer_types: [full_attention,    of the nearest layer of its type below all of them;
                  sliding_attention, ...]
    sliding_window: 512              a sliding layer sees this many positions

Gemma 4 can also give its full_attention layers heads of another size and number (``global_head_dim``,
``num_global_key_value_heads``). Here all layers have the same heads, and a config in which they differ is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from shortstack.export.arch.family import FULL, SLIDING
from shortstack.export.arch.layer_types import listed
from shortstack.export.checkpoint.config import LARGEST_SIZE, Config
from shortstack.graphs.errors import CheckpointError, UnsupportedError
from shortstack.graphs.kv_map import identity_kv_map, validate_kv_map
from shortstack.graphs.spec import ModelSpec

_HEADS_OF_FULL_LAYERS = {
    "global_head_dim": ("head_dim", "head_dim"),
    "num_global_key_value_heads": ("num_key_value_heads", "kv_heads"),
}  # the field of all layers, and ours


@dataclass(frozen=True, slots=True)
class Sharing:
    """What a config says about sharing and windows; the names are those of ``ModelSpec``."""

    kv_map: tuple[int, ...]
    windows: tuple[int, ...]
    masks_diagonal: bool = False

    def of(self, spec: ModelSpec) -> ModelSpec:
        """Return the model with this sharing and these windows."""
        return replace(spec.with_windows(self.windows), kv_map=self.kv_map, masks_diagonal=self.masks_diagonal)


def read_sharing(config: Config, spec: ModelSpec) -> Sharing:
    """Read the fields listed at the top of this module; all are optional.

    Args:
        config: The config.
        spec: The model as the rest of the config describes it.

    Raises:
        CheckpointError: A field has the wrong type or length, or contradicts another one.
        UnsupportedError: This version cannot export the type of a layer, or full and sliding layers have different
            heads.
    """
    layers = spec.num_hidden_layers
    _check_heads(config, spec)
    for ours, theirs in (("kv_map", "num_kv_shared_layers"), ("windows", "layer_types")):
        if ours in config and theirs in config:
            raise CheckpointError(f"{config.where(ours)} and {theirs} say the same thing twice", expected="one of them")
    types = listed(config, layers)
    kv_map = read_kv_map(config, layers) if "kv_map" in config else gemma_kv_map(config, types)
    if "windows" in config:
        windows = read_windows(config, layers)
    else:
        window = read_window(config) if SLIDING in types else 0
        windows = tuple(window if kind == SLIDING else 0 for kind in types)
    return Sharing(kv_map, windows, config.read(bool, "masks_diagonal", False))


def sharing_config(spec: ModelSpec) -> dict[str, Any]:
    """Return the twin's own fields that describe a spec; none where nothing is shared."""
    config: dict[str, Any] = {}
    if spec.kv_map != identity_kv_map(spec.num_hidden_layers):
        config["kv_map"] = list(spec.kv_map)
    if spec.windows:
        config["windows"] = list(spec.windows)
    if spec.masks_diagonal:
        config["masks_diagonal"] = True
    return config


def read_kv_map(config: Config, layers: int) -> tuple[int, ...]:
    """Read ``kv_map``; errors as in :func:`read_sharing`."""
    kv_map = config.read_ints("kv_map")
    if len(kv_map) != layers:
        raise _wrong_length(config, "kv_map", len(kv_map), layers)
    try:
        validate_kv_map(kv_map, layers)
    except ValueError as error:
        raise CheckpointError(
            f"{config.where('kv_map')}: {error}",
            found=list(kv_map),
            expected="for each layer one that uses its own K,V",
        ) from None
    return kv_map


def read_windows(config: Config, layers: int) -> tuple[int, ...]:
    """Read ``windows``; errors as in :func:`read_sharing`."""
    windows = config.read_ints("windows")
    if len(windows) != layers:
        raise _wrong_length(config, "windows", len(windows), layers)
    if not 0 <= min(windows) <= max(windows) <= LARGEST_SIZE:
        raise config.wrong("windows", "numbers of positions, 0 for all")
    return windows


def read_window(config: Config, default: int | None = None) -> int:
    """Read ``sliding_window``; errors as in :func:`read_sharing`."""
    key = "sliding_window"
    window = config.read(int, key) if default is None else config.read(int, key, default)
    if not 1 <= window <= LARGEST_SIZE:
        raise config.wrong(key, "a positive number of positions")
    return window


def _check_heads(config: Config, spec: ModelSpec) -> None:
    """Check that full_attention layers have the same heads as the others, since a map may pair any two layers."""
    for key, (of_all, ours) in _HEADS_OF_FULL_LAYERS.items():
        expected = getattr(spec.layers[0].attention, ours)
        if (found := config.read(int, key, expected)) != expected:
            raise UnsupportedError(
                f"{config.where(key)} gives {FULL} layers different key/value heads from the rest",
                found=found,
                expected=f"{of_all} = {expected}, or null",
                remedy="set it to null if the weights of all layers have the same shapes; models in which they differ "
                "cannot be exported",
            )


def gemma_kv_map(config: Config, types: tuple[str, ...]) -> tuple[int, ...]:
    """Read ``num_kv_shared_layers`` as Gemma 3n and 4 mean it; errors as in :func:`read_sharing`."""
    layers = len(types)
    shared = config.read(int, "num_kv_shared_layers", 0)
    if not 0 <= shared < layers:
        raise config.wrong("num_kv_shared_layers", f"0..{layers - 1}, fewer than num_hidden_layers")
    last_of = {kind: layer for layer, kind in enumerate(types[: layers - shared])}
    for layer in range(layers - shared, layers):
        if types[layer] not in last_of:
            raise CheckpointError(
                f"{config.where('num_kv_shared_layers')}: layer {layer} is of type {types[layer]} and shares K,V, but "
                f"no layer of this type is below layer {layers - shared}, the first that shares",
                found=shared,
                expected="a number that leaves one layer of each type",
            )
    return identity_kv_map(layers - shared) + tuple(last_of[kind] for kind in types[layers - shared :])


def _wrong_length(config: Config, key: str, found: int, layers: int) -> CheckpointError:
    return CheckpointError(config.where(key), found=f"{found} entries", expected=f"num_hidden_layers = {layers}")
