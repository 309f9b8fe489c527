"""8-bit floats, e4m3, with a scale for a block, a row or a whole matrix.

==========================  ======================  ================================================================
tensor                      type, shape             what it holds
==========================  ======================  ================================================================
X.weight                    float8_e4m3 [N, in]     the weight divided by its scale
X.weight_scale_inv          [N / 128, in / 128]     scales of blocks, as DeepSeek and Qwen publish them; multiplied, in
                                                    spite of the name
X.weight_scale              [N, 1], [N] or []       scales of rows, or of the matrix
==========================  ======================  ================================================================

The matrices are dequantized: the numbers span 18 powers of two, which no code of 8 bits does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import ml_dtypes
import numpy as np
import numpy.typing as npt

from shortstack.export.checkpoint.config import Config
from shortstack.export.checkpoint.quantized.stored import (
    SCALE_TYPES,
    Floats,
    Quantized,
    QuantizedMatrix,
    StoredTensors,
    check_type,
    contradiction,
    misfit,
    nothing_quantized,
    require,
)

FP8_TYPES = ("F8_E4M3",)
_SCALES = ("weight_scale_inv", "weight_scale")
_ACTIVATIONS = (".input_scale", ".activation_scale", ".input_scale_ub", ".k_scale", ".v_scale")
_POWERS = "F8_E8M0"


@dataclass(frozen=True, slots=True)
class FloatScale:
    """What shares a scale.

    Attributes:
        blocks: Rows and columns of a block; None without blocks.
        is_row: A row; else the whole matrix.
    """

    blocks: tuple[int, int] | None = None
    is_row: bool = False

    def fits(self, scales: tuple[int, ...], shape: tuple[int, int]) -> bool:
        """Whether scales have this shape for a matrix."""
        rows, width = shape
        if self.blocks is not None:
            return scales == (-(-rows // self.blocks[0]), -(-width // self.blocks[1]))
        return scales in ((rows, 1), (rows,)) if self.is_row else scales in ((), (1,), (1, 1))

    def __str__(self) -> str:
        if self.blocks is not None:
            return f"blocks of {self.blocks[0]}x{self.blocks[1]}"
        return "one scale a row" if self.is_row else "one scale"


def read_fp8(stored: StoredTensors, section: Config) -> Quantized:
    """Find the matrices that are 8-bit floats; errors as :func:`dequantizable` says."""
    blocks = None
    if "weight_block_size" in section:
        sizes = section.read_ints("weight_block_size")
        if len(sizes) != 2 or min(sizes) < 1:
            raise section.wrong("weight_block_size", "two positive sizes")
        blocks = sizes[0], sizes[1]
    scales = [FloatScale(blocks)] if blocks is not None else [FloatScale(), FloatScale(is_row=True)]
    names = stored.names()
    layers = sorted(n.removesuffix(".weight") for n in names if n.endswith(".weight") and _is_fp8(stored, n))
    if not layers:
        raise nothing_quantized(stored, section, "fp8", "X.weight of type F8_E4M3")
    orphans = [name for name in names if name.endswith(tuple(f".{scale}" for scale in _SCALES))]
    require(stored, [f"{name.rsplit('.', 1)[0]}.weight" for name in orphans], "a weight for each scale")
    found = {}
    for layer in layers:
        part = next((scale for scale in _SCALES if f"{layer}.{scale}" in names), _SCALES[blocks is None])
        found[f"{layer}.weight"] = fp8_matrix(stored, section, layer, part, scales, "fp8")[0]
    if unscaled := [name for name in orphans if f"{name.rsplit('.', 1)[0]}.weight" not in found]:
        weight = f"{unscaled[0].rsplit('.', 1)[0]}.weight"
        check_type(stored, weight, FP8_TYPES)
    return Quantized(found, frozenset(name for name in names if name.endswith(_ACTIVATIONS)))


def fp8_matrix(
    stored: StoredTensors, section: Config, layer: str, part: str, scales: Sequence[FloatScale], tool: str
) -> tuple[QuantizedMatrix, int]:
    """Find one matrix.

    Args:
        stored: The folder.
        section: The config.
        layer: What its tensors are called before ``.weight``.
        part: What its scales are called after that.
        scales: The shapes that its scales may have.
        tool: What has made it.

    Returns:
        The matrix, and which of the shapes it is.
    """
    weight, scale = f"{layer}.weight", f"{layer}.{part}"
    require(stored, [scale], f"the scales of {weight}")
    check_type(stored, scale, (*SCALE_TYPES, _POWERS))
    if len(stored.shape(weight)) != 2:
        raise misfit(stored, weight, "two dimensions")
    rows, width = shape = (stored.shape(weight)[0], stored.shape(weight)[1])
    if 0 in shape:
        raise misfit(stored, weight, "no empty dimension")
    number = next((i for i, kind in enumerate(scales) if kind.fits(stored.shape(scale), shape)), None)
    if number is None:
        if scales[0].blocks is not None and "weight_block_size" in section:
            where = stored.where(scale)
            expected = f"blocks of which {where} of shape {list(stored.shape(scale))} has one scale each"
            raise contradiction(section, "weight_block_size", expected)
        raise misfit(stored, scale, " or ".join(map(str, scales)) + f" for a matrix {rows} x {width}")
    kind = scales[number]
    name = f"fp8, {kind}" if tool == "fp8" else f"{tool} fp8, {kind}"
    return QuantizedMatrix(name, shape, (weight, scale), partial(_floats, stored, weight, scale, kind)), number


def _floats(stored: StoredTensors, weight: str, scale: str, kind: FloatScale) -> Floats:
    """Return weights times scales, float32 [rows, width]."""
    values = np.asarray(stored.raw(weight).view(ml_dtypes.float8_e4m3fn), np.float32)
    scales = _scales(stored, scale)
    if kind.blocks is not None:
        rows, width = kind.blocks
        scales = np.repeat(np.repeat(scales, rows, axis=0), width, axis=1)[: values.shape[0], : values.shape[1]]
    else:
        scales = scales.reshape(-1, 1)
    return np.asarray(values * scales, np.float32)


def _scales(stored: StoredTensors, name: str) -> Floats:
    value: npt.NDArray[np.generic] = stored.raw(name)
    if stored.stored_type(name) == _POWERS:
        value = value.view(ml_dtypes.float8_e8m0fnu)
    return np.asarray(value, np.float32)


def _is_fp8(stored: StoredTensors, name: str) -> bool:
    return stored.stored_type(name) in FP8_TYPES
