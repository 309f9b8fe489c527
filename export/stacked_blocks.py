"""Matrices in blocks as they are put together: rows of several, one under the other, in one format; how near they come.

Moving blocks to a wider format is exact. More bits: codes move up with the zero point. Smaller blocks: neighbours share
a scale. Zero points: the middle code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from shortstack.graphs.ir.block_tensor import BlockTensor
from shortstack.graphs.precision import BlockFormat
from shortstack.graphs.spec import DType

Floats = npt.NDArray[np.float32]
_WEIGHTS_AT_ONCE = 1 << 23


def joint_format(formats: Sequence[BlockFormat]) -> BlockFormat:
    """Return the narrowest format that holds matrices of all these formats, which are equal or have no offsets."""
    if len(set(formats)) == 1:
        return formats[0]
    assert not any(block_format.has_offsets or block_format.side_columns for block_format in formats)
    return BlockFormat(
        max(block_format.bits for block_format in formats),
        min(block_format.block_size for block_format in formats),
        is_symmetric=all(block_format.is_symmetric for block_format in formats),
        is_reordered=formats[0].is_reordered,
    )


def widened(tensor: BlockTensor, block_format: BlockFormat) -> BlockTensor:
    """Return a matrix in a wider format, with the same weights.

    Args:
        tensor: The matrix, without offsets and side product.
        block_format: The format that :func:`joint_format` gave for this one and others.
    """
    own = tensor.format
    if own == block_format:
        return tensor
    assert joint_format((own, block_format)) == block_format, f"{own} does not fit into {block_format}"
    width = tensor.codes.shape[1]
    shift = np.uint8(block_format.middle_code - own.middle_code)
    blocks, times = block_format.blocks(width), own.block_size // block_format.block_size
    scales = np.repeat(tensor.scales, times, axis=1)[:, :blocks]
    if block_format.is_symmetric:
        return BlockTensor(block_format, tensor.codes + shift, scales, None, order=tensor.order)
    zero_points = tensor.zero_points
    if zero_points is None:
        zero_points = np.full(tensor.scales.shape, own.middle_code, np.uint8)
    moved = np.repeat(zero_points + shift, times, axis=1)[:, :blocks]
    return BlockTensor(block_format, tensor.codes + shift, scales, moved, order=tensor.order)


def concatenated(parts: Sequence[BlockTensor]) -> BlockTensor:
    """Return matrices of one format, one under the other."""
    return parts[0] if len(parts) == 1 else _joined(parts)


def _joined(parts: Sequence[BlockTensor]) -> BlockTensor:
    zero_points = [part.zero_points for part in parts if part.zero_points is not None]
    offsets = [part.offsets for part in parts if part.offsets is not None]
    return BlockTensor(
        parts[0].format,
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scales for part in parts]),
        np.concatenate(zero_points) if zero_points else None,
        _joined(offsets) if offsets else None,
        order=parts[0].order,
    )


def with_padded_rows(tensor: BlockTensor, pad: Callable[..., npt.NDArray[Any]]) -> BlockTensor:
    """Return a matrix with rows of zeros put in.

    Args:
        tensor: The matrix, without a side product.
        pad: Puts rows of the value ``fill``, by default 0, into an array [rows, ...].
    """
    return BlockTensor(
        tensor.format,
        pad(tensor.codes, fill=tensor.format.middle_code if tensor.zero_points is None else 0),
        pad(tensor.scales),
        None if tensor.zero_points is None else pad(tensor.zero_points),
        None if tensor.offsets is None else with_padded_rows(tensor.offsets, pad),
        order=tensor.order,
    )


def relative_error(tensor: BlockTensor, floats: Floats, dtype: DType = "float32") -> float:
    """Return how far a matrix in blocks is from one in floats: root mean square of the difference over that of floats.

    It is 0 only where every weight is equal.

    Args:
        tensor: The matrix in blocks, [rows, width].
        floats: What it stands for, of the same shape.
        dtype: Type in which a bundle stores its scales.
    """
    step = max(1, _WEIGHTS_AT_ONCE // max(1, floats.shape[1]))
    difference = total = 0.0
    is_same = True
    stored = _with_scales_of(tensor, dtype)
    for start in range(0, len(floats), step):
        wanted = floats[start : start + step]
        found = stored.rows(np.arange(start, start + len(wanted))).dequantize()
        is_same = is_same and bool((found == wanted).all())
        difference += float(np.square(found - wanted, dtype=np.float64).sum())
        total += float(np.square(wanted, dtype=np.float64).sum())
    if is_same:
        return 0.0
    return max(np.finfo(np.float64).tiny, (difference / total) ** 0.5 if total else 1.0)


def _with_scales_of(tensor: BlockTensor, dtype: DType) -> BlockTensor:
    """Return a matrix with its scales as a type of floats holds them."""
    if dtype == "float32":
        return tensor
    with np.errstate(over="ignore"):  # refused when it is stored
        scales = tensor.scales.astype(dtype).astype(np.float32)
    return replace(
        tensor,
        scales=scales,
        offsets=None if tensor.offsets is None else _with_scales_of(tensor.offsets, dtype),
    )
