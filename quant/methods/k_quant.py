"""K-quant: every block by itself, scale and zero point searched for the least weighted error (llama.cpp's k-quants).

Without text a weight's error counts by its own size, sqrt(mean x^2) + |x|, as in llama.cpp's ``quantize_row_q4_K_ref``;
with text also by the mean square of the input that it multiplies, m sqrt(mean x^2 + x^2), as llama.cpp does with an
importance matrix (``quantize_row_q4_K_impl``).
"""

from __future__ import annotations

import numpy as np

from shortstack.graphs.ir.block_tensor import BlockTensor, encode
from shortstack.graphs.precision import BlockFormat
from shortstack.quant.methods.grid import search_grid
from shortstack.quant.methods.stats import Floats, InputStats

_ROWS = 4096  # rows of one search: its arrays stay in the processor's cache


def k_quant(weight: Floats, block_format: BlockFormat, stats: InputStats | None) -> BlockTensor:
    """Round a matrix [out, in]."""
    rows, width = weight.shape
    size, blocks = block_format.block_size, block_format.blocks(width)
    scales = np.empty((rows, blocks), np.float32)
    zeros = None if block_format.is_symmetric else np.empty((rows, blocks), np.uint8)
    for start in range(0, rows, _ROWS):
        some = slice(start, start + _ROWS)
        for block in range(blocks):
            columns = slice(block * size, (block + 1) * size)
            x = np.ascontiguousarray(weight[some, columns])
            inputs = None if stats is None else stats.mean_square[columns]
            scale, zero = search_grid(x, importance_of(x, inputs), block_format)
            scales[some, block] = scale
            if zeros is not None and zero is not None:
                zeros[some, block] = zero
    return encode(weight, scales, zeros, block_format)


def importance_of(x: Floats, inputs: Floats | None) -> Floats:
    """Return how much a squared error of each weight counts, [rows, size].

    Args:
        x: One block of each row, [rows, size].
        inputs: Mean square of each input, [size].
    """
    mean_square = np.mean(x * x, axis=1, keepdims=True)
    if inputs is None:
        return np.asarray(np.sqrt(mean_square) + np.abs(x), np.float32)
    return np.asarray(inputs * np.sqrt(mean_square + x * x), np.float32)
