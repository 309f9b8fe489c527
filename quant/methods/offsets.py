"""Rounding to a format with offsets: with any method, each block may be shifted by any real number.

Blocks are first shifted so that their smallest weight lies on a whole step: a matrix that was stored as GGUF's Q4_1 or
Q4_K before then lies exactly on the integer grid. The mean error that the method leaves in a block becomes its offset.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from shortstack.graphs.ir.block_tensor import BlockTensor, block_ranges, into_blocks, nearest
from shortstack.graphs.precision import BlockFormat
from shortstack.quant.methods import Rounding
from shortstack.quant.methods.rtn import rtn
from shortstack.quant.methods.stats import Floats, InputStats


def with_offsets(
    round_matrix: Rounding, weight: Floats, block_format: BlockFormat, stats: InputStats | None
) -> BlockTensor:
    """Round a matrix [out, in] with a method that does not know offsets, and add them.

    Args:
        round_matrix: The method.
        weight: The matrix; its width is a multiple of the block size.
        block_format: A format with offsets.
        stats: The inputs of the matrix.
    """
    inner = replace(block_format, has_offsets=False)
    x = into_blocks(weight, inner)  # [out, blocks, block_size]
    low, high = block_ranges(x)
    step = (high - low) / np.float32(block_format.largest_code)
    step = np.where(step == 0, np.float32(1), step)
    shift = low - np.rint(low / step) * step  # [out, blocks], within half a step of zero
    base = round_matrix((x - shift[:, :, None]).reshape(weight.shape), inner, stats)
    left = (x - into_blocks(base.dequantize(), inner)).mean(axis=2)
    return BlockTensor(block_format, base.codes, base.scales, base.zero_points, nearest(left, inner))


def rounded_to_nearest(weight: Floats, block_format: BlockFormat) -> BlockTensor:
    """Round a matrix [out, in] to nearest, with offsets where the format has them."""
    return with_offsets(rtn, weight, block_format, None) if block_format.has_offsets else nearest(weight, block_format)
