"""Takes the blocks of GGUF files apart: the integers, the scales and the minima that each type stores.

::

    weight = scale * code                 signed codes: the legacy types with a 0, Q3_K, Q6_K, IQ4, FP4, TQ
    weight = scale * code + minimum       codes from 0: Q4_1, Q5_1, Q2_K, Q4_K, Q5_K

Every function takes ``raw``, uint8 [rows, blocks of the file, bytes of a block]. K-quants have 256 weights in a block
and a scale for each 16 or 32 of them, which is an integer times the block's float16. That product has at most 18
significant bits, so float32 holds it exactly. Table types store an index into 16 integers.

The layouts are those of ``block_q4_0`` and the following in
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""The values of E2M1, doubled: 4-bit floats with two bits of exponent and one of mantissa."""


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A matrix of a GGUF file, or some of its rows.

    Attributes:
        codes: int16 [rows, width]; from 0 where there are minima, signed elsewhere.
        scales: float32 [rows, blocks]; a block is what shares a scale. They may be negative.
        minima: float32 [rows, blocks]; None where the type has none.
    """

    codes: npt.NDArray[np.int16]
    scales: Floats
    minima: Floats | None = None


def q4_0(raw: Bytes) -> Unpacked:
    """``d * (code - 8)``: float16 d; 16 bytes."""
    return _signed(_nibbles(raw[..., 2:], 16), 8, _halves(raw[..., :2]))


def q4_1(raw: Bytes) -> Unpacked:
    """``d * code + m``: float16 d, m; 16 bytes."""
    return _shifted(_nibbles(raw[..., 4:], 16), _halves(raw[..., :2]), _halves(raw[..., 2:4]))


def q5_0(raw: Bytes) -> Unpacked:
    """``d * (code - 16)``: float16 d; the fifth bits of all 32 codes; 16 bytes."""
    codes = _nibbles(raw[..., 6:], 16) | _bits(raw[..., 2:6]) << 4
    return _signed(codes, 16, _halves(raw[..., :2]))


def q5_1(raw: Bytes) -> Unpacked:
    """``d * code + m``: float16 d, m; the fifth bits; 16 bytes."""
    codes = _nibbles(raw[..., 8:], 16) | _bits(raw[..., 4:8]) << 4
    return _shifted(codes, _halves(raw[..., :2]), _halves(raw[..., 2:4]))


def q8_0(raw: Bytes) -> Unpacked:
    """``d * code``: float16 d; 32 signed bytes."""
    return _signed(_int8(raw[..., 2:]), 0, _halves(raw[..., :2]))


def q2_k(raw: Bytes) -> Unpacked:
    """``d * sc * code - dmin * m``: 16 bytes of sc and m, 4 bits each; 64 bytes of codes; float16 d, dmin."""
    steps, shifts = raw[..., :16] & 15, raw[..., :16] >> 4
    d, minimum = _halves(raw[..., 80:82]), _halves(raw[..., 82:84])
    return _shifted(_quarters(raw[..., 16:80]), d * steps, -(minimum * shifts))


def q3_k(raw: Bytes) -> Unpacked:
    """``d * (sc - 32) * (code - 4)``: 32 bytes of third bits; 64 bytes of codes; 12 bytes of sc; float16 d."""
    packed = raw[..., 96:108]
    low = _nibbles(packed[..., :8], 8)
    high = np.concatenate([packed[..., 8:] >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
    steps = (low | high << 4).astype(np.float32) - 32
    codes = _quarters(raw[..., 32:96]) | _planes(raw[..., :32]) << 2
    return _signed(codes, 4, _halves(raw[..., 108:110]) * steps)


def q4_k(raw: Bytes) -> Unpacked:
    """``d * sc * code - dmin * m``: float16 d, dmin; 12 bytes of sc and m, 6 bits each; 128 bytes of codes."""
    return _shifted(_nibbles(raw[..., 16:], 32), *_k_scales(raw))


def q5_k(raw: Bytes) -> Unpacked:
    """As Q4_K, with 32 bytes of fifth bits before the codes."""
    return _shifted(_nibbles(raw[..., 48:], 32) | _planes(raw[..., 16:48]) << 4, *_k_scales(raw))


def q6_k(raw: Bytes) -> Unpacked:
    """``d * sc * (code - 32)``: 128 bytes of lower bits; 64 bytes of upper bits; 16 signed bytes of sc; float16 d."""
    codes = _nibbles(raw[..., :128], 64) | _quarters(raw[..., 128:192]) << 4
    return _signed(codes, 32, _halves(raw[..., 208:210]) * _int8(raw[..., 192:208]))


def iq4_nl(raw: Bytes) -> Unpacked:
    """``d * value[code]``: float16 d; 16 bytes."""
    return _looked_up(IQ4_VALUES, _nibbles(raw[..., 2:], 16), _halves(raw[..., :2]))


def iq4_xs(raw: Bytes) -> Unpacked:
    """``d * (sc - 32) * value[code]``: float16 d; 2 bytes of upper and 4 of lower bits of sc; 128 bytes of codes."""
    high = np.stack([raw[..., 2 + place // 4] >> (2 * place % 8) & 3 for place in range(8)], axis=-1)
    low = np.stack([raw[..., 4 + place // 2] >> (4 * place % 8) & 15 for place in range(8)], axis=-1)
    steps = (low | high << 4).astype(np.float32) - 32
    return _looked_up(IQ4_VALUES, _nibbles(raw[..., 8:], 16), _halves(raw[..., :2]) * steps)


def mxfp4(raw: Bytes) -> Unpacked:
    """2^(e - 128) * value[code]: a byte e; 16 bytes."""
    return _looked_up(FP4_VALUES, _nibbles(raw[..., 1:], 16), _power_of_two(raw[..., :1].astype(np.int32) - 128))


def nvfp4(raw: Bytes) -> Unpacked:
    """``s / 2 * value[code], 16 weights a scale``: 4 bytes s, unsigned floats with four bits of exponent; 32 bytes."""
    byte = raw[..., :4] & 0x7F
    exponent, mantissa = (byte >> 3).astype(np.int32), (byte & 7).astype(np.float32)
    scales = np.where(
        exponent == 0, mantissa * np.float32(2**-10), (8 + mantissa) * _power_of_two(exponent - 11)
    ).astype(np.float32)
    scales[raw[..., :4] == 0x7F] = 0  # "not a number", which ggml reads as 0
    return _looked_up(FP4_VALUES, _nibbles(raw[..., 4:], 8), scales)


def tq1_0(raw: Bytes) -> Unpacked:
    """``d * (code - 1)``: 48 bytes of five codes, 4 bytes of four, as fractions in base 3; float16 d."""
    parts = []
    for start, end, digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        for place in range(digits):
            left = (raw[..., start:end].astype(np.uint16) * 3**place) & 0xFF
            parts.append(left * 3 >> 8)
    return _signed(np.concatenate(parts, axis=-1), 1, _halves(raw[..., 52:54]))


def tq2_0(raw: Bytes) -> Unpacked:
    """``d * (code - 1)``: 64 bytes of four codes; float16 d."""
    return _signed(_quarters(raw[..., :64]), 1, _halves(raw[..., 64:66]))


def _k_scales(raw: Bytes) -> tuple[Floats, Floats]:
    """Return d * sc and -dmin * m of a Q4_K or Q5_K block, each [rows, blocks, 8].

    The 12 bytes hold the lower six bits of the first four sc and m, then the lower four bits of the other sc and m in
    one byte each. Their upper two bits are the upper two bits of the first eight bytes.
    """
    low, high, mixed = raw[..., 4:8], raw[..., 8:12], raw[..., 12:16]
    steps = np.concatenate([low & 63, mixed & 15 | low >> 6 << 4], axis=-1)
    shifts = np.concatenate([high & 63, mixed >> 4 | high >> 6 << 4], axis=-1)
    return _halves(raw[..., :2]) * steps, -(_halves(raw[..., 2:4]) * shifts)


def _halves(raw: Bytes) -> Floats:
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _int8(raw: Bytes) -> npt.NDArray[np.int8]:
    return np.ascontiguousarray(raw).view(np.int8)


def _nibbles(raw: Bytes, run: int) -> Bytes:
    """Return the lower halves of each ``run`` bytes, then their upper halves: [.., bytes] -> [.., 2 * bytes]."""
    runs = raw.reshape(*raw.shape[:-1], -1, 1, run)
    return np.concatenate([runs & 15, runs >> 4], axis=-2).reshape(*raw.shape[:-1], -1)


def _quarters(raw: Bytes) -> Bytes:
    """Return the four pairs of bits of each 32 bytes, the lowest of all 32 first: [.., bytes] -> [.., 4 * bytes]."""
    runs = raw.reshape(*raw.shape[:-1], -1, 1, 32)
    return np.concatenate([runs >> shift & 3 for shift in (0, 2, 4, 6)], axis=-2).reshape(*raw.shape[:-1], -1)


def _planes(raw: Bytes) -> Bytes:
    """Return the bits of 32 bytes, the lowest of all 32 first: [.., 32] -> [.., 256]."""
    return np.concatenate([raw >> shift & 1 for shift in range(8)], axis=-1)


def _bits(raw: Bytes) -> Bytes:
    """Return the bits of bytes, byte by byte, the lowest of each first: [.., bytes] -> [.., 8 * bytes]."""
    return np.unpackbits(raw, axis=-1, bitorder="little")


def _power_of_two(exponents: npt.NDArray[np.int32]) -> Floats:
    return np.ldexp(np.float32(1), exponents).astype(np.float32)


def _signed(codes: npt.NDArray[np.integer], zero: int, scales: Floats) -> Unpacked:
    rows = len(codes)
    return Unpacked(codes.astype(np.int16).reshape(rows, -1) - np.int16(zero), scales.reshape(rows, -1))


def _shifted(codes: npt.NDArray[np.integer], scales: Floats, minima: Floats) -> Unpacked:
    rows = len(codes)
    return Unpacked(codes.astype(np.int16).reshape(rows, -1), scales.reshape(rows, -1), minima.reshape(rows, -1))


def _looked_up(values: Sequence[int], codes: Bytes, scales: Floats) -> Unpacked:
    return _signed(np.asarray(values, np.int16)[codes], 0, scales)
