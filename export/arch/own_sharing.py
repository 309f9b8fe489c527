"""Lets layers of any family share keys and values: fields of our own in its config, which the recipe kv_sharing writes.

::

    kv_map: [0, 0, 2, 2]       which layer's K,V each layer uses
    windows: [64, 64, 0, 0]    how many positions it sees, 0 for all, where the family's own fields do not say it
    masks_diagonal: true       no layer sees its own position

A layer that uses another one's keys and values has no tensors for its own. A tensor in which a family stacks queries,
keys and values then holds the queries alone. The fields are read after all others of the family. A model that its
family's own fields describe, such as Gemma 4's, is written without them. Llama reads these fields together with others
that mean the same (:mod:`shortstack.export.arch.kv_sharing`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from shortstack.export.arch.architecture import Architecture
from shortstack.export.arch.kv_sharing import read_kv_map, read_windows, sharing_config
from shortstack.export.arch.read_family import remedies
from shortstack.export.checkpoint.config import Config
from shortstack.graphs.errors import CheckpointError, UnsupportedError
from shortstack.graphs.kv_map import identity_kv_map
from shortstack.graphs.spec import ModelSpec

FIELDS = ("kv_map", "windows", "masks_diagonal")


def with_own_sharing(arch: Architecture) -> Architecture:
    """Return a family whose configs may have the fields above."""
    return replace(
        arch,
        read_spec=partial(_read, arch),
        write_config=partial(_write, arch),
        is_in_transformers=partial(_is_in_transformers, arch),
    )


def _read(arch: Architecture, config: Config, *, is_checked: bool = True) -> ModelSpec:
    spec = arch.read_spec(config)
    if not any(name in config for name in FIELDS):
        return spec
    with remedies():
        shared = _shared(config, spec)
        if is_checked and "windows" in config and not _is_read_from(arch, _write(arch, shared), shared):
            raise UnsupportedError(
                f"{config.where('windows')} differs from the fields by which {arch.model_type} also rotates its layers",
                found=list(shared.windows),
                expected=list(spec.windows) or "no window",
                remedy="remove the field",
            )
    return shared


def _shared(config: Config, spec: ModelSpec) -> ModelSpec:
    """Return a model with what the fields above say."""
    if "windows" in config:
        spec = spec.with_windows(read_windows(config, spec.num_hidden_layers))
    masks_diagonal = config.read(bool, "masks_diagonal", False)
    if "kv_map" not in config:
        return replace(spec, masks_diagonal=masks_diagonal)
    kv_map = read_kv_map(config, spec.num_hidden_layers)
    if not _owns_all(spec):
        raise CheckpointError(
            f"{config.where('kv_map')} and other fields say which layers share keys and values",
            found=f"{list(kv_map)} and {list(spec.kv_map)}",
            expected="one of them",
            remedy="remove the field, or take the config from where the model was made",
        )
    try:
        return replace(spec, kv_map=kv_map, masks_diagonal=masks_diagonal)
    except ValueError as error:
        raise UnsupportedError(
            f"{config.where('kv_map')}: {error}",
            remedy="let layers share that have the same heads and rotary embedding",
        ) from None


def _write(arch: Architecture, spec: ModelSpec) -> dict[str, Any]:
    """Return a config with as few fields of our own as describe the model."""
    plain = replace(spec, kv_map=(), masks_diagonal=False)
    own = sharing_config(spec)
    windows = {"windows": own.pop("windows", [0] * spec.num_hidden_layers)}
    usual = arch.write_config(plain) | own
    if not own and not spec.windows:
        return usual
    ways = (arch.write_config(spec), usual, arch.write_config(plain.with_windows(())) | own | windows)
    return next((config for config in ways if _is_read_from(arch, config, spec)), usual)


def _is_read_from(arch: Architecture, config: dict[str, Any], spec: ModelSpec) -> bool:
    """Whether a config describes the layers of a model, and which of them share."""
    try:
        found = _read(arch, Config(config, "config.json"), is_checked=False)
    except CheckpointError:
        return False
    return (found.layers, found.kv_map, found.masks_diagonal) == (spec.layers, spec.kv_map, spec.masks_diagonal)


def _owns_all(spec: ModelSpec) -> bool:
    return spec.kv_map == identity_kv_map(spec.num_hidden_layers)


def _is_in_transformers(arch: Architecture, spec: ModelSpec) -> bool:
    return arch.is_in_transformers(spec) and not any(name in _write(arch, spec) for name in FIELDS)
