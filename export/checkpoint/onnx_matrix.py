"""A weight matrix as a graph of another tool stores it: floats, or blocks of integers of MatMulNBits.

``MatMulNBits`` and ``GatherBlockQuantized`` store a row's codes block after block, the first code of a byte in its
lowest bits, as a bundle does. Blocks longer than 32 become several of 32, with the same scale and codes.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from shortstack.export.checkpoint.checkpoint import StoredBlocks
from shortstack.export.checkpoint.onnx_graph import Tensor
from shortstack.graphs.errors import CheckpointError
from shortstack.graphs.ir.block_tensor import BlockTensor
from shortstack.graphs.precision import BLOCK_SIZES, CODE_TYPES, EXACT_BLOCK_SIZE, BlockFormat

Floats = npt.NDArray[np.float32]
_REMEDY = "build the folder again"


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix, or some of its rows.

    Attributes:
        node: What uses it, for messages.
        data: The floats, or the packed codes.
        rows: How many outputs it has, as its node says.
        width: How many inputs.
        is_turned: The floats are [in, out].
        bits: Of a code; 0 for floats.
        block_size: Weights that share a scale.
        scales: One per block.
        zero_points: One per block; None for the middle code.
        first: Where the rows that are meant begin.
        count: How many they are; None for all.
    """

    node: str
    data: Tensor
    rows: int
    width: int
    is_turned: bool = False
    bits: int = 0
    block_size: int = 0
    scales: Tensor | None = None
    zero_points: Tensor | None = None
    first: int = 0
    count: int | None = None

    def __post_init__(self) -> None:
        if not self.bits:
            shape = (self.width, self.rows) if self.is_turned else (self.rows, self.width)
            self._check("floats", self.data, self.data.is_float and self.data.shape == shape, f"floats {list(shape)}")
            return
        assert self.scales is not None
        blocks = -(-self.width // self.block_size)
        code_bytes = self.rows * blocks * self.block_size * self.bits // 8
        is_sound = self.data.dtype == np.uint8 and math.prod(self.data.shape) == code_bytes
        self._check("codes", self.data, is_sound, f"{code_bytes} uint8")
        is_sound = self.scales.is_float and math.prod(self.scales.shape) == self.rows * blocks
        self._check("scales", self.scales, is_sound, f"{self.rows * blocks} floats")
        if self.zero_points is not None:
            count = self.rows * (blocks if self.zero_points.is_float else -(-blocks * self.bits // 8))
            is_sound = math.prod(self.zero_points.shape) == count
            is_sound &= self.zero_points.is_float or self.zero_points.dtype == np.uint8
            self._check("zero points", self.zero_points, is_sound, f"{count} values")

    def _check(self, part: str, found: Tensor, is_sound: bool, expected: str) -> None:
        if not is_sound:
            raise CheckpointError(
                f"{found.where}: the {part} of {self.node}",
                found=f"{found.dtype} {list(found.shape)}",
                expected=expected,
                remedy=_REMEDY,
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and width of what is meant."""
        return self.rows - self.first if self.count is None else self.count, self.width

    def part(self, first: int, count: int) -> Matrix:
        """Return some of the rows."""
        return replace(self, first=self.first + first, count=count)

    @property
    def format(self) -> BlockFormat | None:
        """The format of a bundle that holds exactly these blocks; None for floats, or if there is none."""
        has_float_zeros = self.zero_points is not None and self.zero_points.is_float
        if self.bits not in CODE_TYPES or self.block_size not in BLOCK_SIZES or has_float_zeros:
            return None
        return BlockFormat(self.bits, min(self.block_size, EXACT_BLOCK_SIZE), is_symmetric=self.zero_points is None)

    @property
    def kind(self) -> str:
        """What people call these blocks."""
        zeros = "" if self.zero_points is None else ", zero points"
        return f"int{self.bits} blocks of {self.block_size}{zeros}"

    def floats(self) -> Floats:
        """Return the rows as float32 [rows, width]."""
        if not self.bits:
            whole = self.data.read()
            return np.array((whole.T if self.is_turned else whole)[self._rows], np.float32, order="C")
        scales = np.asarray(self._per_block(self.scales), np.float32)
        if self.zero_points is None:
            zeros = np.full(scales.shape, 1 << (self.bits - 1), np.float32)
        elif self.zero_points.is_float:
            zeros = np.asarray(self._per_block(self.zero_points), np.float32)
        else:
            zeros = self._zeros().astype(np.float32)
        spread = [np.repeat(array, self.block_size, axis=1)[:, : self.width] for array in (zeros, scales)]
        return (self._codes().astype(np.float32) - spread[0]) * spread[1]

    def blocks(self) -> BlockTensor:
        """Return the rows in blocks, with the codes and scales that are stored."""
        block_format = self.format
        assert block_format is not None
        times, blocks = self.block_size // block_format.block_size, block_format.blocks(self.width)
        scales = np.asarray(self._per_block(self.scales), np.float32)
        zeros = None if self.zero_points is None else np.repeat(self._zeros(), times, axis=1)[:, :blocks]
        return BlockTensor(block_format, self._codes(), np.repeat(scales, times, axis=1)[:, :blocks], zeros)

    @property
    def _rows(self) -> slice:
        return slice(self.first, self.first + self.shape[0])

    def _per_block(self, tensor: Tensor | None) -> npt.NDArray[np.generic]:
        assert tensor is not None
        return tensor.read().reshape(self.rows, -1)[self._rows]

    def _codes(self) -> npt.NDArray[np.uint8]:
        return _unpacked(self._per_block(self.data), self.bits)[:, : self.width]

    def _zeros(self) -> npt.NDArray[np.uint8]:
        return _unpacked(self._per_block(self.zero_points), self.bits)[:, : -(-self.width // self.block_size)]


def stored_blocks(parts: tuple[Matrix, ...]) -> StoredBlocks | None:
    """Return how matrices, one under the other, are quantized; None if one is stored as floats."""
    if not all(part.bits for part in parts):
        return None
    formats = {part.format for part in parts}
    kind = "+".join(dict.fromkeys(part.kind for part in parts))

    def read() -> BlockTensor:
        found = [part.blocks() for part in parts]
        zeros = [part.zero_points for part in found if part.zero_points is not None]
        codes, scales = (np.concatenate(arrays) for arrays in zip(*((p.codes, p.scales) for p in found), strict=True))
        return BlockTensor(found[0].format, codes, scales, np.concatenate(zeros) if zeros else None)

    return StoredBlocks(kind, read, formats.pop() if len(formats) == 1 else None)


def _unpacked(packed: npt.NDArray[np.generic], bits: int) -> npt.NDArray[np.uint8]:
    """Return codes [rows, n] of bytes [rows, n * bits / 8]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    spread = (np.asarray(packed, np.uint8)[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return np.asarray(spread.reshape(len(packed), -1), np.uint8)
