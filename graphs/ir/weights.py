"""weights.data: every tensor of a bundle once, streamed to disk as it comes.

Graphs refer to a tensor by file, offset and length, so two graphs that use one tensor (a tied embedding, a shared head)
share its bytes on disk and its pages in memory.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from shortstack.graphs import names
from shortstack.graphs.errors import UnsupportedError
from shortstack.graphs.ir.block_tensor import BlockTensor
from shortstack.graphs.ir.cast import cast
from shortstack.graphs.ir.finite import check_finite
from shortstack.graphs.precision import BlockFormat
from shortstack.graphs.spec import DType

# onnxruntime maps external tensors straight from the file; a cache line keeps vector loads aligned.
_ALIGNMENT_BYTES = 64


TOO_LARGE = "its weights are too large for a grid: keep it in floats, or export a sound checkpoint"
"""What to do about a matrix that rounding makes NaN or infinite."""


@dataclass(frozen=True, slots=True)
class BlockMatrix:
    """What a graph must know about a matrix [rows, width] in blocks; :func:`names.block_part` names its tensors."""

    format: BlockFormat
    rows: int
    width: int


class WeightStore:
    """Writes tensors to ``weights.data`` and hands out references to them.

    Use as a context manager; the file is complete when the block ends.

    Args:
        folder: The bundle being written.
        contents: What :meth:`contents` of an earlier store in this folder returned: goes on from there, and forgets
            what was written later. None begins anew.
    """

    def __init__(self, folder: Path, contents: Mapping[str, Any] | None = None) -> None:
        self._folder = folder
        self._file = (folder / names.WEIGHTS_FILE).open("wb" if contents is None else "r+b")
        self._tensors: dict[str, ir.ExternalTensor] = {}
        self._blocks: dict[str, BlockMatrix] = {}
        self._sides: dict[str, BlockTensor] = {}
        self._orders: dict[bytes, str] = {}
        if contents is not None:
            self._restore(contents)

    def __enter__(self) -> WeightStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors or name in self._blocks

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __getitem__(self, name: str) -> ir.ExternalTensor:
        return self._tensors[name]

    def add(self, name: str, array: np.ndarray) -> None:
        """Append one tensor.

        Args:
            name: Its name in every graph, from :mod:`shortstack.graphs.names`.
            array: Its values, in the dtype to be stored.

        Raises:
            ValueError: A tensor of that name is already stored.
        """
        if name in self._tensors:
            raise ValueError(f"{name} is stored already")
        self.add_slices(name, array.shape, [array])

    def add_slices(self, name: str, shape: tuple[int, ...], slices: Iterable[npt.NDArray[Any]]) -> None:
        """Append one tensor slice by slice, so that memory never holds all of it.

        Args:
            name: Its name in every graph.
            shape: Its shape.
            slices: At least one; their values follow each other in the file, in the dtype to be stored.

        Raises:
            ValueError: A tensor of that name is already stored, or the slices are not all of it.
        """
        if name in self._tensors:
            raise ValueError(f"{name} is stored already")
        self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT_BYTES))
        offset, values, dtype = self._file.tell(), 0, np.dtype(np.uint8)
        for array in slices:
            array = np.ascontiguousarray(array)
            self._file.write(array.data)
            values, dtype = values + array.size, array.dtype
        self._file.flush()
        if values != math.prod(shape):
            raise ValueError(f"{name}: slices hold {values} values, not those of {shape}")
        self._put(name, offset, dtype, shape)

    def _put(self, name: str, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self._tensors[name] = ir.ExternalTensor(
            names.WEIGHTS_FILE,
            offset,
            math.prod(shape) * dtype.itemsize,
            ir.DataType.from_numpy(dtype),
            shape=ir.Shape(shape),
            name=name,
            base_dir=self._folder,
        )

    def add_blocks(self, name: str, tensor: BlockTensor, dtype: DType) -> None:
        """Append a matrix [rows, width] in blocks, as the tensors of its parts.

        Args:
            name: Its name in every graph.
            tensor: Its codes, scales and zero points. The right factor of a side product and the order of inputs are
                stored with the first matrix that has them.
            dtype: Float type of the scales: that of the activations.

        Raises:
            ValueError: A tensor of that name, another right factor or another order is already stored.
            UnsupportedError: Its values are too large for a grid, or its scales for ``dtype``.
        """
        for part, array in tensor.packed_parts().items():
            self.add(names.block_part(name, part), self._part(name, part, array, dtype))
        self._blocks[name] = BlockMatrix(tensor.format, *tensor.shape)
        if tensor.side is not None:
            factor = names.side_factor(name)
            if self._sides.setdefault(factor, tensor.side.right) is not tensor.side.right:
                raise ValueError(f"{factor} is stored already, and another one")
            if factor not in self:
                self.add_blocks(factor, tensor.side.right, dtype)
        if tensor.order is not None:
            self._add_order(names.input_order(name), np.ascontiguousarray(tensor.order, np.int64))

    def _add_order(self, name: str, order: npt.NDArray[np.int64]) -> None:
        """Append an order of inputs; equal ones are stored once."""
        first = self._orders.get(order.tobytes())
        if name in self:
            if first is None or self._tensors[name].offset != self._tensors[first].offset:
                raise ValueError(f"{name} is stored already, and another one")
        elif first is not None:
            self.alias(name, first)
        else:
            self.add(name, order)
            self._orders[order.tobytes()] = name

    def add_block_slices(self, name: str, shape: tuple[int, int], slices: Iterable[BlockTensor], dtype: DType) -> None:
        """Append a matrix [rows, width] in blocks slice by slice of its rows; the bytes are those of add_blocks.

        Args:
            name: Its name in every graph.
            shape: Its shape.
            slices: Its rows, at least one slice, all of one format without a side product.
            dtype: Float type of the scales.

        Raises:
            ValueError: A tensor of that name is already stored, or the slices are not all of the matrix.
            UnsupportedError: Its values are too large for a grid, or its scales for ``dtype``.
        """
        rest: dict[str, list[npt.NDArray[Any]]] = {}
        block_format: list[BlockFormat] = []

        def codes() -> Iterator[npt.NDArray[Any]]:
            for tensor in slices:
                parts = tensor.packed_parts()
                yield parts.pop("codes")
                for part, array in parts.items():
                    rest.setdefault(part, []).append(self._part(name, part, array, dtype))
                block_format[:] = [tensor.format]

        stored, width = names.block_codes(name), shape[1]
        first = iter(found := codes())
        head = next(first)
        self.add_slices(stored, (shape[0], *head.shape[1:]), itertools.chain([head], found))
        for part, arrays in rest.items():
            self.add(names.block_part(name, part), np.concatenate(arrays))
        self._blocks[name] = BlockMatrix(block_format[0], shape[0], width)

    def _part(self, name: str, part: str, array: npt.NDArray[Any], dtype: DType) -> npt.NDArray[Any]:
        """Return a part of a matrix in blocks as it is stored: scales in the activations' type."""
        if array.dtype == np.uint8:
            return array
        check_finite(f"matrix {name} in blocks: its {part}", array, UnsupportedError, TOO_LARGE)
        return cast(names.block_part(name, part), array.astype(np.float32, copy=False), dtype)

    def blocks(self, name: str) -> BlockMatrix | None:
        """Return the layout of a matrix stored in blocks; None if it is stored as floats."""
        return self._blocks.get(name)

    @property
    def formats(self) -> dict[str, BlockFormat]:
        """The format of each matrix stored in blocks, by name."""
        return {name: matrix.format for name, matrix in self._blocks.items()}

    def contents(self) -> dict[str, Any]:
        """Put what was written on the disk for certain, and return what it is, as JSON-ready data."""
        self._file.flush()
        os.fsync(self._file.fileno())
        tensors = {
            name: [int(tensor.offset or 0), tensor.dtype.numpy().name, list(tensor.shape.numpy())]
            for name, tensor in self._tensors.items()
        }
        blocks = {name: [asdict(matrix.format), matrix.rows, matrix.width] for name, matrix in self._blocks.items()}
        return {"bytes": self._file.tell(), "tensors": tensors, "blocks": blocks}

    def _restore(self, contents: Mapping[str, Any]) -> None:
        self._file.truncate(contents["bytes"])
        self._file.seek(0, os.SEEK_END)
        for name, (offset, dtype, shape) in contents["tensors"].items():
            self._put(name, offset, np.dtype(dtype), tuple(shape))
        for name, (block_format, rows, width) in contents["blocks"].items():
            self._blocks[name] = BlockMatrix(BlockFormat(**block_format), rows, width)

    def reshaped(self, name: str, shape: tuple[int, ...]) -> ir.ExternalTensor:
        """Return a stored tensor's bytes under another shape, for an operator that takes them so."""
        tensor = self._tensors[name]
        label = f"{name}.{'x'.join(map(str, shape))}"
        return self._reference(tensor, label, ir.Shape(shape))

    def alias(self, name: str, existing: str) -> None:
        """Give a stored tensor a second name, for a graph that calls it so."""
        if existing in self._blocks:
            self._blocks[name] = self._blocks[existing]
            if self._blocks[name].format.is_reordered:
                self.alias(names.input_order(name), names.input_order(existing))
            for part in names.BLOCK_PARTS:
                if (stored := names.block_part(existing, part)) in self._tensors:
                    self.alias(names.block_part(name, part), stored)
            return
        tensor = self._tensors[existing]
        self._tensors[name] = self._reference(tensor, name, tensor.shape)

    def _reference(self, tensor: ir.ExternalTensor, name: str, shape: ir.Shape) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=shape,
            name=name,
            base_dir=self._folder,
        )
