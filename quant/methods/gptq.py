"""GPTQ: column by column, later columns compensating the error of earlier ones (Frantar et al. 2022, arXiv 2210.17323).

With H the gram matrix of the inputs and U the upper factor of its inverse, H^-1 = U^T U, rounding column j leaves the
error e = (w_j - q_j) / U_jj, costs e^2, and turns the columns after it into W - e U_j. Scale and zero point of a block
are chosen when it is reached, from weights that already compensate the errors before it, with 1 / U_jj^2 as the weight
of column j's squared error: what an error there costs after all later columns have compensated for it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shortstack.graphs.errors import RequestError
from shortstack.graphs.ir.block_tensor import BlockTensor, inverted
from shortstack.graphs.precision import BlockFormat
from shortstack.quant.methods.grid import search_grid
from shortstack.quant.methods.stats import Floats, InputStats

Codes = npt.NDArray[np.uint8]

GPTQ_ROWS = 4096
"""Rows at a time: they are independent, and a vocabulary of them takes long."""


def gptq(weight: Floats, block_format: BlockFormat, stats: InputStats | None) -> BlockTensor:
    """Round a matrix [out, in].

    Raises:
        RequestError: No inputs were given.
    """
    if stats is None:
        raise RequestError(
            "gptq rounds for the inputs of a matrix, and no inputs were given",
            remedy="give calibration text, or choose --method k-quant",
        )
    rows, width = weight.shape
    blocks = block_format.blocks(width)
    upper = stats.inverse_factor()
    codes = np.empty((rows, width), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    zeros = None if block_format.is_symmetric else np.empty((rows, blocks), np.uint8)
    for start in range(0, rows, GPTQ_ROWS):
        some = slice(start, start + GPTQ_ROWS)
        left = weight[some].astype(np.float32)
        _round_rows(left, upper, block_format, codes[some], scales[some], None if zeros is None else zeros[some])
    return BlockTensor(block_format, codes, scales, zeros)


def _round_rows(
    left: Floats, upper: Floats, block_format: BlockFormat, codes: Codes, scales: Floats, zeros: Codes | None
) -> None:
    """Round some rows block by block.

    Args:
        left: The rows [rows, width]; overwritten with what is left to round.
        upper: U, [width, width].
        block_format: Bits, block size, symmetry.
        codes: Filled in, [rows, width].
        scales: Filled in, [rows, blocks].
        zeros: Filled in, [rows, blocks]; None when symmetric.
    """
    width, size = left.shape[1], block_format.block_size
    top = np.float32(block_format.largest_code)
    diagonal = np.diag(upper)
    importance = (1 / diagonal**2).astype(np.float32)
    for block in range(scales.shape[1]):
        start, end = block * size, min((block + 1) * size, width)
        scale, zero = search_grid(np.ascontiguousarray(left[:, start:end]), importance[start:end], block_format)
        scales[:, block] = scale
        if zeros is not None and zero is not None:
            zeros[:, block] = zero
        origin = np.float32(block_format.middle_code) if zero is None else zero.astype(np.float32)
        inverse = inverted(scale)
        inside = np.ascontiguousarray(left[:, start:end].T)  # [size, rows]: a column is contiguous
        errors = np.empty_like(inside)
        for j in range(end - start):
            code = np.clip(np.rint(inside[j] * inverse + origin), 0, top)
            codes[:, start + j] = code
            errors[j] = (inside[j] - scale * (code - origin)) / diagonal[start + j]
            inside[j + 1 :] -= upper[start + j, start + j + 1 : end, None] * errors[j]
        left[:, end:] -= errors.T @ upper[start:end, end:]
