"""Matrices with a row for each token, such as an embedding: rounded and stored slice by slice, never held whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from shortstack.graphs.ir.block_tensor import BlockTensor, stacked
from shortstack.graphs.ir.cast import cast
from shortstack.graphs.ir.weights import WeightStore
from shortstack.graphs.precision import BlockFormat
from shortstack.graphs.spec import DType
from shortstack.quant.methods.stats import InputStats
from shortstack.quant.rows import RoundedRows, relative_error
from shortstack.quant.source import SLICE_ROWS, Source

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RowsOf:
    """Rows of a matrix that is stored as rows.

    Attributes:
        name: Under which they are stored.
        source_name: The matrix that they are rows of.
        start: The first of them.
        shape: How many there are, and their width.
        format: Their format; None for floats.
        stats: The inputs that they are rounded for, if any.
        kept: Blocks that they keep; then there are no slices.
        slices: Rounds them, some thousands at a time; floats where there is no format.
    """

    name: str
    source_name: str
    start: int
    shape: tuple[int, int]
    format: BlockFormat | None
    stats: InputStats | None
    kept: BlockTensor | None
    slices: Callable[[], Iterator[RoundedRows | Floats]]

    def rounded(self) -> BlockTensor:
        """Return all rows at once; there must be a format."""
        if self.kept is not None:
            return self.kept
        return stacked([found.tensor for found in self.slices() if isinstance(found, RoundedRows)])


@dataclass(slots=True)
class Vocabulary:
    """Stores such matrices, equal ones once: exits have equal heads, unless each was rounded for its own inputs.

    Attributes:
        source: Where the floats are.
        store: Where they go.
        dtype: Type of what is not in blocks.
        advance: Called with the number of weights that are done.
        errors: Relative error of each rounded matrix, by name; filled in.
    """

    source: Source
    store: WeightStore
    dtype: DType
    advance: Callable[[float], None]
    errors: dict[str, float]
    _stored: list[RowsOf] = field(default_factory=list)

    def put(self, rows: RowsOf) -> None:
        """Round and store some rows."""
        if (same := next((known for known in self._stored if self._are_equal(known, rows)), None)) is not None:
            self.store.alias(rows.name, same.name)
            if same.name in self.errors:
                self.errors[rows.name] = self.errors[same.name]
            self.advance(rows.shape[0] * rows.shape[1])
            return
        self._stored.append(rows)
        if rows.kept is not None:
            self.store.add_blocks(rows.name, rows.kept, self.dtype)
            self.advance(rows.shape[0] * rows.shape[1])
        elif rows.format is None:
            self.store.add_slices(rows.name, rows.shape, self._floats(rows))
        else:
            left, whole = [0.0], [0.0]
            self.store.add_block_slices(rows.name, rows.shape, self._blocks(rows, left, whole), self.dtype)
            self.errors[rows.name] = relative_error(sum(left), sum(whole))

    def _floats(self, rows: RowsOf) -> Iterator[npt.NDArray[np.floating]]:
        for found in rows.slices():
            assert not isinstance(found, RoundedRows)
            yield cast(rows.name, found, self.dtype)
            self.advance(found.size)

    def _blocks(self, rows: RowsOf, left: list[float], whole: list[float]) -> Iterator[BlockTensor]:
        for found in rows.slices():
            assert isinstance(found, RoundedRows)
            left.append(found.left)
            whole.append(found.whole)
            yield found.tensor
            self.advance(found.tensor.codes.size)

    def _are_equal(self, one: RowsOf, other: RowsOf) -> bool:
        """Whether two matrices become the same bytes: the same floats, rounded in the same way."""
        if (one.shape, one.format, one.kept is None) != (other.shape, other.format, other.kept is None):
            return False
        if one.kept is not None and other.kept is not None:
            theirs = other.kept.packed_parts()
            return all(np.array_equal(part, theirs[name]) for name, part in one.kept.packed_parts().items())
        if one.stats is not other.stats:
            return False
        if (one.source_name, one.start) == (other.source_name, other.start):
            return True
        first = min(SLICE_ROWS, one.shape[0])  # which differ as a rule, and say so at once
        return all(self._digest(one, count) == self._digest(other, count) for count in (first, one.shape[0]))

    def _digest(self, rows: RowsOf, count: int) -> bytes:
        return self.source.digest(rows.source_name, rows.start, rows.start + count)
