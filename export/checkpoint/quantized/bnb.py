"""bitsandbytes: nf4, fp4 and int8.

======================================  =================  =====================================================
tensor                                  type, shape        what it holds
======================================  =================  =====================================================
X.weight                                uint8 [n / 2, 1]   codes of 4 bits, row by row, the higher half first
X.weight.absmax                         [blocks]           the largest magnitude of each block of 64; uint8 if nested
X.weight.quant_map                      float32 [16]       what the codes stand for
X.weight.nested_absmax, _quant_map      float32            the same of ``absmax``, in blocks of 256
X.weight.quant_state.bitsandbytes__nf4  uint8              JSON: the shape, the sizes of blocks, an offset of absmax
X.weight                                int8 [N, in]       int8: weight = SCB / 127 * code
X.SCB                                   float32 [N]        the largest magnitude of each row
======================================  =================  =====================================================

The matrices are dequantized: the values of nf4 and fp4 are not evenly spaced.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np
import numpy.typing as npt

from shortstack.export.checkpoint.config import Config, parse_json_object, positive
from shortstack.export.checkpoint.quantized.stored import (
    Floats,
    Quantized,
    QuantizedMatrix,
    StoredTensors,
    check_type,
    contradiction,
    misfit,
    nothing_quantized,
    require,
    stems,
)
from shortstack.graphs.errors import UnsupportedError

TOOL = "bitsandbytes"
_KINDS = ("nf4", "fp4")
_STATE = ".weight.quant_state.bitsandbytes__"
_STORAGE_BYTES = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4}
"""The bytes of each type that codes may be packed in."""

_CODES = 16
_LARGEST = 127


def read_bitsandbytes(stored: StoredTensors, section: Config) -> Quantized:
    """Find the matrices that bitsandbytes has quantized; errors as :func:`dequantizable` says."""
    small = {layer: kind for kind in _KINDS for layer in stems(stored, f"{_STATE}{kind}")}
    large = stems(stored, ".SCB")
    parts = [f"{layer}.weight{part}" for layer in small for part in ("", ".absmax", ".quant_map")]
    require(stored, [*parts, *(f"{layer}.weight" for layer in large)], "all parts of a matrix")
    if orphans := [layer for layer in stems(stored, ".weight.absmax") if layer not in small]:
        require(stored, [f"{layer}{_STATE}nf4" for layer in orphans], "the description of a matrix")
    if not small and not large:
        raise nothing_quantized(stored, section, TOOL, "X.weight.absmax or X.SCB")
    for key, found, other in (("load_in_4bit", small, large), ("load_in_8bit", large, small)):
        if section.read(bool, key, False) and not found:
            raise contradiction(section, key, f"false, as matrices such as {next(iter(other))} are not")
    matrices = {f"{layer}.weight": _of_4_bits(stored, layer, kind) for layer, kind in small.items()}
    matrices |= {f"{layer}.weight": _of_8_bits(stored, layer) for layer in large}
    unread = frozenset(f"{layer}.weight_format" for layer in large) & stored.names()
    return Quantized(matrices, unread)


@dataclass(frozen=True, slots=True)
class _State:
    """What the JSON of a matrix says.

    Attributes:
        shape: Rows and width.
        block: Weights that share a magnitude.
        nested_block: Magnitudes that share one; 0 where they are floats.
        offset: What is added to nested magnitudes.
    """

    shape: tuple[int, int]
    block: int
    nested_block: int
    offset: float


def _of_4_bits(stored: StoredTensors, layer: str, kind: str) -> QuantizedMatrix:
    weight, described = f"{layer}.weight", f"{layer}{_STATE}{kind}"
    absmax, quant_map = f"{weight}.absmax", f"{weight}.quant_map"
    nested = f"{weight}.nested_absmax", f"{weight}.nested_quant_map"
    check_type(stored, described, ("U8",))
    check_type(stored, quant_map, ("F32",))
    check_type(stored, absmax, ("U8", "F32"))
    is_nested = stored.stored_type(absmax) == "U8"
    state = _read_state(stored, described, is_nested)
    count = state.shape[0] * state.shape[1]
    check_type(stored, weight, tuple(_STORAGE_BYTES))
    if prod(stored.shape(weight)) * _STORAGE_BYTES[stored.stored_type(weight)] != -(-count // 2):
        raise misfit(stored, weight, f"{-(-count // 2)} bytes for {state.shape[0]} x {state.shape[1]} codes of 4 bits")
    if stored.shape(quant_map) != (_CODES,):
        raise misfit(stored, quant_map, f"shape {[_CODES]}")
    blocks = -(-count // state.block)
    if stored.shape(absmax) != (blocks,):
        raise misfit(stored, absmax, f"shape {[blocks]}, blocks of {state.block}")
    parts = [weight, absmax, quant_map, described]
    if is_nested:
        require(stored, nested, f"the magnitudes behind {absmax}")
        for name, size in zip(nested, (-(-blocks // state.nested_block), 256), strict=True):
            check_type(stored, name, ("F32",))
            if stored.shape(name) != (size,):
                raise misfit(stored, name, f"shape {[size]}")
        parts += nested
    return QuantizedMatrix(f"{TOOL} {kind}", state.shape, tuple(parts), partial(_floats, stored, weight, state))


def _read_state(stored: StoredTensors, name: str, is_nested: bool) -> _State:
    where = stored.where(name)
    data = Config(parse_json_object(stored.raw(name).tobytes(), where), where)
    shape = data.read_ints("shape")
    if len(shape) != 2 or min(shape) < 1 or max(shape) >= 1 << 31:
        raise data.wrong("shape", "two positive sizes")
    nested = positive(data, "nested_blocksize") if is_nested else 0
    offset = data.read(float, "nested_offset", 0.0) if is_nested else 0.0
    return _State((shape[0], shape[1]), positive(data, "blocksize"), nested, offset)


def _floats(stored: StoredTensors, weight: str, state: _State) -> Floats:
    """Return quant_map[code] * absmax, float32 [rows, width]."""
    count = state.shape[0] * state.shape[1]
    packed = np.ascontiguousarray(stored.raw(weight)).reshape(-1).view(np.uint8)
    codes = np.stack([packed >> 4, packed & 0x0F], axis=1).reshape(-1)[:count]
    absmax: npt.NDArray[np.generic] = stored.raw(f"{weight}.absmax")
    if state.nested_block:
        inner = np.repeat(stored.raw(f"{weight}.nested_absmax"), state.nested_block)[: len(absmax)]
        absmax = stored.raw(f"{weight}.nested_quant_map")[absmax] * inner + np.float32(state.offset)
    values = stored.raw(f"{weight}.quant_map")[codes] * np.repeat(absmax, state.block)[:count]
    return np.asarray(values, np.float32).reshape(state.shape)


def _of_8_bits(stored: StoredTensors, layer: str) -> QuantizedMatrix:
    weight, scb, layout = f"{layer}.weight", f"{layer}.SCB", f"{layer}.weight_format"
    check_type(stored, weight, ("I8",))
    check_type(stored, scb, ("F32",))
    if len(stored.shape(weight)) != 2:
        raise misfit(stored, weight, "two dimensions")
    rows, width = stored.shape(weight)
    if stored.shape(scb) != (rows,):
        raise misfit(stored, scb, f"shape {[rows]}")
    if layout in stored.names() and (found := int(np.asarray(stored.raw(layout)).reshape(-1)[0])) != 0:
        raise UnsupportedError(
            stored.where(layout), found=f"layout {found}", expected="0, rows", remedy="save the model again"
        )
    return QuantizedMatrix(f"{TOOL} int8", (rows, width), (weight, scb), partial(_rows, stored, weight, scb))


def _rows(stored: StoredTensors, weight: str, scb: str) -> Floats:
    scale = stored.raw(scb).astype(np.float32) / np.float32(_LARGEST)
    return np.asarray(stored.raw(weight).astype(np.float32) * scale[:, None], np.float32)
