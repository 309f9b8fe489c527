"""Reads a checkpoint's tensors in the form that the graphs need: q, k and v stacked, heads padded, floats or blocks.

Heads are padded with zeros to a width that the attention kernel takes (:attr:`Attention.cache_head_dim`). Rotary
embedding pairs column i with column i + head_dim / 2, so each half of a head is padded separately.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count, takewhile
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from shortstack.export.arch.architecture import Architecture
from shortstack.export.checkpoint import Checkpoint
from shortstack.export.checkpoint.checkpoint import HEAD, ROPE_FACTORS, read_part, reads_parts
from shortstack.export.kept_blocks import REQUANTIZED_FORMAT, KeptBlocks
from shortstack.export.sources import MatrixSource, Piece, layer_pieces, matrix_sources
from shortstack.export.stacked_blocks import concatenated, relative_error, with_padded_rows
from shortstack.graphs import names
from shortstack.graphs.errors import CheckpointError
from shortstack.graphs.ir.block_tensor import BlockTensor, nearest
from shortstack.graphs.ir.finite import check_finite
from shortstack.graphs.ir.heads import padded_share
from shortstack.graphs.layer_spec import Attention
from shortstack.graphs.layer_weights import Weight, table_parts
from shortstack.graphs.precision import BlockFormat
from shortstack.graphs.spec import DType, ModelSpec

Floats = npt.NDArray[np.float32]
Number = TypeVar("Number", bound=np.generic)


_NOT_FINITE = "take the checkpoint from before its training diverged, or download it again"


class ModelTensors:
    """Reads one model's tensors.

    Args:
        checkpoint: Where the tensors are read from.
        arch: The model's family, which names the tensors.
        spec: The model.
        blocks: Which matrices are wanted in blocks.
        dtype: Type in which a bundle stores the scales of blocks.

    Attributes:
        spec: The model.
        errors: How far each matrix that was read in blocks is from the checkpoint's, as
            :func:`~shortstack.export.stacked_blocks.relative_error` measures it, by name in the bundle.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        arch: Architecture,
        spec: ModelSpec,
        blocks: KeptBlocks,
        dtype: DType = "float32",
    ) -> None:
        self.spec = spec
        self.errors: dict[str, float] = {}
        self._dtype = dtype
        self._checkpoint = checkpoint
        self._arch = arch
        self._blocks = blocks
        self._sources = matrix_sources(arch, spec)
        self._whole: tuple[str, Floats] | None = None  # the last of which rows were asked for and could not be read so
        self._stacked_tensor: tuple[str, Floats] | None = None  # the last that holds several roles, which follow

    def vector(self, role: str) -> Floats:
        """Return the weight outside the layers that plays a role."""
        source = self._arch.source(role)
        return self.piece(Piece(self._arch.tensor_name(role), transposed=source.transposed, plus=source.plus))

    def layer_roles(self, layer: int) -> dict[str, Floats]:
        """Return all weights of a layer by role, as its formula has them: heads not padded, matrices [out, in]."""
        return {role: self.piece(piece) for role, piece in layer_pieces(self._arch, self.spec, layer).items()}

    def layer_vector(self, part: str, layer: int) -> Floats:
        """Return a norm's weight or a projection's bias of one layer, by part, as a bundle stores it."""
        pieces = layer_pieces(self._arch, self.spec, layer)
        roles = {
            role: piece for role, piece in pieces.items() if piece.weight is not None and piece.weight.part == part
        }
        found = {role: self.piece(piece) for role, piece in roles.items()}
        return packed(part, self.spec.weights(layer), found, self.spec.layers[layer].attention)

    def rope_factors(self) -> Floats | None:
        """Return the divisors of the rotary frequencies, [head_dim / 2]; None if the model has none."""
        has_factors = any(rope.scaling.kind == "factors" for rope in self.spec.ropes)
        return self._read(ROPE_FACTORS) if has_factors else None

    def matrix(self, name: str) -> Floats | BlockTensor:
        """Return a matrix [out, in] as it is to be stored.

        Args:
            name: Its name in the bundle.
        """
        source = self._sources[name]
        if name in self._blocks.kept:
            blocks = self._kept(source, self._blocks.formats[name])
            if name not in self.errors:
                self.errors[name] = relative_error(blocks, self._floats(source), self._dtype)
            return blocks
        floats = self._floats(source)
        if name not in self._blocks.requantized:
            return floats
        blocks = nearest(floats, REQUANTIZED_FORMAT)
        self.errors[name] = relative_error(blocks, floats, self._dtype)
        return blocks

    def rows(self, name: str, start: int, end: int) -> Floats:
        """Return some rows of a matrix whose rows are looked up or judged, without the others if that can be.

        Args:
            name: Its name in the bundle: the embedding, the LM head, or a table of a layer.
            start: The first row.
            end: The row after the last one.
        """
        piece = self._table_piece(name)
        columns = slice(None) if piece.columns is None else slice(*piece.columns)
        is_whole = piece.rows is None and not piece.transposed and not piece.plus
        if is_whole and reads_parts(self._checkpoint, piece.tensor):
            value = read_part(self._checkpoint, piece.tensor, slice(start, end), columns)
            self._check(f"tensor {piece.tensor}", value)
            return value
        if self._whole is None or self._whole[0] != name:
            self._whole = name, self.piece(piece)
        return np.ascontiguousarray(self._whole[1][start:end])

    def _table_piece(self, name: str) -> Piece:
        if name in self._sources:
            return self._sources[name].pieces[0]
        layer, part = next(
            (layer, part)
            for layer in range(self.spec.num_hidden_layers)
            for part in table_parts(self.spec.weights(layer))
            if names.layer_weight(layer, part) == name
        )
        pieces = layer_pieces(self._arch, self.spec, layer).values()
        return next(piece for piece in pieces if piece.weight is not None and piece.weight.part == part)

    def piece(self, piece: Piece) -> Floats:
        """Return the floats of one role, heads not padded."""
        if piece.columns is not None:
            return self._columns(piece.tensor, *piece.columns)
        return piece.of(self._read(piece.tensor) if piece.rows is None else self._read_stacked(piece.tensor))

    def _read(self, tensor: str) -> Floats:
        if HEAD in tensor:
            present = self._checkpoint.names()
            parts = takewhile(present.__contains__, (tensor.replace(HEAD, str(head)) for head in count()))
            return np.concatenate([self._read(part) for part in parts])
        value = self._checkpoint.tensor(tensor)
        self._check(f"tensor {tensor}", value)
        return value

    def _read_stacked(self, tensor: str) -> Floats:
        """Read a tensor of which other rows may be asked for next."""
        if self._stacked_tensor is None or self._stacked_tensor[0] != tensor:
            self._stacked_tensor = tensor, self._read(tensor)
        return self._stacked_tensor[1]

    def _columns(self, tensor: str, start: int, end: int) -> Floats:
        """Return columns of a tensor that may be too large to be read as a whole."""
        value = read_part(self._checkpoint, tensor, slice(None), slice(start, end))
        self._check(f"tensor {tensor}", value)
        return value

    def _check(self, what: str, value: npt.NDArray[np.generic]) -> None:
        check_finite(f"{self._checkpoint.source}: {what}", value, CheckpointError, _NOT_FINITE)

    def _floats(self, source: MatrixSource) -> Floats:
        weights = [piece.weight for piece in source.pieces]
        return _stacked([self.piece(piece) for piece in source.pieces], weights, source.attention)

    def _kept(self, source: MatrixSource, block_format: BlockFormat) -> BlockTensor:
        parts = []
        for piece in source.pieces:
            stored = self._checkpoint.blocks(piece.tensor)
            assert stored is not None, f"{piece.tensor} should be kept in blocks, but is stored as floats"
            part = stored.in_format(block_format)
            self._check(f"the scales of tensor {piece.tensor}", part.all_scales())
            if piece.rows is not None:
                part = part.rows(piece.rows)
            pad = partial(_padded, weight=piece.weight, attention=source.attention)
            parts.append(with_padded_rows(part, pad))
        return concatenated(parts)


def packed(part: str, table: Sequence[Weight], roles: Mapping[str, Floats], attention: Attention) -> Floats:
    """Return a part of a layer as a bundle stores it, matrices [out, in].

    Args:
        part: Its name in :mod:`shortstack.graphs.layer_weights`.
        table: The layer's weights.
        roles: Their values, heads not padded; those of this part are enough.
        attention: The layer's attention.
    """
    own = [weight for weight in table if weight.part == part]
    return _stacked([roles[weight.role] for weight in own], own, attention)


def _stacked(arrays: Sequence[Floats], weights: Sequence[Weight | None], attention: Attention | None) -> Floats:
    found = [
        _padded(_padded_columns(array, weight, attention), weight, attention)
        for array, weight in zip(arrays, weights, strict=True)
    ]
    return found[0] if len(found) == 1 else np.concatenate(found)


def _padded_columns(array: Floats, weight: Weight | None, attention: Attention | None) -> Floats:
    if weight is None or attention is None or not weight.column_heads:
        return array
    return pad_heads(array.T, weight.column_heads, attention).T


def _padded(
    array: npt.NDArray[Number], weight: Weight | None, attention: Attention | None, fill: int = 0
) -> npt.NDArray[Number]:
    """Pad the heads along the rows of a weight; the weights of a norm over heads make up for the padding."""
    if weight is None or attention is None or not weight.row_heads:
        return array
    if weight.is_norm and attention.cache_head_dim != attention.head_dim:
        share = np.asarray(padded_share(attention) ** 0.5, array.dtype)
        array = np.asarray(array * share, array.dtype)
    return pad_heads(array, weight.row_heads, attention, fill)


def pad_heads(array: npt.NDArray[Number], heads: int, attention: Attention, fill: int = 0) -> npt.NDArray[Number]:
    """Pad the leading dimension, heads * head_dim, to heads * cache_head_dim.

    Args:
        array: [heads * head_dim, ...].
        heads: How many heads it holds.
        attention: The widths.
        fill: The value to pad with, the one that stands for zero in ``array``.
    """
    extra = (attention.cache_head_dim - attention.head_dim) // 2
    if extra == 0:
        return array
    halves = array.reshape(heads, 2, attention.head_dim // 2, *array.shape[1:])
    padded = np.pad(halves, [(0, 0), (0, 0), (0, extra), *[(0, 0)] * (array.ndim - 1)], constant_values=fill)
    return padded.reshape(heads * attention.cache_head_dim, *array.shape[1:])


def unpad_heads(array: npt.NDArray[Number], heads: int, attention: Attention) -> npt.NDArray[Number]:
    """Take out of [heads * cache_head_dim, ...] what :func:`pad_heads` put in."""
    if attention.cache_head_dim == attention.head_dim:
        return array
    halves = array.reshape(heads, 2, attention.cache_head_dim // 2, *array.shape[1:])[:, :, : attention.head_dim // 2]
    return halves.reshape(heads * attention.head_dim, *array.shape[1:])


def unpacked(weights: Sequence[Weight], whole: Floats, attention: Attention) -> dict[str, Floats]:
    """Return the roles of one part of a layer, heads not padded: what :func:`packed` has put together.

    Args:
        weights: The weights of the part.
        whole: The part as a bundle stores it, matrices [out, in].
        attention: The layer's attention.
    """
    found, start = {}, 0
    for weight in weights:
        rows = weight.row_heads * attention.cache_head_dim or weight.shape[0]
        piece, start = whole[start : start + rows], start + rows
        if weight.row_heads:
            piece = unpad_heads(piece, weight.row_heads, attention)
            if weight.is_norm:
                piece = piece / np.float32(padded_share(attention) ** 0.5)
        if weight.column_heads:
            piece = unpad_heads(piece.T, weight.column_heads, attention).T
        found[weight.role] = piece
    return found
