"""Rounds one matrix on all cores: its rows are independent, so threads take some of them each.

Few rows at a time stay in a core's cache, which counts for more than the number of cores: rounding is a dozen passes
over the weights. The result does not depend on how rows are divided.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from shortstack.cores import usable_cores
from shortstack.graphs.ir.block_tensor import BlockTensor, stacked
from shortstack.graphs.precision import BlockFormat
from shortstack.quant.methods import Rounding
from shortstack.quant.methods.offsets import with_offsets
from shortstack.quant.methods.stats import Floats, InputStats, energy

T = TypeVar("T")
CACHED_WEIGHTS = 1 << 16
"""Weights that a thread takes at a time: each array of them is 256 KB."""


@dataclass(frozen=True, slots=True)
class RoundedRows:
    """A rounded matrix, or some rows of one.

    Attributes:
        tensor: Its blocks.
        left: Energy of the error: of the outputs on the calibration text, or of the weights where there was none.
        whole: Energy of the matrix itself, in the same unit.
    """

    tensor: BlockTensor
    left: float
    whole: float


def relative_error(left: float, whole: float) -> float:
    """Return sqrt(left / whole): the relative error of a matrix."""
    return float(np.sqrt(left / max(whole, 1e-30)))


def cached_rows(width: int) -> int:
    """Return how many rows of a matrix stay in a core's cache."""
    return max(1, CACHED_WEIGHTS // width)


def by_rows(work: Callable[[slice], T], rows: int, step: int) -> list[T]:
    """Return what ``work`` returns for slices of rows, in order; threads share the slices.

    Args:
        work: Called with slices of ``step`` rows; the last one may be shorter.
        rows: How many rows there are.
        step: Rows of a slice.
    """

    def quietly(some: slice) -> T:
        # numpy's settings belong to a thread. What overflows is refused by the name of its matrix.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            return work(some)

    slices = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    threads = min(usable_cores(), len(slices))
    if threads == 1:
        return [quietly(some) for some in slices]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(quietly, slices))


def round_rows(
    round_matrix: Rounding, step: int, weight: Floats, block_format: BlockFormat, stats: InputStats | None
) -> RoundedRows:
    """Round a matrix [out, in], or rows of one, and measure what is left.

    Args:
        round_matrix: The method.
        step: Rows that it takes at a time.
        weight: The matrix.
        block_format: Its format, without a side product; offsets are added to what the method makes.
        stats: The inputs of the matrix.
    """

    def work(some: slice) -> RoundedRows:
        rows = weight[some]
        if block_format.has_offsets:
            tensor = with_offsets(round_matrix, rows, block_format, stats)
        else:
            tensor = round_matrix(rows, block_format, stats)
        return RoundedRows(tensor, energy(rows - tensor.dequantize(), stats), energy(rows, stats))

    parts = by_rows(work, len(weight), step)
    tensor = stacked([part.tensor for part in parts])
    return RoundedRows(tensor, sum(part.left for part in parts), sum(part.whole for part in parts))
