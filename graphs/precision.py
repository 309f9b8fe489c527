"""How tensors are stored: as floats, or as blocks of small integers that the kernels read as they are.

A *block* is ``block_size`` neighbouring weights of one output row (along K, the input dimension). It has one float
scale and, when asymmetric, one integer zero point::

    weight = scale * (code - zero_point)         code, zero_point in 0 .. 2^bits - 1

A symmetric block has the zero point ``2^(bits - 1)`` without storing it.

A zero point is an integer, since the fast kernels take no other; GGUF's Q4_1 and Q4_K, for example, shift each block
by any real number. *Offsets* are what is left of that shift, one number per block. They are stored as further columns
of the same matrix, after the weights, and multiplied with the sum of the block's inputs::

    y = sum_k w_k x_k + sum_b offset_b (sum of x over block b)

A *side product* is a part of low rank that is stored beside the blocks, because rounding would lose it: what an adapter
added to weights that lie on the grid of a quantized file. Its right factor A [columns, width] is a matrix of its own
(:func:`names.side_factor`), one for all matrices of one input. Its left factor B [rows, columns] is stored as further
columns of the same matrix, between the weights and the offsets::

    y = W x + B (A x) + offsets

A *reordered* matrix reads its input in another order: column j of what is stored multiplies input ``order[j]``. So
weights that share a scale are neighbours, also where a tool chose them by other reasons than their place. The order is
a tensor of its own (:func:`names.input_order`), one for all matrices of one input, and is applied to the input before
the product.

What differs between widths of codes stands in one table, :data:`CODE_TYPES`; rounding, packing, the search for a mix
and the command line read it. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from shortstack.graphs.errors import RequestError
from shortstack.graphs.spec import DType

KVType = Literal["float", "int8"]
KV_TYPES: tuple[KVType, ...] = ("float", "int8")
BLOCK_SIZES = (16, 32, 64, 128, 256)
MOST_SIDE_COLUMNS = 256
EXACT_BLOCK_SIZE = 32  # rows of one run equal rows run one by one, bit for bit (onnxruntime 1.31 and 1.32, x86)
EXACT_BLOCK_SIZES = (16, EXACT_BLOCK_SIZE)  # all of which that is known
SPARE_ROWS = 1  # positions beyond the context that graphs may write, see Precision.has_spare_row
ACCURACY_LEVEL = 4  # the only level with integer kernels: 8 bits are 60-130 times slower at any other


@dataclass(frozen=True, slots=True)
class CodeType:
    """One width of integer codes that the kernels compute with.

    Attributes:
        bits: Of a code. Bytes hold whole codes, the first one in the lowest bits.
        tried_ranges: The ranges that rounding tries for each block, in units of the one that just covers it: the
            narrowest, the widest and how many, evenly spaced. Narrower ones clip the extremes and resolve the rest.
        gains_from_offsets: Whether a searched mix keeps offsets at this width: they make up for coarse steps.

    Raises:
        ValueError: A width that does not fill bytes.
    """

    bits: int
    tried_ranges: tuple[float, float, int]
    gains_from_offsets: bool

    def __post_init__(self) -> None:
        if self.bits not in (1, 2, 4, 8):
            raise ValueError(f"codes of {self.bits} bits do not fill a byte")

    @property
    def name(self) -> str:
        """What people and the command line call it, such as ``int4``."""
        return f"int{self.bits}"


CODE_TYPES: Mapping[int, CodeType] = MappingProxyType(
    {
        code_type.bits: code_type
        for code_type in (
            CodeType(4, tried_ranges=(0.70, 1.06, 13), gains_from_offsets=True),
            # 256 steps resolve everything: only the rounded zero point is worth a second look.
            CodeType(8, tried_ranges=(0.99, 1.0, 2), gains_from_offsets=False),
        )
    }
)
"""Every width of codes that a block may have, by its bits."""


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """How one weight matrix is stored.

    Attributes:
        bits: Of a code, a key of CODE_TYPES.
        block_size: Weights that share a scale, a power of two from 16 on.
        is_symmetric: Without stored zero points.
        has_offsets: With an offset column per block.
        side_columns: Columns of the side product, whole blocks; 0 where there is none.
        is_reordered: Its columns multiply the input in another order.

    Raises:
        RequestError: A value that the kernels do not have.
    """

    bits: int
    block_size: int = EXACT_BLOCK_SIZE
    is_symmetric: bool = False
    has_offsets: bool = False
    side_columns: int = 0
    is_reordered: bool = False

    def __post_init__(self) -> None:
        if self.bits not in CODE_TYPES:
            names = " or ".join(code_type.name for code_type in CODE_TYPES.values())
            widths = " or ".join(map(str, CODE_TYPES))
            raise RequestError("bits", found=self.bits, expected=widths, remedy=f"choose {names}")
        if self.block_size not in BLOCK_SIZES:
            raise RequestError(
                "block size", found=self.block_size, expected=f"one of {', '.join(map(str, BLOCK_SIZES))}"
            )
        if not 0 <= self.side_columns <= MOST_SIDE_COLUMNS or self.side_columns % self.block_size:
            raise RequestError(
                "side columns",
                found=self.side_columns,
                expected=f"a multiple of the block size {self.block_size}, at most {MOST_SIDE_COLUMNS}",
            )

    def __str__(self) -> str:
        kind = (" symmetric" if self.is_symmetric else "") + (" with offsets" if self.has_offsets else "")
        if self.side_columns:
            kind += f"{' and' if self.has_offsets else ' with'} a side product of rank {self.side_columns}"
        order = ", inputs in another order" if self.is_reordered else ""
        return f"{self.code_type.name}{kind}, blocks of {self.block_size}{order}"

    @property
    def code_type(self) -> CodeType:
        """The width of its codes."""
        return CODE_TYPES[self.bits]

    @property
    def largest_code(self) -> int:
        """The largest code; the smallest is 0."""
        return (1 << self.bits) - 1

    @property
    def middle_code(self) -> int:
        """The zero point of a symmetric block."""
        return 1 << (self.bits - 1)

    @property
    def code_bytes(self) -> int:
        """Bytes of the packed codes of one block."""
        return self.block_size * self.bits // 8

    def blocks(self, width: int) -> int:
        """Return how many blocks cover a row of ``width`` weights, its offsets not counted."""
        return -(-width // self.block_size)

    def stored_width(self, width: int) -> int:
        """Return how many columns a matrix of ``width`` columns is stored with: side product and offsets included."""
        return width + self.side_columns + (self.blocks(width) if self.has_offsets else 0)

    def fitted(self, width: int) -> BlockFormat:
        """Return the format for a matrix of this width: further columns stand behind whole blocks only."""
        return replace(self, has_offsets=False, side_columns=0) if width % self.block_size else self

    def stored_bytes(self, rows: int, width: int, scale_bytes: int = 4) -> int:
        """Return the bytes of codes, scales and zero points of a matrix [rows, width]."""
        blocks = self.blocks(self.stored_width(width))
        zeros = 0 if self.is_symmetric else -(-blocks * self.bits // 8)
        return rows * (blocks * (self.code_bytes + scale_bytes) + zeros)


@dataclass(frozen=True, slots=True)
class Precision:
    """How a bundle stores what it computes with.

    Attributes:
        weights: Format of each matrix that is stored in blocks, by its name in :mod:`shortstack.graphs.names`; all
            others are floats of the bundle's dtype. A layer's matrix has one entry, whoever runs the layer: a draft
            cannot have another layer than its verification.
        kv_cache: Element type of the cache.
    """

    weights: Mapping[str, BlockFormat] = field(default_factory=dict)
    kv_cache: KVType = "float"

    def has_spare_row(self, dtype: DType) -> bool:
        """Return whether graphs attend with one empty row more than a run has.

        The CPU's attention kernel computes a run of one row differently from runs of two or more rows, which agree
        bit for bit with each other (onnxruntime 1.32; the difference is about 3e-7). Float weights pass it on as it is.
        Products with blocks round their inputs to 8 bits: there it can grow to a thousandth, and change a token. So the
        kernel always sees two rows or more. An int8 cache has one kernel for all. Float16 is for GPUs, whose kernels
        differ anyway.

        Args:
            dtype: Type of activations.
        """
        return bool(self.weights) and self.kv_cache == "float" and dtype == "float32"

    def has_independent_rows(self, dtype: DType) -> bool:
        """Return whether a CPU gives a row the same bits whatever other rows run with it, at least two of them.

        Measured on x86 (onnxruntime 1.31 and 1.32). What a row alone is like is another question, see
        :meth:`has_spare_row`.

        Args:
            dtype: Type of activations.
        """
        sizes = {block_format.block_size for block_format in self.weights.values()}
        return dtype == "float32" and sizes <= {*EXACT_BLOCK_SIZES}

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantized."""
        return not self.weights and self.kv_cache == "float"

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        return {
            "weights": {name: _to_json(block_format) for name, block_format in sorted(self.weights.items())},
            "kv_cache": self.kv_cache,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Precision:
        """Rebuild what :meth:`to_json` wrote.

        Raises:
            ValueError: A field is of another type or value.
            KeyError: A field is missing.
            RequestError: A format that the kernels do not have.
        """
        if data["kv_cache"] not in KV_TYPES:
            raise ValueError(f"precision.kv_cache is {data['kv_cache']!r}")
        weights = {}
        for name, entry in data["weights"].items():
            numbers, flags = (entry["bits"], entry["block_size"]), (entry["is_symmetric"], entry["has_offsets"])
            side_columns, is_reordered = entry.get("side_columns", 0), entry.get("is_reordered", False)
            if any(type(n) is not int for n in (*numbers, side_columns)) or any(
                type(flag) is not bool for flag in (*flags, is_reordered)
            ):
                raise ValueError(f"precision.weights.{name} is {entry!r}")
            weights[name] = BlockFormat(*numbers, *flags, side_columns, is_reordered)
        return cls(weights, data["kv_cache"])


def _to_json(block_format: BlockFormat) -> dict[str, Any]:
    """Return a format as JSON-ready data; without a side product or an order where there is none, as always before."""
    data = asdict(block_format)
    return {name: value for name, value in data.items() if value or name not in ("side_columns", "is_reordered")}
