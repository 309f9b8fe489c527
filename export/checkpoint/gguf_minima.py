"""Blocks with a real minimum, weight = scale * code + minimum, in the format that is nearest to them.

An integer zero point holds a minimum only to half a step. Two things bring it nearer:

- **A finer step.** Where codes have room, all codes are multiplied by k and the scale is divided by k. The zero point
  is then a multiple of scale / k. Of several k, each block takes the one that meets its own minimum best.
- **Offsets.** What is left of the minimum becomes the block's offset, if the format has offsets.

Codes stay what they were, apart from the factor k. Only blocks that do not contain zero, which a zero point within the
codes cannot express, are rounded to nearest.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from shortstack.graphs.ir.block_tensor import BlockTensor, nearest
from shortstack.graphs.precision import BlockFormat

Codes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Factors = npt.NDArray[np.int16]


def with_minima(
    codes: npt.NDArray[np.int16], largest_code: int, scales: Floats, minima: Floats, block_format: BlockFormat
) -> BlockTensor:
    """Store blocks with minima.

    Args:
        codes: [rows, width], 0 to ``largest_code``; the width is a multiple of the block size.
        largest_code: At most that of the format.
        scales: [rows, blocks].
        minima: [rows, blocks].
        block_format: The format, asymmetric.

    Returns:
        The matrix. Values that are not finite, as damaged files have them, give scales that are not finite.
    """
    inner, size = replace(block_format, has_offsets=False), block_format.block_size
    rows, width = codes.shape
    blocks = codes.reshape(rows, -1, size)
    with np.errstate(all="ignore"):
        factors, zero_points = _finest(scales, minima, largest_code, block_format)
        steps = (scales / np.maximum(factors, 1)).astype(np.float32)
        stored = (blocks * factors[..., None]).astype(np.uint8)
        left = np.where(factors > 0, minima + zero_points * steps, 0).astype(np.float32)
        if (others := factors == 0).any():
            values = blocks[others] * scales[others][:, None] + minima[others][:, None]
            rounded = nearest(values.astype(np.float32), inner)
            stored[others] = rounded.codes
            steps[others] = rounded.scales[:, 0]
            assert rounded.zero_points is not None
            zero_points[others] = rounded.zero_points[:, 0]
        offsets = nearest(left, inner) if block_format.has_offsets else None
    return BlockTensor(block_format, stored.reshape(rows, width), steps, zero_points, offsets)


def _finest(scales: Floats, minima: Floats, largest_code: int, block_format: BlockFormat) -> tuple[Factors, Codes]:
    """Return the factor k of each block and the zero point that goes with it; k is 0 where no zero point will do."""
    top = block_format.largest_code
    most = top // largest_code
    wanted = -minima / scales  # in steps of the block's own scale; not finite where that is 0
    factors, zero_points = np.zeros(scales.shape, np.int16), np.zeros(scales.shape, np.uint8)
    best = np.full(scales.shape, np.inf, np.float32)
    for factor in range(max(1, most // 2), most + 1):
        exact = wanted * np.float32(factor)
        nearest_integer = np.rint(exact)
        miss = np.abs(exact - nearest_integer) / np.float32(factor)
        is_better = (nearest_integer >= 0) & (nearest_integer <= top) & (miss < best)
        best[is_better] = miss[is_better]
        factors[is_better] = factor
        zero_points[is_better] = nearest_integer[is_better].astype(np.uint8)
    return factors, zero_points
