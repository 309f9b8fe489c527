"""Which tensors of a checkpoint make up each weight of a bundle, and in what order of rows.

A *role* is shortstack's own name for a tensor of a layer, such as ``q_proj.weight``, whatever the checkpoint calls it.
Roles of one part, such as q, k and v, are stacked along their rows. This module holds names and numbers only and reads
no tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shortstack.export.arch.architecture import EMBEDDING, LM_HEAD, Architecture, RopePairs, Source
from shortstack.export.checkpoint.checkpoint import HEAD, names_of_heads
from shortstack.graphs import names
from shortstack.graphs.layer_spec import Attention, Layer, Rope
from shortstack.graphs.layer_weights import Weight, matrix_parts
from shortstack.graphs.spec import ModelSpec

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Piece:
    """Where one role of a layer, or one matrix of the model, comes from.

    Attributes:
        tensor: The tensor of the checkpoint.
        weight: What it is in the layer, None for a matrix outside the layers.
        rows: Which rows of the tensor it is, in which order; None for all, as they are.
        transposed: The tensor is [in, out].
        plus: What is added to each value.
        columns: Which columns of the tensor it is, from and to; None for all.
    """

    tensor: str
    weight: Weight | None = None
    rows: Rows | None = None
    transposed: bool = False
    plus: float = 0.0
    columns: tuple[int, int] | None = None

    def of(self, array: Floats) -> Floats:
        """Return the role's floats, heads not padded, from those of the tensor; columns were chosen already."""
        if self.transposed:
            array = array.T
        if self.rows is not None:
            array = array[self.rows]
        return array + np.float32(self.plus) if self.plus else array


@dataclass(frozen=True, slots=True)
class MatrixSource:
    """Where one matrix [out, in] comes from.

    Attributes:
        pieces: What is stacked along its rows.
        attention: The attention of its layer, for the widths of heads; None for a matrix outside the layers.
    """

    pieces: tuple[Piece, ...]
    attention: Attention | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors of the checkpoint that it is made of."""
        return tuple(dict.fromkeys(piece.tensor for piece in self.pieces))

    @property
    def pads_columns(self) -> bool:
        """Whether heads along its columns are padded, so that blocks along them cannot be kept."""
        is_padded = self.attention is not None and self.attention.cache_head_dim != self.attention.head_dim
        return is_padded and any(piece.weight is not None and piece.weight.column_heads for piece in self.pieces)

    @property
    def keeps_blocks(self) -> bool:
        """Whether blocks along the columns of its tensors stay blocks of it."""
        return not self.pads_columns and not any(
            piece.transposed or piece.plus or piece.columns for piece in self.pieces
        )


def layer_pieces(arch: Architecture, spec: ModelSpec, layer: int) -> dict[str, Piece]:
    """Return where each role of a layer comes from, in the order in which a bundle stores them."""
    own, table = spec.layers[layer], spec.weights(layer)
    rope = None if own.attention.rope is None else spec.ropes[own.attention.rope]
    pieces = {}
    for weight in table:
        source, rows, columns = arch.source(weight.role), None, None
        if source.layers == "rows":
            rows = np.arange(layer * weight.shape[0], (layer + 1) * weight.shape[0])
        elif source.layers == "columns":
            columns = layer * weight.shape[1], (layer + 1) * weight.shape[1]
        else:
            rows = _rows(source, weight, table, own, rope, arch.rope_pairs)
        name = arch.tensor_name(weight.role, layer)
        pieces[weight.role] = Piece(name, weight, rows, source.transposed, source.plus, columns)
    return pieces


def matrix_sources(arch: Architecture, spec: ModelSpec) -> Mapping[str, MatrixSource]:
    """Return the source of each matrix of the model, without its exits, by the matrix's name in a bundle."""

    def whole(role: str) -> MatrixSource:
        return MatrixSource((Piece(arch.tensor_name(role), transposed=arch.source(role).transposed),))

    found = {names.EMBED_TOKENS: whole(EMBEDDING)}
    for layer in range(spec.num_hidden_layers):
        pieces = layer_pieces(arch, spec, layer).values()
        for part in matrix_parts(spec.weights(layer)):
            own = tuple(piece for piece in pieces if piece.weight is not None and piece.weight.part == part)
            found[names.layer_weight(layer, part)] = MatrixSource(own, spec.layers[layer].attention)
    if not spec.tie_word_embeddings:
        found[names.LM_HEAD] = whole(LM_HEAD)
    return found


def rotary_order(rope: Rope, pairs: RopePairs) -> Rows:
    """Return the order that puts the columns of a checkpoint's head as a bundle has them, int64 [head_dim].

    A bundle rotates column i with column i + head_dim / 2, also where a head is rotated in part.
    """
    half, rotated = rope.head_dim // 2, rope.dims // 2
    if rope.scaling.kind == "proportional":  # its checkpoints have this order already
        return np.arange(rope.head_dim)
    first, second = (
        (np.arange(rotated), np.arange(rotated, 2 * rotated))
        if pairs == "halves"
        else (np.arange(0, 2 * rotated, 2), np.arange(1, 2 * rotated, 2))
    )
    middle = 2 * rotated + half - rotated
    return np.concatenate((first, np.arange(2 * rotated, middle), second, np.arange(middle, rope.head_dim)))


def _rows(
    source: Source, weight: Weight, table: tuple[Weight, ...], layer: Layer, rope: Rope | None, pairs: RopePairs
) -> Rows | None:
    rows, is_whole = np.arange(weight.shape[0]), not source.stacked
    if source.stacked:
        role, kind = weight.role.rsplit(".", 1)
        sizes = {own.role: own.shape[0] for own in table}
        stacked = [name for name in source.stacked if f"{name}.{kind}" in sizes]  # queries alone, if K,V are another's
        place = stacked.index(role)
        if source.by_head:
            heads = layer.attention.heads
            count = sizes[f"{role}.{kind}"] // heads
            rows = rows.reshape(heads, count) + (count * ((len(stacked) - 1) * np.arange(heads) + place))[:, None]
            rows = rows.reshape(-1)
        else:
            rows = rows + sum(sizes[f"{name}.{kind}"] for name in stacked[:place])
    if weight.is_rotated and rope is not None:
        order = rotary_order(rope, pairs)
        is_whole = is_whole and bool(np.array_equal(order, np.arange(len(order))))
        rows = rows.reshape(-1, rope.head_dim)[:, order].reshape(-1)
    return None if is_whole else rows


def checkpoint_tensors(
    arch: Architecture, spec: ModelSpec, ends: Mapping[str, Floats], layers: Sequence[Mapping[str, Floats]]
) -> Iterator[tuple[str, Floats]]:
    """Yield the tensors of a checkpoint of a family, by name: what reading its pieces undoes.

    Args:
        arch: The family.
        spec: The model.
        ends: The weights outside the layers, by role.
        layers: The weights of each layer, by role, matrices [out, in], heads not padded.
    """
    for role, value in ends.items():
        source = arch.source(role)
        piece = Piece(arch.tensor_name(role), transposed=source.transposed, plus=source.plus)
        yield piece.tensor, _joined([piece], [value])
    of_all: dict[str, list[Floats]] = {}
    for layer, roles in enumerate(layers):
        by_tensor: dict[str, list[str]] = {}
        pieces = layer_pieces(arch, spec, layer)
        for role, piece in pieces.items():
            by_tensor.setdefault(piece.tensor, []).append(role)
        for tensor, stacked in by_tensor.items():
            if side := arch.source(stacked[0]).layers:
                if side == "same" and layer:  # training makes them differ: the first layer's is taken
                    continue
                of_all.setdefault(f"{side} {tensor}", []).append(roles[stacked[0]])
                continue
            whole = _joined([pieces[role] for role in stacked], [roles[role] for role in stacked])
            heads = len(whole) // spec.layers[layer].attention.head_dim if HEAD in tensor else 1
            yield from zip(names_of_heads(tensor, heads), np.split(whole, heads), strict=True)
    for name, values in of_all.items():
        axis, tensor = name.split(" ")
        yield tensor, np.concatenate(values, axis=int(axis == "columns"))


def _joined(pieces: Sequence[Piece], values: Sequence[Floats]) -> Floats:
    """Put the rows of a tensor back where they came from."""
    first = pieces[0]
    joined = np.empty((sum(map(len, values)), *values[0].shape[1:]), np.float32)
    for piece, value in zip(pieces, values, strict=True):
        joined[slice(None) if piece.rows is None else piece.rows] = value - np.float32(piece.plus)
    return np.ascontiguousarray(joined.T) if first.transposed else joined
