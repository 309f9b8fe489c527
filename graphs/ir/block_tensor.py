"""A weight matrix in blocks of small integers: packing as MatMulNBits and GatherBlockQuantized read it, and rounding.

::

    codes       uint8 [rows, width]                one code each, 0 .. 2^bits - 1
    packed      uint8 [rows, blocks, block_bytes]  8 / bits codes a byte, the first one in the lowest bits
    scales      float [rows, blocks]
    zero points uint8 [rows, blocks]               packed along blocks in the same way; absent when symmetric

The left factor of a side product and offsets (graphs/precision.py) are matrices of their own here, [rows, side columns]
and [rows, blocks], in blocks of the same kind; packed, their blocks stand behind those of the weights, in this order.

The columns of a reordered matrix stand in the order in which it reads its input (graphs/precision.py).

Rows are outputs (N), width is the input dimension (K); a last, shorter block is padded with the code of zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shortstack.graphs.precision import BlockFormat

Codes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Order = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Side:
    """A side product, left @ right.

    Attributes:
        left: [rows, side columns], in blocks of the matrix's own kind.
        right: [side columns, width], in blocks; shared by all matrices of one input.
    """

    left: BlockTensor
    right: BlockTensor

    def dequantize(self) -> Floats:
        """Return the product, float32 [rows, width]."""
        return self.left.dequantize() @ self.right.dequantize()


@dataclass(frozen=True, slots=True)
class BlockTensor:
    """One matrix in blocks.

    Attributes:
        format: Bits, block size, symmetry.
        codes: uint8 [rows, width].
        scales: float32 [rows, blocks]; may be negative.
        zero_points: uint8 [rows, blocks]; None when symmetric.
        offsets: A matrix [rows, blocks]; None where the format has none.
        side: The side product; None where the format has none.
        order: The input that each column multiplies, int64 [width]; None where columns stand as their inputs do.
    """

    format: BlockFormat
    codes: Codes
    scales: Floats
    zero_points: Codes | None
    offsets: BlockTensor | None = None
    side: Side | None = None
    order: Order | None = None

    def __post_init__(self) -> None:
        rows, width = self.codes.shape
        shape = (rows, self.format.blocks(width))
        assert self.scales.shape == shape, f"scales {self.scales.shape}, not {shape}"
        assert (self.zero_points is None) == self.format.is_symmetric
        assert self.zero_points is None or self.zero_points.shape == shape
        assert (self.offsets is not None) == self.format.has_offsets
        assert self.offsets is None or (self.offsets.shape == shape and width % self.format.block_size == 0)
        assert (self.side is not None) == bool(self.format.side_columns)
        if self.side is not None:
            assert self.side.left.shape == (rows, self.format.side_columns)
            assert width % self.format.block_size == 0
            assert self.side.right.shape == (self.format.side_columns, width)
        assert (self.order is not None) == self.format.is_reordered
        assert self.order is None or self.order.shape == (width,)

    @property
    def further(self) -> list[BlockTensor]:
        """What stands behind the weights, in this order."""
        found = [] if self.side is None else [self.side.left]
        return found if self.offsets is None else [*found, self.offsets]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and width of the matrix."""
        return self.codes.shape

    def dequantize(self) -> Floats:
        """Return scale * (code - zero_point) + offset, and the side product on top, float32 [rows, width].

        Columns stand as the inputs do.
        """
        width = self.codes.shape[1]
        codes = self.codes.astype(np.float32)
        if self.zero_points is None:
            codes -= float(self.format.middle_code)
        else:
            codes -= _spread(self.zero_points, self.format, width).astype(np.float32)
        codes *= _spread(self.scales, self.format, width)
        if self.offsets is not None:
            codes += _spread(self.offsets.dequantize(), self.format, width)
        if self.side is not None:
            codes += self.side.dequantize()
        return codes if self.order is None else in_place(codes, self.order)

    def packed_codes(self) -> Codes:
        """Return the codes as the kernels read them, uint8 [rows, blocks, block_size * bits / 8], all blocks."""
        rows, width = self.codes.shape
        blocks, size = self.format.blocks(width), self.format.block_size
        padded = self.codes
        if width < blocks * size:
            padded = np.full((rows, blocks * size), self.format.middle_code, np.uint8)
            padded[:, :width] = self.codes
            if self.zero_points is not None:
                padded[:, width:] = self.zero_points[:, -1:]
        packed = pack(padded, self.format.bits).reshape(rows, blocks, -1)
        further = [tensor.packed_codes() for tensor in self.further]
        return np.concatenate([packed, *further], axis=1) if further else packed

    def all_scales(self) -> Floats:
        """Return the scales as the kernels read them, float32 [rows, blocks], those of further columns last."""
        further = [tensor.scales for tensor in self.further]
        return np.concatenate([self.scales, *further], axis=1) if further else self.scales

    def packed_zero_points(self) -> Codes | None:
        """Return the zero points as the kernels read them, uint8 [rows, ceil(blocks * bits / 8)]; None if symmetric."""
        if self.zero_points is None:
            return None
        further = [tensor.zero_points for tensor in self.further if tensor.zero_points is not None]
        return pack(np.concatenate([self.zero_points, *further], axis=1), self.format.bits)

    def packed_parts(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return what is stored of the matrix, by :data:`names.BLOCK_PARTS`; symmetric blocks have no zero points."""
        parts: dict[str, npt.NDArray[np.generic]] = {"codes": self.packed_codes(), "scales": self.all_scales()}
        if (zero_points := self.packed_zero_points()) is not None:
            parts["zero_points"] = zero_points
        return parts

    def rows(self, index: npt.NDArray[np.int64]) -> BlockTensor:
        """Return some rows of the matrix, in the order asked for."""
        zeros = None if self.zero_points is None else self.zero_points[index]
        offsets = None if self.offsets is None else self.offsets.rows(index)
        side = None if self.side is None else Side(self.side.left.rows(index), self.side.right)
        return BlockTensor(self.format, self.codes[index], self.scales[index], zeros, offsets, side, self.order)


def in_place(columns: Floats, order: Order) -> Floats:
    """Return a matrix [rows, width] whose columns stand in some order with each where its input is."""
    found = np.empty_like(columns)
    found[:, order] = columns
    return found


def encode(weight: Floats, scales: Floats, zero_points: Codes | None, block_format: BlockFormat) -> BlockTensor:
    """Round a matrix [rows, width] to the nearest codes of given scales and zero points [rows, blocks]."""
    rows, width = weight.shape
    found = into_blocks(weight, block_format) * inverted(scales)[:, :, None]  # [rows, blocks, block_size]
    found += np.float32(block_format.middle_code) if zero_points is None else zero_points.astype(np.float32)[:, :, None]
    np.rint(found, out=found)
    np.clip(found, 0, block_format.largest_code, out=found)
    codes = found.astype(np.uint8).reshape(rows, -1)
    if codes.shape[1] != width:
        codes = np.ascontiguousarray(codes[:, :width])
    return BlockTensor(block_format, codes, scales.astype(np.float32, copy=False), zero_points)


def stacked(parts: Sequence[BlockTensor]) -> BlockTensor:
    """Return matrices of one format and width, without side products, as one: their rows below each other."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    codes = np.concatenate([part.codes for part in parts])
    scales = np.concatenate([part.scales for part in parts])
    zeros = [part.zero_points for part in parts if part.zero_points is not None]
    offsets = [part.offsets for part in parts if part.offsets is not None]
    return BlockTensor(
        first.format, codes, scales, np.concatenate(zeros) if zeros else None, stacked(offsets) if offsets else None
    )


def inverted(scales: Floats) -> Floats:
    """Return 1 / scales; 0 for scales so small that this is infinite: their blocks hold nothing but zeros."""
    return np.divide(1.0, scales, out=np.zeros_like(scales), where=np.abs(scales) >= np.finfo(scales.dtype).tiny)


def nearest_grid(weight: Floats, block_format: BlockFormat) -> tuple[Floats, Codes | None]:
    """Return the scales and zero points [rows, blocks] that just cover each block of a matrix [rows, width].

    Asymmetric: the range from min(0, smallest) to max(0, largest), zero rounded to a code. Symmetric: the value of
    largest magnitude gets the code 0, which has no counterpart on the other side; its scale may be negative. Both as
    onnxruntime's own round-to-nearest does it.
    """
    x = into_blocks(weight, block_format)  # [rows, blocks, block_size]
    top = block_format.largest_code
    if block_format.is_symmetric:
        at = np.abs(x).argmax(axis=2)
        extreme = np.take_along_axis(x, at[..., None], axis=2)[..., 0]
        return (extreme / -np.float32(block_format.middle_code)).astype(np.float32), None
    low, high = block_ranges(x)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scales = ((high - low) / np.float32(top)).astype(np.float32)
    inverse = inverted(scales)
    return scales, np.clip(np.rint(-low * inverse), 0, top).astype(np.uint8)


def nearest(weight: Floats, block_format: BlockFormat) -> BlockTensor:
    """Round a matrix [rows, width] to nearest: grids that cover each block, every weight by itself."""
    return encode(weight, *nearest_grid(weight, block_format), block_format)


def block_ranges(x: Floats) -> tuple[Floats, Floats]:
    """Return the smallest and the largest value of each block of [rows, blocks, block_size], both [rows, blocks]."""
    rows, blocks, size = x.shape
    places = np.ascontiguousarray(x.reshape(-1, size).T)  # [size, rows * blocks]: vectors instead of short sums
    return places.min(axis=0).reshape(rows, blocks), places.max(axis=0).reshape(rows, blocks)


def into_blocks(weight: Floats, block_format: BlockFormat) -> Floats:
    """Return a matrix [rows, width] as [rows, blocks, block_size], the last block padded with zeros."""
    rows, width = weight.shape
    blocks, size = block_format.blocks(width), block_format.block_size
    if width < blocks * size:
        weight = np.pad(weight, ((0, 0), (0, blocks * size - width)))
    return weight.reshape(rows, blocks, size)


def _spread(per_block: npt.NDArray, block_format: BlockFormat, width: int) -> npt.NDArray:  # type: ignore[type-arg]
    """Return a value per block [rows, blocks] as a value per weight [rows, width]."""
    return np.repeat(per_block, block_format.block_size, axis=1)[:, :width]


def pack(codes: Codes, bits: int) -> Codes:
    """Pack codes [rows, n] along n, the first of each byte in its lowest bits; a last byte is filled up with 0."""
    per_byte = 8 // bits
    if rest := codes.shape[1] % per_byte:
        codes = np.pad(codes, ((0, 0), (0, per_byte - rest)))
    if per_byte == 1:
        return codes
    if per_byte == 2:  # the same through whole words: neighbours are the low and the high byte of one
        words = np.ascontiguousarray(codes).view("<u2")
        return np.asarray((words | (words >> 4)).astype(np.uint8))
    packed = np.zeros((len(codes), codes.shape[1] // per_byte), np.uint8)
    for position in range(per_byte):
        packed |= codes[:, position::per_byte] << np.uint8(bits * position)
    return packed
