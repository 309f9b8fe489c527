"""How each block type of GGUF files is stored in blocks that the kernels compute with.

=====================================  =========================================  ==================================
types                                  stored as                                  weights
=====================================  =========================================  ==================================
Q4_0                                   int4 symmetric, blocks of 32               the same, bit for bit
Q3_K                                   int4 symmetric, blocks of 16               the same
Q5_0, Q8_0, IQ4_NL, IQ4_XS, MXFP4      int8 symmetric, blocks of 32               the same
IQ2_XXS, IQ3_XXS, IQ3_S, IQ1_S         int8 symmetric, blocks of 32               the same
Q6_K, NVFP4, IQ2_XS, IQ2_S, IQ1_M      int8 symmetric, blocks of 16               the same
TQ1_0, TQ2_0                           int4 symmetric, blocks of 32, 8 a scale    the same
Q4_1, Q4_K                             int4 with offsets, blocks of 32            nearly: offsets are rounded
Q2_K                                   int4 with offsets, blocks of 16            nearly
Q5_1, Q5_K                             int8, blocks of 32                         nearly: zero points are integers
=====================================  =========================================  ==================================

The kernels have codes of 4 and 8 bits, so those of 5 and 6 bits, and the integers of tables and grids, take 8. Q3_K's
have 3 bits and take 4. Scales are float32 and hold the product of a K-quant's two scales. Types with minima need more
than an integer zero point (:mod:`shortstack.export.checkpoint.gguf_minima`); without offsets, they take 8 bits too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from shortstack.export.checkpoint import gguf_codes
from shortstack.export.checkpoint.gguf_codes import Bytes, Unpacked
from shortstack.export.checkpoint.gguf_grids import from_grid
from shortstack.export.checkpoint.gguf_minima import with_minima
from shortstack.export.stacked_blocks import concatenated
from shortstack.graphs.ir.block_tensor import BlockTensor
from shortstack.graphs.precision import BlockFormat


@dataclass(frozen=True, slots=True)
class BlockType:
    """One block type of ggml.

    Attributes:
        unpack: Takes its blocks apart.
        format: The narrowest format that holds them.
        largest_code: Of a type with minima; 0 for a type without, which ``format`` holds exactly.
    """

    unpack: Callable[[Bytes], Unpacked]
    format: BlockFormat
    largest_code: int = 0

    @property
    def is_exact(self) -> bool:
        """Whether ``format`` holds every such block exactly."""
        return self.largest_code == 0

    @property
    def plain_format(self) -> BlockFormat:
        """The narrowest format without offsets that holds them."""
        return BlockFormat(8, self.format.block_size) if self.format.has_offsets else self.format


_INT4 = BlockFormat(4, 32, is_symmetric=True)
_INT4_16 = BlockFormat(4, 16, is_symmetric=True)
_INT8 = BlockFormat(8, 32, is_symmetric=True)
_INT8_16 = BlockFormat(8, 16, is_symmetric=True)
_OFFSETS = BlockFormat(4, 32, has_offsets=True)
_OFFSETS_16 = BlockFormat(4, 16, has_offsets=True)
_ZERO_POINTS = BlockFormat(8, 32)

BLOCK_TYPES: Mapping[str, BlockType] = MappingProxyType(
    {
        "Q4_0": BlockType(gguf_codes.q4_0, _INT4),
        "Q4_1": BlockType(gguf_codes.q4_1, _OFFSETS, largest_code=15),
        "Q5_0": BlockType(gguf_codes.q5_0, _INT8),
        "Q5_1": BlockType(gguf_codes.q5_1, _ZERO_POINTS, largest_code=31),
        "Q8_0": BlockType(gguf_codes.q8_0, _INT8),
        "Q2_K": BlockType(gguf_codes.q2_k, _OFFSETS_16, largest_code=3),
        "Q3_K": BlockType(gguf_codes.q3_k, _INT4_16),
        "Q4_K": BlockType(gguf_codes.q4_k, _OFFSETS, largest_code=15),
        "Q5_K": BlockType(gguf_codes.q5_k, _ZERO_POINTS, largest_code=31),
        "Q6_K": BlockType(gguf_codes.q6_k, _INT8_16),
        "IQ4_NL": BlockType(gguf_codes.iq4_nl, _INT8),
        "IQ4_XS": BlockType(gguf_codes.iq4_xs, _INT8),
        "MXFP4": BlockType(gguf_codes.mxfp4, _INT8),
        "NVFP4": BlockType(gguf_codes.nvfp4, _INT8_16),
        "TQ1_0": BlockType(gguf_codes.tq1_0, _INT4),
        "TQ2_0": BlockType(gguf_codes.tq2_0, _INT4),
        "IQ2_XXS": BlockType(from_grid("IQ2_XXS"), _INT8),
        "IQ2_XS": BlockType(from_grid("IQ2_XS"), _INT8_16),
        "IQ2_S": BlockType(from_grid("IQ2_S"), _INT8_16),
        "IQ3_XXS": BlockType(from_grid("IQ3_XXS"), _INT8),
        "IQ3_S": BlockType(from_grid("IQ3_S"), _INT8),
        "IQ1_S": BlockType(from_grid("IQ1_S"), _INT8),
        "IQ1_M": BlockType(from_grid("IQ1_M"), _INT8_16),
    }
)
"""Every block type that the ``gguf`` package dequantizes, by ggml's name."""

_BYTES_AT_ONCE = 1 << 22


def unpack_blocks(rows: Bytes, kind: str, block_bytes: int, block_format: BlockFormat | None = None) -> BlockTensor:
    """Return a matrix of a GGUF file in blocks.

    Args:
        rows: The matrix's bytes, [rows, blocks * block_bytes].
        kind: A key of BLOCK_TYPES.
        block_bytes: Bytes of a block of the file.
        block_format: The format wanted, the type's own or a wider one; None for the type's own.
    """
    block_type = BLOCK_TYPES[kind]
    chosen = block_type.format if block_format is None else block_format
    step = max(1, _BYTES_AT_ONCE // max(1, rows.shape[1]))
    found = []
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        found.append(_in_format(block_type.unpack(some.reshape(len(some), -1, block_bytes)), block_type, chosen))
    return concatenated(found)


def _in_format(unpacked: Unpacked, block_type: BlockType, block_format: BlockFormat) -> BlockTensor:
    blocks = block_format.blocks(unpacked.codes.shape[1])
    scales = _per_block(unpacked.scales, blocks)
    if unpacked.minima is not None:
        minima = _per_block(unpacked.minima, blocks)
        return with_minima(unpacked.codes, block_type.largest_code, scales, minima, block_format)
    middle = block_format.middle_code
    codes = (unpacked.codes + np.int16(middle)).astype(np.uint8)
    zero_points = None if block_format.is_symmetric else np.full(scales.shape, middle, np.uint8)
    return BlockTensor(block_format, codes, scales, zero_points)


def _per_block(values: npt.NDArray[np.float32], blocks: int) -> npt.NDArray[np.float32]:
    """Return a value for each block of the file as one for each of smaller blocks, [rows, blocks]."""
    return np.repeat(values, blocks // values.shape[1], axis=1)
