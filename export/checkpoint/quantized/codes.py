"""From the packed integers of other tools to blocks: pure functions, without files and names.

::

    codes        uint8 [rows, width]
    scales       float32 [rows, groups]    a group is neighbouring columns, after sorting where they are reordered
    zero points  uint8 [rows, groups]      weight = scale * (code - zero point)

A group of 64, 128 or all columns becomes several blocks of 32 with the same scale; codes do not change. Blocks of 32
are those of which rows of one run equal rows run alone, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shortstack.graphs.ir.block_tensor import BlockTensor, Codes, Floats, Order
from shortstack.graphs.precision import EXACT_BLOCK_SIZE, BlockFormat

WORD_BITS = 32
WIDTHS = (2, 3, 4, 8)
"""The widths of codes that are read. Those of 2 and 3 bits are stored as 4 bits, with the same values."""


def unpack(words: npt.NDArray[Any], bits: int) -> Codes:
    """Unpack the codes of 32-bit words along the last dimension, lowest bits first: [..., words] -> [..., codes].

    Codes of 3 bits go on from one word to the next: 32 of them fill three words.
    """
    packed: Codes = np.ascontiguousarray(words, "<i4").view(np.uint8)  # [..., bytes]
    if bits == 8:
        return packed
    if bits == 3:
        single = np.unpackbits(packed, axis=-1, bitorder="little")
        single = single.reshape(*packed.shape[:-1], -1, 3)
        return np.asarray(single @ np.array([1, 2, 4], np.uint8), np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return np.asarray(codes.reshape(*packed.shape[:-1], -1), np.uint8)


@dataclass(frozen=True, slots=True)
class Grid:
    """How the codes of one matrix stand for weights.

    Attributes:
        bits: Of a code as the tool stores it.
        is_symmetric: All zero points are the middle code, and none is stored.
        group: Columns that share a scale.
        order: The columns sorted by group; None where they are.
    """

    bits: int
    is_symmetric: bool
    group: int
    order: Order | None = None

    @property
    def middle(self) -> int:
        """The middle code."""
        return 1 << (self.bits - 1)

    @property
    def format(self) -> BlockFormat:
        """The blocks that hold the same weights."""
        bits = 8 if self.bits == 8 else 4
        return BlockFormat(bits, EXACT_BLOCK_SIZE, self.is_symmetric, is_reordered=self.order is not None)

    def blocks(self, codes: Codes, scales: Floats, zero_points: Codes | None) -> BlockTensor:
        """Return a matrix in blocks of 32.

        Args:
            codes: [rows, width], columns as the inputs stand.
            scales: [rows, groups].
            zero_points: [rows, groups]; None where the grid is symmetric.
        """
        block_format = self.format
        if self.order is not None:
            codes = codes[:, self.order]
        if self.is_symmetric and (shift := block_format.middle_code - self.middle):
            codes = codes + np.uint8(shift)
        starts = np.arange(block_format.blocks(codes.shape[1])) * block_format.block_size
        group = starts // self.group  # the group of each block
        zeros = None if self.is_symmetric or zero_points is None else np.ascontiguousarray(zero_points[:, group])
        spread = np.ascontiguousarray(scales[:, group], np.float32)
        return BlockTensor(block_format, np.ascontiguousarray(codes), spread, zeros, order=self.order)


def is_group_size(group: int) -> bool:
    """Whether groups of so many columns are whole blocks; -1 stands for all columns."""
    return group == -1 or (group > 0 and group % EXACT_BLOCK_SIZE == 0)


def group_count(width: int, group: int) -> int:
    """Return how many groups a row of ``width`` columns has."""
    return 1 if group == -1 else -(-width // group)


def named(tool: str, bits: int, group: int, *, is_reordered: bool = False) -> str:
    """Return what a matrix in groups is called, for people; a group of -1 is a row."""
    size = "one scale a row" if group == -1 else f"groups of {group}"
    return f"{tool} int{bits}, {size}{', act-order' if is_reordered else ''}"
