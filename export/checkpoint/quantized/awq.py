"""AWQ, as AutoAWQ stores it for its ``gemm`` kernels.

==========  ====================  ======================================================================
tensor      type, shape           what it holds
==========  ====================  ======================================================================
X.qweight   int32 [in, N / 8]     4-bit codes, packed along the outputs N
X.qzeros    int32 [G, N / 8]      zero points, packed in the same way
X.scales    float16 [G, N]        one scale for each group of inputs and each output
==========  ====================  ======================================================================

The eight codes of a word are not in the order of their columns: from the lowest bits on they are columns 0, 2, 4, 6, 1,
3, 5, 7. Zero points are stored as they are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from shortstack.export.checkpoint.config import Config, not_one_of
from shortstack.export.checkpoint.quantized.codes import Grid, group_count, is_group_size, named, unpack
from shortstack.export.checkpoint.quantized.stored import (
    SCALE_TYPES,
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
from shortstack.graphs.ir.block_tensor import BlockTensor, Codes

TOOL = "AWQ"
_BITS, _PER_WORD = 4, 8
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word each of eight columns is, in units of four bits."""


def read_awq(stored: StoredTensors, section: Config) -> Quantized:
    """Find the matrices that AWQ has quantized; errors as :func:`dequantizable` says."""
    version = section.read(str, "version", section.read(str, "checkpoint_format", "gemm")).lower()
    if version != "gemm":
        raise not_one_of(section.where("version"), version, ("gemm",), "save the model again with version gemm")
    bits = section.read(int, "bits", section.read(int, "w_bit", _BITS))
    if bits != _BITS:
        raise not_one_of(section.where("bits"), str(bits), (str(_BITS),), "take a file of 4 bits")
    group = section.read(int, "group_size", section.read(int, "q_group_size", 128))
    if not is_group_size(group):
        raise section.wrong("group_size", "-1 or a multiple of 32")
    layers = stems(stored, ".qweight")
    if not layers:
        raise nothing_quantized(stored, section, TOOL, "X.qweight")
    parts = [f"{layer}.{part}" for layer in layers for part in ("qzeros", "scales")]
    require(stored, [*parts, *(f"{layer}.qweight" for layer in stems(stored, ".qzeros"))], "all parts of a matrix")
    if divided := [name for name in sorted(stored.names()) if name.endswith(".act.scales")]:
        raise UnsupportedError(
            f"{stored.where(divided[0])} divides activations, which this version does not compute",
            remedy="export the model that it was made from, then shrink the bundle with `shortstack quantize`",
        )
    return Quantized({f"{layer}.weight": _matrix(stored, section, group, layer) for layer in layers})


def _matrix(stored: StoredTensors, section: Config, group: int, layer: str) -> QuantizedMatrix:
    qweight, qzeros, scales = parts = tuple(f"{layer}.{part}" for part in ("qweight", "qzeros", "scales"))
    for name, types in ((qweight, ("I32",)), (qzeros, ("I32",)), (scales, SCALE_TYPES)):
        check_type(stored, name, types)
        if len(stored.shape(name)) != 2:
            raise misfit(stored, name, "two dimensions")
    (width, words), (count, rows) = stored.shape(qweight), stored.shape(scales)
    if words * _PER_WORD != rows:
        remedy = "set quant_method to gptq if GPTQ has made the tensors" if words == rows else None
        expected = f"[in, {rows // _PER_WORD}], eight of the {rows} columns of {scales} in a word"
        raise misfit(stored, qweight, expected, remedy)
    if stored.shape(qzeros) != (count, words):
        raise misfit(stored, qzeros, f"shape {[count, words]}, as {qweight} and {scales} have")
    if group_count(width, group) != count:
        expected = f"a size that cuts {width} columns into {count} groups, as {stored.where(scales)} has"
        raise contradiction(section, "group_size", expected)
    grid = Grid(_BITS, is_symmetric=False, group=width if group == -1 else group)
    read = partial(_read, stored, layer, grid)
    return QuantizedMatrix(
        named(TOOL, _BITS, group), (rows, width), parts, lambda: read().dequantize(), read, grid.format
    )


def _read(stored: StoredTensors, layer: str, grid: Grid) -> BlockTensor:
    codes, zeros = (_in_order(stored.raw(f"{layer}.{part}")).T for part in ("qweight", "qzeros"))
    return grid.blocks(codes, stored.raw(f"{layer}.scales").astype(np.float32).T, zeros)


def _in_order(words: npt.NDArray[Any]) -> Codes:
    """Unpack words [n, words] along the outputs, [n, words * 8]."""
    codes = unpack(words, _BITS).reshape(len(words), -1, _PER_WORD)
    return codes[..., _PLACES].reshape(len(words), -1)
