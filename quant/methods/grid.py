"""Choosing the scale and zero point of each block so that weighted rounding errors are least."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shortstack.graphs.precision import BlockFormat
from shortstack.quant.methods.stats import Floats

Codes = npt.NDArray[np.uint8]
_ZERO_SHIFTS = (-1, 0, 1)
_TINY = np.float32(1e-30)  # keeps blocks of zeros out of divisions; smaller than any range that float32 codes resolve


def search_grid(x: Floats, importance: Floats, block_format: BlockFormat) -> tuple[Floats, Codes | None]:
    """Return scale and zero point of one block of every row.

    Each candidate range gives codes, those give the best scale by weighted least squares, s = sum(w x c) / sum(w c^2)
    with c = code - zero point, and the candidate with the least sum(w (x - s c)^2) wins: the search of llama.cpp's
    k-quants (``make_qx_quants`` and ``make_qkx2_quants`` in ggml-quants.c), but with an integer zero point, which
    rounding it afterwards would lose much of (onnxruntime's ``quant_tensor_k_quant_cpu`` does that).

    Args:
        x: The weights, float32 [rows, size], size at most the block size.
        importance: Weight of each squared error, [size] or [rows, size].
        block_format: Bits and symmetry.

    Returns:
        Scales float32 [rows], zero points uint8 [rows] or None.
    """
    rows = len(x)
    top = np.float32(block_format.largest_code)
    middle = np.float32(block_format.middle_code)
    low, high = np.minimum(x.min(axis=1), 0)[:, None], np.maximum(x.max(axis=1), 0)[:, None]  # [rows, 1]
    weighted = x * importance
    best_scale, best_zero = np.zeros(rows, np.float32), np.full(rows, middle, np.float32)
    best_error = np.full(rows, np.inf, np.float32)
    for scale, zero in _candidates(low, high, block_format):
        code = np.rint(x / scale)
        code += zero
        np.clip(code, 0, top, out=code)
        code -= zero
        square = np.einsum("nk,nk->n", code * code, np.broadcast_to(importance, x.shape))
        fitted = np.einsum("nk,nk->n", weighted, code) / np.maximum(square, _TINY)
        code *= fitted[:, None]
        code -= x
        code *= code
        error = np.einsum("nk,nk->n", code, np.broadcast_to(importance, x.shape))
        better = (error < best_error) & (fitted != 0)
        best_error = np.where(better, error, best_error)
        best_scale = np.where(better, fitted, best_scale)
        best_zero = np.where(better, zero[:, 0], best_zero)
    if block_format.is_symmetric:
        return best_scale, None
    return best_scale, best_zero.astype(np.uint8)


def _candidates(low: Floats, high: Floats, block_format: BlockFormat) -> list[tuple[Floats, Floats]]:
    """Return scales and zero points [rows, 1] to try; the first ones just cover a block."""
    top = np.float32(block_format.largest_code)
    middle = np.float32(block_format.middle_code)
    shrinks = sorted(np.linspace(*block_format.code_type.tried_ranges).tolist(), key=lambda shrink: abs(shrink - 1))
    if block_format.is_symmetric:
        # The code 0 has no counterpart on the other side: either end may take it.
        sign = np.where(-low >= high, np.float32(1), np.float32(-1))
        whole = sign * np.maximum(np.maximum(-low, high), _TINY) / middle
        zero = np.full_like(low, middle)
        return [((whole * (s * turn)).astype(np.float32), zero) for turn in (1, -1) for s in shrinks]
    whole = np.maximum(high - low, _TINY) / top
    found = []
    for shrink in shrinks:
        scale = whole * np.float32(shrink)
        # A narrower range is cut equally at both ends.
        centre = np.rint((low + high) / (-2 * scale) + top / 2)
        found += [(scale, np.clip(centre + shift, 0, top).astype(np.float32)) for shift in _ZERO_SHIFTS]
    return found
