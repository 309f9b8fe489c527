"""HQQ: grids fitted to most weights of a block, while outliers count little (Badri and Shaji, 2023).

Half-quadratic splitting of min |W - dequantized(W)|_p^p, p < 1 (mobiusml.github.io/hqq_blog; the same as onnxruntime's
``HQQWeightOnlyQuantizer``, which needs PyTorch): the error is split into sparse outliers, found by generalised soft
thresholding, and a rest for which the grid is solved in closed form. In HQQ the zero point is a float; kernels with
float zero points are a hundred times slower, so here it is rounded at the end and the scale is fitted once more.
"""

from __future__ import annotations

import numpy as np

from shortstack.graphs.ir.block_tensor import BlockTensor, encode, into_blocks, nearest_grid
from shortstack.graphs.precision import BlockFormat
from shortstack.quant.methods.stats import Floats, InputStats

# The paper's settings.
_NORM = 0.7
_BETA = 10.0
_KAPPA = 1.01
_ITERATIONS = 20
_ROWS = 1024  # rows at a time, for memory


def hqq(weight: Floats, block_format: BlockFormat, stats: InputStats | None) -> BlockTensor:
    """Round a matrix [out, in]; looks at no text."""
    scales, zeros = nearest_grid(weight, block_format)
    for start in range(0, len(weight), _ROWS):
        some = slice(start, start + _ROWS)
        x = into_blocks(weight[some], block_format)  # [rows, blocks, size]
        zero = None if zeros is None else zeros[some].astype(np.float32)[..., None]
        scale, zero = _fit(x, scales[some][..., None], zero, block_format)
        scales[some] = scale[..., 0]
        if zeros is not None and zero is not None:
            zeros[some] = zero[..., 0].astype(np.uint8)
    return encode(weight, scales, zeros, block_format)


def _fit(x: Floats, scale: Floats, zero: Floats | None, block_format: BlockFormat) -> tuple[Floats, Floats | None]:
    """Return better scales and whole zero points of blocks [rows, blocks, size], or the given ones if none is.

    Args:
        x: The weights.
        scale: First scales [rows, blocks, 1].
        zero: First zero points [rows, blocks, 1]; None for symmetric blocks, whose scale is refined instead.
        block_format: Bits.
    """
    top = np.float32(block_format.largest_code)
    origin = np.full_like(scale, block_format.middle_code) if zero is None else zero
    first = (np.where(scale == 0, np.float32(1), scale), origin)
    # The paper's beta is for weights of about 1: a block's largest error is then half of a step of about 1/8.
    unit = np.abs(first[0]) * np.float32(block_format.middle_code)
    found, beta = first, _BETA
    for _ in range(_ITERATIONS):
        scale, origin = found
        code = np.clip(np.rint(x / scale + origin), 0, top)
        target = x - unit * _shrink((x - (code - origin) * scale) / unit, beta)
        if zero is None:
            found = (_least_squares(target, code - origin, scale), origin)
        else:
            found = (scale, np.mean(code - target / scale, axis=2, keepdims=True))
        beta *= _KAPPA
    scale, origin = found[0], np.clip(np.rint(found[1]), 0, top)
    code = np.clip(np.rint(x / scale + origin), 0, top) - origin
    target = x - unit * _shrink((x - code * scale) / unit, beta)
    best, best_loss = first, _loss(x, first, top)
    for candidate in ((scale, origin), (_least_squares(target, code, scale), origin)):
        loss = _loss(x, candidate, top)
        better = loss < best_loss
        best = (np.where(better, candidate[0], best[0]), np.where(better, candidate[1], best[1]))
        best_loss = np.minimum(loss, best_loss)
    return best[0], None if zero is None else best[1]


def _shrink(error: Floats, beta: float) -> Floats:
    """Return the outliers of errors: generalised soft thresholding for an lp norm."""
    size = np.abs(error)
    kept = np.maximum(size - np.power(size + np.float32(1e-8), np.float32(_NORM - 1)) / np.float32(beta), 0)
    return np.asarray(np.sign(error) * kept, np.float32)


def _least_squares(target: Floats, code: Floats, otherwise: Floats) -> Floats:
    """Return the scale [rows, blocks, 1] with the least sum (target - scale code)^2."""
    square = np.sum(code * code, axis=2, keepdims=True)
    scale = np.sum(target * code, axis=2, keepdims=True) / np.maximum(square, 1)
    return np.asarray(np.where(scale == 0, otherwise, scale), np.float32)


def _loss(x: Floats, grid: tuple[Floats, Floats], top: np.float32) -> Floats:
    """Return sum |error|^p of each block [rows, blocks, 1] rounded to a grid."""
    scale, origin = grid
    rounded = (np.clip(np.rint(x / scale + origin), 0, top) - origin) * scale
    return np.asarray(np.sum(np.power(np.abs(x - rounded), np.float32(_NORM)), axis=2, keepdims=True), np.float32)
