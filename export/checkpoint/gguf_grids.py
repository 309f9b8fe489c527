"""Takes the blocks of GGUF's smallest types apart, whose codes are indices into grids of integers.

::

    weight = scale * (+-1) * entry              IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S
    weight = scale * (entry +- 1/8)             IQ1_S, IQ1_M; multiplied by 8 an integer, too

The grids have thousands of entries. The ``gguf`` package has them, so it dequantizes the block; the scales are read
here, and weight / scale is the integer. A scale has at most 18 significant bits, and an entry at most 6, so the
quotient is off by a rounding of float32, and the nearest integer is right.
"""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
import numpy.typing as npt

from shortstack.export.checkpoint.gguf_codes import Bytes, Floats, Unpacked

_QUARTER, _HALF, _EIGHTH = np.float32(0.25), np.float32(0.5), np.float32(0.125)


def from_grid(kind: str) -> Callable[[Bytes], Unpacked]:
    """Return the function that takes apart blocks of a type of :data:`GRID_SCALES`."""

    def unpack(raw: Bytes) -> Unpacked:
        scales = GRID_SCALES[kind](raw)  # [rows, blocks, scales of a block]
        flat = scales.reshape(len(raw), -1)
        quantization = gguf.GGMLQuantizationType[kind]
        with np.errstate(over="ignore", invalid="ignore"):  # scales of a damaged file: refused by whoever reads on
            values: Floats = gguf.dequantize(raw.reshape(len(raw), -1), quantization)
            spread = np.repeat(flat, values.shape[1] // flat.shape[1], axis=1)
            codes = np.divide(values, spread, out=np.zeros_like(values), where=spread != 0)
            return Unpacked(np.rint(codes).astype(np.int16), flat)

    return unpack


def _halves(raw: Bytes) -> Floats:
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _words(raw: Bytes, kind: str) -> npt.NDArray[np.integer]:
    return np.ascontiguousarray(raw).view(kind)


def _both_halves(raw: Bytes) -> Bytes:
    """Return the lower and the upper half of each byte, in turn: [.., bytes] -> [.., 2 * bytes]."""
    return np.stack([raw & 15, raw >> 4], axis=-1).reshape(*raw.shape[:-1], -1)


def _iq2_xxs(raw: Bytes) -> Floats:
    return (
        _halves(raw[..., :2]) * (_HALF + (_words(raw[..., 2:], "<u4")[..., 1::2] >> 28).astype(np.float32)) * _QUARTER
    )


def _iq2_scales(raw: Bytes) -> Floats:
    """IQ2_XS and IQ2_S: the last 8 bytes are 16 scales."""
    return _halves(raw[..., :2]) * (_HALF + _both_halves(raw[..., -8:])) * _QUARTER


def _iq3_xxs(raw: Bytes) -> Floats:
    return _halves(raw[..., :2]) * (_HALF + (_words(raw[..., 66:], "<u4") >> 28).astype(np.float32)) * _HALF


def _iq3_s(raw: Bytes) -> Floats:
    return _halves(raw[..., :2]) * (1 + 2 * _both_halves(raw[..., -4:])).astype(np.float32)


def _iq1_s(raw: Bytes) -> Floats:
    steps = 2 * (_words(raw[..., 34:], "<u2") >> 12 & 7) + 1
    return _halves(raw[..., :2]) * steps.astype(np.float32) * _EIGHTH


def _iq1_m(raw: Bytes) -> Floats:
    """The float16 of the block is the upper four bits of each of the last four words."""
    words = _words(raw[..., 48:], "<u2")
    half = np.zeros(words.shape[:-1], np.uint16)
    for place in range(4):
        half |= (words[..., place] >> 12 << 4 * place).astype(np.uint16)
    steps = np.stack([words >> shift & 7 for shift in (0, 3, 6, 9)], axis=-1).reshape(*words.shape[:-1], -1)
    return half.view(np.float16).astype(np.float32)[..., None] * (2 * steps + 1).astype(np.float32) * _EIGHTH


GRID_SCALES: dict[str, Callable[[Bytes], Floats]] = {
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_scales,
    "IQ2_S": _iq2_scales,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
}
"""The scales of each type, float32 [rows, blocks of the file, scales of a block]."""
