"""Quantizes to every block type of GGUF that llama.cpp writes; the gguf package itself writes no K-quants and no IQ4.

The packers follow the layouts in ggml-common.h and share nothing with the reader under test: weights to nearest, scales
to cover each block, no search. ``test_gguf_block_types.py`` holds each against gguf's ``dequantize``.
"""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np

Kind = gguf.GGMLQuantizationType
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])


def quantize(value: np.ndarray, kind: Kind) -> np.ndarray:
    """Return the bytes of a matrix [rows, width] in blocks of a type, uint8 [rows, bytes]."""
    if kind.name not in PACKERS:
        return np.asarray(gguf.quantize(value, kind))
    size, _ = gguf.GGML_QUANT_SIZES[kind]
    packed = PACKERS[kind.name](value.reshape(-1, size).astype(np.float64))
    return np.ascontiguousarray(packed).reshape(len(value), -1)


def dequantized(value: np.ndarray, kind: Kind) -> np.ndarray:
    """Return a matrix as a file in blocks of a type holds it, as gguf reads it."""
    return np.asarray(gguf.dequantize(quantize(value, kind), kind), np.float32)


def _f16(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return float16 numbers [n] as bytes [n, 2] and as what they are, [n, 1]."""
    halves = values.astype("<f2").reshape(-1, 1)
    return halves.view(np.uint8), halves.astype(np.float64)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape)), where=b != 0)


def _codes(x: np.ndarray, step: np.ndarray, low: int, high: int) -> np.ndarray:
    return np.clip(np.rint(_ratio(x, step[..., None])), low, high).astype(np.int64)


def _halves_of_runs(codes: np.ndarray, run: int) -> np.ndarray:
    """Pack codes [n, 256] of 4 bits: ``run`` codes in lower halves, the next ``run`` in the upper halves."""
    pairs = codes.reshape(len(codes), -1, 2, run)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(codes), -1).astype(np.uint8)


def _pairs_of_bits(codes: np.ndarray) -> np.ndarray:
    """Pack codes [n, 256] of 2 bits: each byte holds codes i, i + 32, i + 64 and i + 96 of 128."""
    four = codes.reshape(len(codes), -1, 4, 32)
    return sum(four[:, :, i] << 2 * i for i in range(4)).reshape(len(codes), -1).astype(np.uint8)


def _bit_planes(bits: np.ndarray) -> np.ndarray:
    """Pack bits [n, 256]: byte i holds those of codes i, i + 32, ..., the first lowest."""
    eight = bits.reshape(len(bits), 8, 32)
    return sum(eight[:, i] << i for i in range(8)).astype(np.uint8)


def _q6_k(x: np.ndarray) -> np.ndarray:
    blocks = x.reshape(-1, 16, 16)
    steps = np.abs(blocks).max(axis=2) / 31
    d_bytes, d = _f16(steps.max(axis=1) / 127)
    scales = np.clip(np.rint(_ratio(steps, d)), 0, 127).astype(np.int64)
    codes = _codes(blocks, d * scales, -32, 31).reshape(-1, 256) + 32
    return np.hstack(
        [_halves_of_runs(codes & 15, 64), _pairs_of_bits(codes >> 4), scales.astype(np.int8).view(np.uint8), d_bytes]
    )


def _q3_k(x: np.ndarray) -> np.ndarray:
    blocks = x.reshape(-1, 16, 16)
    steps = np.abs(blocks).max(axis=2) / 3.5
    d_bytes, d = _f16(steps.max(axis=1) / 31)
    scales = np.clip(np.rint(_ratio(steps, d)), 0, 31).astype(np.int64)
    codes = _codes(blocks, d * scales, -4, 3).reshape(-1, 256) + 4
    stored = scales + 32  # 6 bits each: the lower four of all 16, then the upper two
    low = stored[:, :8] & 15 | (stored[:, 8:] & 15) << 4
    high = sum((stored[:, 4 * i : 4 * i + 4] >> 4) << 2 * i for i in range(4))
    packed = np.hstack([low, high]).astype(np.uint8)
    return np.hstack([_bit_planes(codes >> 2), _pairs_of_bits(codes & 3), packed, d_bytes])


def _with_minima(x: np.ndarray, size: int, top: int, most: int) -> tuple[np.ndarray, ...]:
    """Return codes [n, 256], the integers of scales and minima [n, blocks], and the bytes of d and dmin."""
    blocks = x.reshape(len(x), -1, size)
    low, high = np.minimum(blocks.min(axis=2), 0), np.maximum(blocks.max(axis=2), 0)
    steps = (high - low) / top
    d_bytes, d = _f16(steps.max(axis=1) / most)
    m_bytes, dmin = _f16(-low.min(axis=1) / most)
    scales = np.clip(np.rint(_ratio(steps, d)), 0, most).astype(np.int64)
    minima = np.clip(np.rint(_ratio(-low, dmin)), 0, most).astype(np.int64)
    codes = _codes(blocks + (dmin * minima)[..., None], d * scales, 0, top)
    return codes.reshape(len(x), -1), scales, minima, d_bytes, m_bytes


def _six_bits(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Pack eight scales and eight minima of 6 bits each into 12 bytes."""
    first, last = slice(0, 4), slice(4, 8)
    return np.hstack(
        [
            scales[:, first] | (scales[:, last] >> 4) << 6,
            minima[:, first] | (minima[:, last] >> 4) << 6,
            scales[:, last] & 15 | (minima[:, last] & 15) << 4,
        ]
    ).astype(np.uint8)


def _q2_k(x: np.ndarray) -> np.ndarray:
    codes, scales, minima, d, dmin = _with_minima(x, 16, 3, 15)
    return np.hstack([(scales | minima << 4).astype(np.uint8), _pairs_of_bits(codes), d, dmin])


def _q4_k(x: np.ndarray) -> np.ndarray:
    codes, scales, minima, d, dmin = _with_minima(x, 32, 15, 63)
    return np.hstack([d, dmin, _six_bits(scales, minima), _halves_of_runs(codes, 32)])


def _q5_k(x: np.ndarray) -> np.ndarray:
    codes, scales, minima, d, dmin = _with_minima(x, 32, 31, 63)
    packed = _six_bits(scales, minima)
    return np.hstack([d, dmin, packed, _bit_planes(codes >> 4), _halves_of_runs(codes & 15, 32)])


def _nearest_iq4(x: np.ndarray, step: np.ndarray) -> np.ndarray:
    return np.abs(_ratio(x, step[..., None])[..., None] - IQ4).argmin(axis=-1)


def _iq4_nl(x: np.ndarray) -> np.ndarray:
    d_bytes, d = _f16(np.abs(x).max(axis=1) / 127)
    return np.hstack([d_bytes, _halves_of_runs(_nearest_iq4(x, d[:, 0]), 16)])


def _iq4_xs(x: np.ndarray) -> np.ndarray:
    blocks = x.reshape(-1, 8, 32)
    steps = np.abs(blocks).max(axis=2) / 127
    d_bytes, d = _f16(steps.max(axis=1) / 31)
    scales = np.clip(np.rint(_ratio(steps, d)), 0, 31).astype(np.int64)
    codes = _nearest_iq4(blocks, d * scales).reshape(-1, 256)
    stored = scales + 32  # 6 bits each: the upper two of all eight in one 16-bit word, then the lower four
    high = sum((stored[:, i] >> 4) << 2 * i for i in range(8)).astype("<u2").reshape(-1, 1).view(np.uint8)
    low = (stored[:, 0::2] & 15 | (stored[:, 1::2] & 15) << 4).astype(np.uint8)
    return np.hstack([d_bytes, high, low, _halves_of_runs(codes, 16)])


PACKERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
