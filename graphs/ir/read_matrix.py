"""A bundle's matrices as floats [out, in]: blocks are put together again as graphs/precision.py describes them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from shortstack.graphs import names
from shortstack.graphs.bundle import Bundle
from shortstack.graphs.drafter_weights import is_rows as is_drafter_rows
from shortstack.graphs.errors import BundleError
from shortstack.graphs.exit_parts import ROWS
from shortstack.graphs.ir.block_tensor import in_place
from shortstack.graphs.ir.finite import check_finite
from shortstack.graphs.ir.read import StoredTensor, read_tensors
from shortstack.graphs.layer_weights import Shape
from shortstack.graphs.precision import BlockFormat

Floats = npt.NDArray[np.float32]
_REMEDY = "copy the bundle again as a whole, or make it again"


def is_stored_as_rows(name: str) -> bool:
    """Whether a matrix of floats is stored as [out, in], as tables of rows are too; the others are [in, out]."""
    is_vocabulary = name in (names.EMBED_TOKENS, names.LM_HEAD) or name.endswith(f".{names.PER_LAYER_EMBED}")
    return is_vocabulary or is_drafter_rows(name) or (name.startswith("exits.") and name.endswith(ROWS))


class StoredMatrices:
    """Reads the matrices and vectors of any bundle, whichever way they are stored.

    Args:
        bundle: The bundle.

    Raises:
        BundleError: A graph cannot be read.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._formats = bundle.manifest.precision.weights
        self._tensors: Mapping[str, StoredTensor] = read_tensors(bundle)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors or name in self._formats

    def array(self, name: str) -> npt.NDArray[np.generic]:
        """Return a tensor as it is stored.

        Raises:
            BundleError: No graph has it.
        """
        if name not in self._tensors:
            raise BundleError(f"{self._bundle.folder}: no graph has the tensor {name}", remedy=_REMEDY)
        return self._tensors[name].numpy()

    def floats(self, name: str, shape: Shape) -> Floats:
        """Return a tensor that is stored as floats, such as a norm's weight or a bias, in float32.

        Raises:
            BundleError: No graph has it, or it has another shape or a value that is not finite.
        """
        found = np.asarray(self.array(name), np.float32)
        self._check(name, found.shape, shape)
        check_finite(f"{self._bundle.folder}: tensor {name}", found, BundleError, _REMEDY)
        return found

    def matrix(self, name: str, shape: Shape) -> Floats:
        """Return a matrix [out, in], in float32.

        Raises:
            BundleError: A tensor of it is missing, has a value that is not finite, or does not fit the shape or the
                format that bundle.json says.
        """
        rows, width = shape
        if (block_format := self._formats.get(name)) is None:
            is_rows = is_stored_as_rows(name)
            stored = self.floats(name, shape if is_rows else (width, rows))
            return stored if is_rows else np.ascontiguousarray(stored.T)
        found, first = self._blocks(name, width, block_format), names.first_rows(name)
        if first in self._formats:
            found = np.concatenate([self._blocks(first, width, self._formats[first]), found])
        self._check(name, found.shape, (rows, width))
        return found

    def _blocks(self, name: str, width: int, block_format: BlockFormat) -> Floats:
        """Return scale * (code - zero point), plus offsets and the side product, [rows, width], as the inputs stand."""
        columns, size = block_format.stored_width(width), block_format.block_size
        blocks = block_format.blocks(columns)
        stored = self.array(names.block_scales(name)).shape
        rows = stored[0] if stored else 0
        scales = self.floats(names.block_scales(name), (rows, blocks))
        codes = self._unpacked(self._codes_name(name), rows, blocks * size, block_format)
        values = codes.reshape(rows, blocks, size).astype(np.float32)
        if block_format.is_symmetric:
            values -= block_format.middle_code
        else:
            values -= self._unpacked(names.block_zero_points(name), rows, blocks, block_format)[..., None]
        values *= scales[..., None]
        whole = values.reshape(rows, -1)
        found, behind = whole[:, :width], width + block_format.side_columns
        if block_format.has_offsets:
            found = found + np.repeat(whole[:, behind:columns], size, axis=1)
        if block_format.side_columns:
            found = found + whole[:, width:behind] @ self.matrix(
                names.side_factor(name), (block_format.side_columns, width)
            )
        if block_format.is_reordered:
            found = in_place(np.asarray(found, np.float32), self._order(names.input_order(name), width))
        return np.ascontiguousarray(found)

    def _order(self, name: str, width: int) -> npt.NDArray[np.int64]:
        """Return the order in which a matrix reads its input, each input once."""
        order = self.array(name)
        self._check(name, (str(order.dtype), order.shape), ("int64", (width,)))
        if not np.array_equal(np.sort(order), np.arange(width)):
            self._check(name, "an input twice", "each input once")
        return np.asarray(order, np.int64)

    def _codes_name(self, name: str) -> str:
        """Return the tensor of a matrix's codes; a graph that looks rows up calls the same bytes by their shape."""
        codes = names.block_codes(name)
        return next((other for other in self._tensors if other.startswith(f"{codes}.")), codes)

    def _unpacked(self, name: str, rows: int, count: int, block_format: BlockFormat) -> npt.NDArray[np.uint8]:
        """Return the first ``count`` codes of each row, [rows, count]; the first of a byte is in its lowest bits."""
        stored, bits = self.array(name), block_format.bits
        expected = rows * -(-count * bits // 8)
        if stored.dtype != np.uint8 or stored.size != expected:
            self._check(name, (str(stored.dtype), stored.size), ("uint8", expected))
        packed = np.asarray(stored, np.uint8).reshape(rows, -1)
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        spread = (packed[..., None] >> shifts) & np.uint8(block_format.largest_code)
        return np.asarray(spread.reshape(rows, -1)[:, :count], np.uint8)

    def _check(self, name: str, found: object, expected: object) -> None:
        if found != expected:
            raise BundleError(f"{self._bundle.folder}: tensor {name}", found=found, expected=expected, remedy=_REMEDY)
