"""From a model's tensors to the tensors of weights.data: transposed and cast as the operators take them, each once.

- a projection stored as floats is [in, out], as MatMul takes it; in blocks it is [out, in], as MatMulNBits does.
- the embedding stays [vocab, hidden]: Gather and the head's Gemm both take it so, and a tied head is the same tensor.
- a trimmed exit head is rows of the LM head, in floats or in blocks as that one is; exits share it.
- an exit's own weights are stored like the model's: projections [in, out], heads [rows, in], a block like a layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from shortstack.export.arch.architecture import POSITIONS
from shortstack.export.exit_layer_weights import pack_block
from shortstack.export.rope import rope_tables
from shortstack.export.tensors import Floats, ModelTensors
from shortstack.graphs import names
from shortstack.graphs.errors import CheckpointError
from shortstack.graphs.exit_parts import HEAD_IDS, ROWS, exit_matrices, mlp_norm, stored_parts
from shortstack.graphs.ir.block_tensor import BlockTensor, nearest
from shortstack.graphs.ir.cast import cast
from shortstack.graphs.ir.exit import full_head, uses_unit_norm
from shortstack.graphs.ir.finite import check_finite
from shortstack.graphs.ir.weights import WeightStore
from shortstack.graphs.layer_spec import cache_head_dim
from shortstack.graphs.layer_weights import matrix_parts, stored_shapes
from shortstack.graphs.plan import ExitSpec, SplitPlan
from shortstack.graphs.precision import SPARE_ROWS, BlockFormat
from shortstack.graphs.spec import DType, ModelSpec

ExitWeights = Mapping[str, npt.NDArray[np.generic]]
"""Weights of exits, by :func:`names.exit_weight` of what :func:`exit_parts` lists, matrices [out, in]."""

_STORED_AS_ROWS = (names.EMBED_TOKENS, names.LM_HEAD)


def store_weights(
    tensors: ModelTensors, dtype: DType, max_length: int, store: WeightStore, advance: Callable[[float], None]
) -> None:
    """Write every tensor of the model, exits excluded, to the store.

    Args:
        tensors: Where they come from.
        dtype: Type to store.
        max_length: Longest context, in positions.
        store: Where they go.
        advance: Called with 1 after each layer.

    Raises:
        UnsupportedError: A value does not fit ``dtype``.
    """
    spec = tensors.spec

    def put(name: str, array: Floats) -> None:
        store.add(name, cast(name, array, dtype))

    def put_matrix(name: str) -> None:
        matrix = tensors.matrix(name)
        if isinstance(matrix, BlockTensor):
            store.add_blocks(name, matrix, dtype)
        else:
            put(name, matrix if name in _STORED_AS_ROWS else matrix.T)

    vectors = end_vectors(tensors)
    put_matrix(names.EMBED_TOKENS)
    if names.EMBED_POSITIONS in vectors:
        put(names.EMBED_POSITIONS, vectors.pop(names.EMBED_POSITIONS)())
    for layer in range(spec.num_hidden_layers):
        _store_layer(tensors, layer, put, put_matrix)
        advance(1)
    for name, read in vectors.items():
        put(name, read())
    if not spec.tie_word_embeddings:
        put_matrix(names.LM_HEAD)
    positions = max_length + (SPARE_ROWS if store.formats else 0)  # see Precision.has_spare_row
    for number in range(len(spec.ropes)):
        for name, table in stored_rope_tables(tensors, number, positions, max_length).items():
            put(name, table)


def end_vectors(tensors: ModelTensors) -> dict[str, Callable[[], Floats]]:
    """Return what reads each weight outside the layers that is not a matrix, by its name in a bundle."""
    ends = tensors.spec.ends
    positions = {names.EMBED_POSITIONS: POSITIONS} if ends.learned_positions else {}
    bias = {names.FINAL_NORM_BIAS: "final_norm.bias"} if ends.final_norm.has_bias else {}
    roles = {**positions, names.FINAL_NORM: "final_norm.weight", **bias}
    return {name: functools.partial(tensors.vector, role) for name, role in roles.items()}


def stored_rope_tables(tensors: ModelTensors, number: int, positions: int, max_length: int) -> dict[str, Floats]:
    """Return the tables of a rotary embedding as a bundle stores them, by name.

    Args:
        tensors: The model.
        number: Which rotary embedding.
        positions: Rows of the tables.
        max_length: Longest context, in positions.
    """
    rope = tensors.spec.ropes[number]
    tables = rope_tables(rope, positions, tensors.rope_factors(), max_length)
    extra = (cache_head_dim(rope.head_dim) - rope.head_dim) // 2
    return {
        names.rope_table(number, part): np.pad(table, ((0, 0), (0, extra)), constant_values=fill)
        for part, table, fill in zip(names.ROPE_PARTS, tables, (1.0, 0.0), strict=True)
    }


def _store_layer(
    tensors: ModelTensors, layer: int, put: Callable[[str, Floats], None], put_matrix: Callable[[str], None]
) -> None:
    table, attention = tensors.spec.weights(layer), tensors.spec.layers[layer].attention
    matrices = matrix_parts(table)
    for part in stored_shapes(table, attention):
        name = names.layer_weight(layer, part)
        if part in matrices:
            put_matrix(name)
        else:
            put(name, tensors.layer_vector(part, layer))


def store_exits(
    tensors: ModelTensors,
    plan: SplitPlan,
    weights: ExitWeights,
    dtype: DType,
    store: WeightStore,
    block_format: BlockFormat | None = None,
) -> None:
    """Write what the exits have of their own, after the model.

    Args:
        tensors: Where the LM head comes from.
        plan: The exits.
        weights: Their weights by :func:`names.exit_weight` of what :func:`exit_parts` lists, matrices [out, in];
            ``head.ids`` of every trimmed head.
        dtype: Type of what is stored as floats.
        store: Where the model is already, and where they go.
        block_format: How to store the exits' own matrices; None as floats.

    Raises:
        UnsupportedError: A value does not fit ``dtype``.
    """
    if uses_unit_norm(plan):
        store.add(names.UNIT_NORM, np.ones(tensors.spec.hidden_size, dtype))
    trimmed: dict[tuple[str, bytes], str] = {}
    for exit_spec in plan.exits:
        depth = exit_spec.exit_layer
        matrices = exit_matrices(tensors.spec, exit_spec)
        for part, array in exit_arrays(tensors.spec, exit_spec, weights).items():
            name = names.exit_weight(depth, part)
            if part == HEAD_IDS:
                _store_ids(tensors, exit_spec, np.asarray(array, np.int64), dtype, store, trimmed)
            elif part in matrices and block_format is not None:
                store.add_blocks(name, nearest(array.astype(np.float32, copy=False), block_format), dtype)
            else:
                store.add(name, cast(name, stored_exit_floats(part, array), dtype))
        if exit_spec.branch == "mlp":
            for part, below in mlp_norm(tensors.spec, depth).items():
                store.alias(names.exit_weight(depth, part), names.layer_weight(depth - 1, below))


def exit_arrays(spec: ModelSpec, exit_spec: ExitSpec, weights: ExitWeights) -> dict[str, npt.NDArray[np.generic]]:
    """Return an exit's own weights by the parts of :func:`stored_parts`, matrices [out, in].

    Raises:
        CheckpointError: A value is not a finite number.
    """
    depth, own = exit_spec.exit_layer, dict(weights)
    if exit_spec.branch == "block":
        own |= pack_block(spec, depth, weights)
    found = {part: own[names.exit_weight(depth, part)] for part in stored_parts(spec, exit_spec)}
    for part, array in found.items():
        check_finite(f"the exit after {depth} layers: {part}", array, CheckpointError, "train the exit again")
    return found


def stored_exit_floats(part: str, array: npt.NDArray[np.generic]) -> Floats:
    """Return a weight of an exit as a bundle stores it in floats: matrices turned, but for those of rows."""
    is_turned = array.ndim == 2 and part not in ROWS
    return (array.T if is_turned else array).astype(np.float32, copy=False)


def _store_ids(
    tensors: ModelTensors,
    exit_spec: ExitSpec,
    ids: npt.NDArray[np.int64],
    dtype: DType,
    store: WeightStore,
    known: dict[tuple[str, bytes], str],
) -> None:
    """Write the ids of a trimmed head, and its rows of the LM head if it shares them; equal ones once.

    Args:
        tensors: Where the LM head comes from.
        exit_spec: The exit.
        ids: The rows' token ids.
        dtype: Type of what is stored as floats.
        store: Where they go.
        known: The name under which a part was stored for the same ids; what is stored here is added.
    """
    own_ids = names.exit_weight(exit_spec.exit_layer, HEAD_IDS)
    if (first := known.setdefault((HEAD_IDS, ids.tobytes()), own_ids)) != own_ids:
        store.alias(own_ids, first)
    else:
        store.add(own_ids, ids)
    if exit_spec.head != "shared":
        return
    head, own = full_head(tensors.spec), names.exit_weight(exit_spec.exit_layer, "head.weight")
    if (first := known.setdefault(("head.weight", ids.tobytes()), own)) != own:
        store.alias(own, first)
    elif store.blocks(head) is None:
        store.add(own, store[head].numpy()[ids])
    else:
        matrix = tensors.matrix(head)
        assert isinstance(matrix, BlockTensor)
        store.add_blocks(own, matrix.rows(ids), dtype)
