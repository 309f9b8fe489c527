"""Writes what a drafter has of its own to weights.data, after the model."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shortstack.export.drafters.drafter import Drafter
from shortstack.export.rope import rope_tables
from shortstack.export.tensors import packed
from shortstack.graphs import names
from shortstack.graphs.drafter_spec import DrafterSpec
from shortstack.graphs.drafter_weights import (
    HEAD_IDS,
    MODEL_NORM,
    drafter_layer_weights,
    drafter_matrices,
    is_rows,
    stored_drafter,
)
from shortstack.graphs.errors import CheckpointError
from shortstack.graphs.ir.block_tensor import nearest
from shortstack.graphs.ir.cast import cast
from shortstack.graphs.ir.finite import check_finite
from shortstack.graphs.ir.weights import WeightStore
from shortstack.graphs.layer_spec import cache_head_dim
from shortstack.graphs.precision import BlockFormat
from shortstack.graphs.spec import DType, ModelSpec

Floats = npt.NDArray[np.float32]
_LAYERS = "layers."


def store_drafter(
    drafter: Drafter,
    model: ModelSpec,
    max_length: int,
    dtype: DType,
    store: WeightStore,
    block_format: BlockFormat | None = None,
) -> None:
    """Write a drafter.

    Args:
        drafter: The drafter.
        model: Its model, which is stored already.
        max_length: Longest context, in positions.
        dtype: Type of what is stored as floats.
        store: Where it goes.
        block_format: How to store its matrices; None as floats.

    Raises:
        CheckpointError: A value is not a finite number.
        UnsupportedError: A value does not fit ``dtype``.
    """
    matrices = drafter_matrices(drafter.spec, model.hidden_size, model.vocab_size)
    for name in own_names(drafter.spec, model):
        value = read_weight(drafter, name)
        if name in matrices and block_format is not None:
            store.add_blocks(name, nearest(value, block_format), dtype)
        else:
            store.add(name, cast(name, stored_floats(name, value), dtype))
    if drafter.spec.has_head_ids:
        store.add(names.drafter_weight(HEAD_IDS), drafter.part(HEAD_IDS))
    if not drafter.spec.features:
        store.alias(names.drafter_weight(MODEL_NORM), names.FINAL_NORM)
    for name, table in drafter_rope_tables(drafter, model, max_length).items():
        store.add(name, cast(name, table, dtype))


def own_names(drafter: DrafterSpec, model: ModelSpec) -> list[str]:
    """Return the names in a bundle of the floats that a drafter has of its own."""
    others = {names.drafter_weight(part) for part in (HEAD_IDS, MODEL_NORM)}
    return [name for name in stored_drafter(drafter, model.hidden_size, model.vocab_size) if name not in others]


def read_weight(drafter: Drafter, name: str) -> Floats:
    """Return a weight of a drafter by its name in a bundle; a matrix [out, in].

    Raises:
        CheckpointError: It cannot be read, or a value is not a finite number.
    """
    part = name.removeprefix(names.drafter_weight(""))
    if part.startswith(_LAYERS):
        number, own = part.removeprefix(_LAYERS).split(".", 1)
        layer, table = int(number), drafter_layer_weights(drafter.spec, int(number))
        roles = {weight.role: drafter.role(layer, weight.role) for weight in table if weight.part == own}
        value = packed(own, table, roles, drafter.spec.layers[layer].attention)
    else:
        value = drafter.part(part)
    check_finite(f"{drafter.checkpoint.source}: {name}", value, CheckpointError, "take a sound drafter")
    return value


def stored_floats(name: str, value: Floats) -> Floats:
    """Return a weight of a drafter as a bundle stores it in floats: matrices turned, but for those of rows."""
    return value.T if value.ndim == 2 and not is_rows(name) else value


def drafter_rope_tables(drafter: Drafter, model: ModelSpec, max_length: int) -> dict[str, Floats]:
    """Return the rotary tables that a drafter has of its own, by name."""
    found: dict[str, Floats] = {}
    for number, rope in enumerate(drafter.spec.ropes, len(model.ropes)):
        tables = rope_tables(rope, max_length, drafter.rope_factors(), max_length)
        extra = (cache_head_dim(rope.head_dim) - rope.head_dim) // 2
        for part, table, fill in zip(names.ROPE_PARTS, tables, (1.0, 0.0), strict=True):
            found[names.rope_table(number, part)] = np.pad(table, ((0, 0), (0, extra)), constant_values=fill)
    return found
