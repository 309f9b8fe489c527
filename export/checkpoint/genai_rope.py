"""What rotary embedding a graph's cos and sin tables hold: their frequencies, and the base that they belong to.

Angles of the first row after 0 are the frequencies. Those of no scaling are ``theta ** (-2 i / dims)``; any others are
kept as one divisor each (``rope_type`` factors).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from shortstack.export.checkpoint.onnx_graph import Tensor
from shortstack.graphs.errors import CheckpointError, UnsupportedError

Floats = npt.NDArray[np.float64]
_REMEDY = "export the checkpoint that the graph was built from"
_CHECKED_ROWS = 512
_SAME_BASE = 2e-5  # of float32 tables, which are exact to 1e-7
_SAME_BASE_HALF = 2e-3  # of float16 tables
_TABLE = 2e-3  # the largest error of an entry that follows from rounding its angle to float32, or itself to float16


def read_tables(cos: Tensor, sin: Tensor, head_dim: int) -> tuple[float, Floats | None]:
    """Return the base of a rotary embedding, and its divisors [head_dim / 2]; None where all are 1.

    Args:
        cos: Its table, [positions, head_dim / 2].
        sin: The same.
        head_dim: Width of the heads that it rotates.

    Raises:
        CheckpointError: The tables do not fit the heads or each other, or are not of one frequency a column.
        UnsupportedError: Only a part of each head is rotated.
    """
    for tensor in (cos, sin):
        if not tensor.is_float or len(tensor.shape) != 2 or tensor.shape != cos.shape or tensor.shape[0] < 2:
            raise CheckpointError(
                tensor.where, found=f"{tensor.dtype} {list(tensor.shape)}", expected="floats, positions by columns"
            )
    if cos.shape[1] * 2 != head_dim:
        raise UnsupportedError(
            f"{cos.where}: rotates a part of each head",
            found=f"{cos.shape[1] * 2} of {head_dim} columns",
            expected="all columns",
            remedy=_REMEDY,
        )
    rows = min(cos.shape[0], _CHECKED_ROWS)
    tables = [np.asarray(tensor.read()[:rows], np.float64) for tensor in (cos, sin)]
    frequencies = np.arctan2(tables[1][1], tables[0][1])
    angles = np.arange(rows)[:, None] * frequencies
    worst = max(float(np.abs(found - wave(angles)).max()) for found, wave in zip(tables, (np.cos, np.sin), strict=True))
    if not worst <= _TABLE or not frequencies.min() > 0:
        raise CheckpointError(
            f"{cos.where}: not the cosines of one frequency a column, from position 0",
            found=f"entries that differ by {worst:.3g}",
            expected=f"at most {_TABLE}",
            remedy=_REMEDY,
        )
    exponents = -np.arange(head_dim // 2) * 2.0 / head_dim
    tolerance = _SAME_BASE if cos.dtype == np.float32 else _SAME_BASE_HALF
    if head_dim > 2:
        theta = math.exp(math.log(frequencies[-1] / frequencies[0]) / exponents[-1])
        for digits in (2, 3, 4, 6):
            base = float(f"{theta:.{digits}g}")
            if base >= 1 and np.allclose(base**exponents, frequencies, rtol=tolerance, atol=0):
                return base, None
    if cos.dtype != np.float32:
        raise UnsupportedError(f"{cos.where}: scaled frequencies", found=cos.dtype, expected="float32", remedy=_REMEDY)
    base = 10000.0
    return base, base**exponents / frequencies
