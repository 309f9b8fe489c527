"""Reads a checkpoint's tensors in the form that the graphs need: q, k and v stacked, heads padded, floats or blocks.

Heads are padded with zeros to a width that the attention kernel takes (:attr:`ModelSpec.cache_head_dim`). Rotary
embedding pairs column i with column i + head_dim / 2, so each half of a head is padded separately.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from shortstack.export.arch.architecture import Architecture
from shortstack.export.checkpoint import Checkpoint
from shortstack.export.checkpoint.checkpoint import ROPE_FACTORS
from shortstack.export.kept_blocks import REQUANTIZED_FORMAT, KeptBlocks
from shortstack.export.sources import MatrixSource, matrix_sources, qkv_heads
from shortstack.graphs.errors import CheckpointError
from shortstack.graphs.ir.block_tensor import BlockTensor, nearest
from shortstack.graphs.ir.finite import check_finite
from shortstack.graphs.spec import ModelSpec

Floats = npt.NDArray[np.float32]
QKV_BIAS = "attn.qkv_proj.bias"
Number = TypeVar("Number", bound=np.generic)


_NOT_FINITE = "take the checkpoint from before its training diverged, or download it again"


class ModelTensors:
    """Reads one model's tensors.

    Args:
        checkpoint: Where the tensors are read from.
        arch: The model's family, which names the tensors.
        spec: The model.
        blocks: Which matrices are wanted in blocks.

    Attributes:
        spec: The model.
    """

    def __init__(self, checkpoint: Checkpoint, arch: Architecture, spec: ModelSpec, blocks: KeptBlocks) -> None:
        self.spec = spec
        self._checkpoint = checkpoint
        self._arch = arch
        self._blocks = blocks
        self._sources = matrix_sources(arch, spec)

    def vector(self, role: str, layer: int | None = None) -> Floats:
        """Return the norm's weight or projection's bias that plays a role."""
        return self._read(self._arch.tensor_name(role, layer))

    def layer_vector(self, part: str, layer: int) -> Floats:
        """Return a norm's weight or a projection's bias of one layer, by part; see :func:`packed_vector`."""
        owns_kv = self.spec.kv_map[layer] == layer
        return packed_vector(part, lambda role: self.vector(role, layer), self.spec, owns_kv=owns_kv)

    def rope_factors(self) -> Floats | None:
        """Return the divisors of the rotary frequencies, [head_dim / 2]; None if the model has none."""
        return self._read(ROPE_FACTORS) if self.spec.rope_scaling.kind == "factors" else None

    def matrix(self, name: str) -> Floats | BlockTensor:
        """Return a matrix [out, in] as it is to be stored.

        Args:
            name: Its name in the bundle.
        """
        source = self._sources[name]
        if name in self._blocks.kept:
            return self._kept(source)
        floats = self._floats(source)
        return nearest(floats, REQUANTIZED_FORMAT) if name in self._blocks.requantized else floats

    def _read(self, tensor: str) -> Floats:
        value = self._checkpoint.tensor(tensor)
        self._check(f"tensor {tensor}", value)
        return value

    def _check(self, what: str, value: npt.NDArray[np.generic]) -> None:
        check_finite(f"{self._checkpoint.source}: {what}", value, CheckpointError, _NOT_FINITE)

    def _floats(self, source: MatrixSource) -> Floats:
        return packed_matrix([self._read(tensor) for tensor in source.tensors], source, self.spec)

    def _kept(self, source: MatrixSource) -> BlockTensor:
        stored = [self._checkpoint.blocks(tensor) for tensor in source.tensors]
        parts = [blocks.read() for blocks in stored if blocks is not None]
        assert len(parts) == len(stored), f"{source.tensors} should be kept in blocks, but are stored as floats"
        for tensor, part in zip(source.tensors, parts, strict=True):
            self._check(f"the scales of tensor {tensor}", part.scales)
        block_format = parts[0].format
        codes, scales = [part.codes for part in parts], [part.scales for part in parts]
        if source.row_heads:
            zero = block_format.middle_code
            codes = [pad_heads(c, n, self.spec, zero) for c, n in zip(codes, source.row_heads, strict=True)]
            scales = [pad_heads(s, n, self.spec) for s, n in zip(scales, source.row_heads, strict=True)]
        return BlockTensor(block_format, np.concatenate(codes), np.concatenate(scales), None)


def packed_matrix(parts: Sequence[Floats], source: MatrixSource, spec: ModelSpec) -> Floats:
    """Stack the tensors that a source lists, in that order, into one matrix [out, in]."""
    if source.row_heads:
        parts = [pad_heads(part, n, spec) for part, n in zip(parts, source.row_heads, strict=True)]
    if source.pads_columns:
        parts = [pad_heads(part.T, source.column_heads, spec).T for part in parts]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def packed_vector(part: str, vector: Callable[[str], Floats], spec: ModelSpec, *, owns_kv: bool = True) -> Floats:
    """Return a norm's weight or a projection's bias of a layer; the biases of q, k and v are stacked like their rows.

    Args:
        part: Its name in :mod:`shortstack.graphs.layer_parts`.
        vector: Reads the tensor of the layer that plays a role.
        spec: The model.
        owns_kv: See :func:`qkv_heads`.
    """
    if part == QKV_BIAS:
        heads = qkv_heads(spec, owns_kv=owns_kv)
        return np.concatenate([pad_heads(vector(f"{role}.bias"), n, spec) for role, n in heads.items()])
    return vector(part.removeprefix("attn.").removeprefix("mlp."))


def pad_heads(array: npt.NDArray[Number], heads: int, spec: ModelSpec, fill: int = 0) -> npt.NDArray[Number]:
    """Pad the leading dimension, heads * head_dim, to heads * cache_head_dim.

    Args:
        array: [heads * head_dim, ...].
        heads: How many heads it holds.
        spec: The model.
        fill: The value to pad with, the one that stands for zero in ``array``.
    """
    extra = (spec.cache_head_dim - spec.head_dim) // 2
    if extra == 0:
        return array
    halves = array.reshape(heads, 2, spec.head_dim // 2, *array.shape[1:])
    padded = np.pad(halves, [(0, 0), (0, 0), (0, extra), *[(0, 0)] * (array.ndim - 1)], constant_values=fill)
    return padded.reshape(heads * spec.cache_head_dim, *array.shape[1:])
