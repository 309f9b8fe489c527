"""compressed-tensors, which llm-compressor and others write.

=====================  ==========================  =============================================================
tensor                 type, shape                 what it holds
=====================  ==========================  =============================================================
X.weight_packed        int32 [N, in * bits/32]     ``pack-quantized``: codes minus their middle, packed along the inputs
X.weight_shape         int64 [2]                   N and in
X.weight               int8 [N, in]                ``int-quantized``: the same, one a byte
X.weight               float8 [N, in]              ``float-quantized``: see fp8.py
X.weight_scale         [N, G], [N, 1] or [1]       one scale for each group, for each output, or for all
X.weight_zero_point    int32 [N * bits/32, G]      packed along the outputs; int8 [N, G] where codes are bytes
X.weight_g_idx         int32 [in]                  the group of each input, where they are reordered
=====================  ==========================  =============================================================

``config_groups`` describes each kind of matrix; which matrices have it is said by patterns of names, which are not run:
types and shapes say what each matrix is, and it must be as some group describes.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from shortstack.export.checkpoint.config import Config
from shortstack.export.checkpoint.quantized.codes import WORD_BITS, Grid, named, unpack
from shortstack.export.checkpoint.quantized.compressed_schemes import Scheme, read_schemes
from shortstack.export.checkpoint.quantized.fp8 import FP8_TYPES, FloatScale, fp8_matrix
from shortstack.export.checkpoint.quantized.input_order import read_order
from shortstack.export.checkpoint.quantized.stored import (
    SAME_REVISION,
    SCALE_TYPES,
    Quantized,
    QuantizedMatrix,
    StoredTensors,
    check_type,
    misfit,
    nothing_quantized,
    require,
    stems,
)
from shortstack.graphs.errors import CheckpointError
from shortstack.graphs.ir.block_tensor import BlockTensor, Codes, Order

TOOL = "compressed-tensors"
_ACTIVATIONS = (".input_scale", ".input_zero_point", ".output_scale", ".k_scale", ".v_scale", ".q_scale")
_BYTES = 8


def read_compressed_tensors(stored: StoredTensors, section: Config) -> Quantized:
    """Find the matrices that compressed-tensors holds; errors as :func:`dequantizable` says."""
    schemes = read_schemes(section)
    packed = stems(stored, ".weight_packed")
    scaled = stems(stored, ".weight_scale")
    if not packed and not scaled:
        raise nothing_quantized(stored, section, TOOL, "X.weight_packed, or X.weight with X.weight_scale")
    _check_complete(stored, packed, scaled)
    found: dict[str, QuantizedMatrix] = {}
    used: list[Scheme] = []
    are_packed = frozenset(packed)
    for layer in scaled:
        if layer in are_packed:
            scheme, matrix = _packed(stored, schemes, layer)
        else:
            scheme, matrix = _whole(stored, section, schemes, layer)
        found[f"{layer}.weight"] = matrix
        used.append(scheme)
    weights = {scheme.weights for scheme in used}
    if absent := [scheme.where for scheme in schemes if scheme.weights not in weights]:
        raise CheckpointError(
            f"{absent[0]} describes weights that no tensor of {stored.folder_or_file} is",
            expected="a matrix of that type, those bits and that strategy",
            remedy=f"finish the download, or {SAME_REVISION}",
        )
    unread = frozenset(name for name in stored.names() if name.endswith(_ACTIVATIONS))
    return Quantized(found, unread, _notes(section, schemes))


def _notes(section: Config, schemes: list[Scheme]) -> tuple[str, ...]:
    notes = []
    if any(scheme.rounds_inputs for scheme in schemes):
        notes.append(
            f"{TOOL} quantizes the inputs of matrices, too; a bundle has the weights of the checkpoint and does not "
            "round their inputs in that way, so its output differs a little"
        )
    if section.section("kv_cache_scheme") is not None:
        notes.append(f"the scales of a quantized cache are not used: `{section.where('kv_cache_scheme')}`")
    return tuple(notes)


def _check_complete(stored: StoredTensors, packed: list[str], scaled: list[str]) -> None:
    names = stored.names()
    wanted = [f"{layer}.{part}" for layer in packed for part in ("weight_scale", "weight_shape")]
    wanted += [f"{x}.weight_packed" for part in ("weight_shape", "weight_g_idx") for x in stems(stored, f".{part}")]
    wanted += [f"{layer}.weight_scale" for layer in stems(stored, ".weight_zero_point")]
    wanted += [f"{x}.weight" for x in scaled if not {f"{x}.weight_packed", f"{x}.weight_shape"} & names]
    require(stored, wanted, "all parts of a matrix")


def _packed(stored: StoredTensors, schemes: list[Scheme], layer: str) -> tuple[Scheme, QuantizedMatrix]:
    packed, shape, scale = (f"{layer}.{part}" for part in ("weight_packed", "weight_shape", "weight_scale"))
    check_type(stored, packed, ("I32",))
    check_type(stored, shape, ("I64", "I32"))
    if stored.shape(shape) != (2,):
        raise misfit(stored, shape, "two numbers")
    rows, width = (int(size) for size in stored.raw(shape))
    said = f"{rows} x {width}, as {shape} says"
    if len(stored.shape(packed)) != 2 or rows < 1 or width < 1 or stored.shape(packed)[0] != rows:
        raise misfit(stored, packed, f"{rows} rows for {said}")
    words = stored.shape(packed)[1]
    fitting = [s for s in schemes if s.kind == "int" and -(-width * s.bits // WORD_BITS) == words]
    if not fitting:
        bits = words * WORD_BITS / width
        expected = f"{bits:g} bits, as {stored.where(packed)} of shape {[rows, words]} has for {said}"
        raise _unlike(schemes, expected)
    scheme = _fitting(stored, fitting, layer, (rows, width))
    zero_point, g_idx = f"{layer}.weight_zero_point", f"{layer}.weight_g_idx"
    order = _order(stored, scheme, g_idx, width)
    is_symmetric = _check_zero_points(stored, scheme, zero_point, stored.shape(scale), rows)
    return scheme, _matrix(stored, scheme, layer, (rows, width), is_symmetric, order)


def _whole(stored: StoredTensors, section: Config, schemes: list[Scheme], layer: str) -> tuple[Scheme, QuantizedMatrix]:
    """Find a matrix that is stored one code a byte."""
    weight, scale = f"{layer}.weight", f"{layer}.weight_scale"
    check_type(stored, weight, ("I8", *FP8_TYPES))
    if len(stored.shape(weight)) != 2:
        raise misfit(stored, weight, "two dimensions")
    rows, width = stored.shape(weight)
    kind = "int" if stored.stored_type(weight) == "I8" else "float"
    fitting = [scheme for scheme in schemes if scheme.kind == kind and scheme.bits == _BYTES]
    if not fitting:
        expected = f"{kind} of 8 bits, as {stored.where(weight)} is {stored.stored_type(weight)}"
        raise _unlike(schemes, expected)
    if kind == "float":
        shapes = [FloatScale(s.blocks, is_row=s.strategy == "channel") for s in fitting]
        matrix, number = fp8_matrix(stored, section, layer, "weight_scale", shapes, TOOL)
        return fitting[number], matrix
    scheme = _fitting(stored, fitting, layer, (rows, width))
    zero_point = f"{layer}.weight_zero_point"
    is_symmetric = _check_zero_points(stored, scheme, zero_point, stored.shape(scale), rows)
    return scheme, _matrix(stored, scheme, layer, (rows, width), is_symmetric, None)


def _unlike(schemes: list[Scheme], expected: str) -> CheckpointError:
    found = ", ".join(f"{scheme.kind}{scheme.bits}" for scheme in schemes)
    where = f"{schemes[0].where}.num_bits"
    return CheckpointError(where, found=found, expected=expected, remedy=SAME_REVISION)


def _fitting(stored: StoredTensors, schemes: list[Scheme], layer: str, shape: tuple[int, int]) -> Scheme:
    """Return the scheme whose scales have the shape that is stored; of several, the one with the parts that are."""
    scale, names = f"{layer}.weight_scale", stored.names()
    check_type(stored, scale, SCALE_TYPES)
    found = stored.shape(scale)
    fitting = [scheme for scheme in schemes if scheme.has_scales(found, shape)]
    if fitting:
        is_symmetric, is_reordered = f"{layer}.weight_zero_point" not in names, f"{layer}.weight_g_idx" in names
        return max(fitting, key=lambda s: (s.symmetric == is_symmetric) + (s.is_reordered == is_reordered))
    scheme = schemes[0]
    expected = f"scales of shape {list(found)}, as {stored.where(scale)} has for a matrix {shape[0]} x {shape[1]}"
    raise CheckpointError(
        f"{scheme.where}.{'group_size' if scheme.strategy == 'group' else 'strategy'}",
        found=f"groups of {scheme.group}" if scheme.strategy == "group" else scheme.strategy,
        expected=expected,
        remedy=SAME_REVISION,
    )


def _order(stored: StoredTensors, scheme: Scheme, g_idx: str, width: int) -> Order | None:
    if g_idx not in stored.names():
        if scheme.is_reordered:
            require(stored, [g_idx], f"the group of each column, as {scheme.where}.actorder says")
        return None
    order = read_order(stored, g_idx, width, scheme.group)
    if order is not None and not scheme.is_reordered:
        raise CheckpointError(
            f"{scheme.where}.actorder", found="none", expected=f"group, as {stored.where(g_idx)} is not in order",
            remedy=SAME_REVISION,
        )  # fmt: skip
    return order


def _check_zero_points(stored: StoredTensors, scheme: Scheme, name: str, scales: tuple[int, ...], rows: int) -> bool:
    """Check a matrix's zero points, and return whether it has none.

    Raises:
        CheckpointError: They are missing, misshapen or out of range, or there although the config says none are.
    """
    if name not in stored.names():
        if not scheme.symmetric:
            require(stored, [name], f"zero points, as {scheme.where}.symmetric is false")
        return True
    groups = scales[1] if len(scales) == 2 else 1
    check_type(stored, name, ("I32", "I8"))
    if stored.stored_type(name) == "I32":
        wanted: tuple[int, ...] = (-(-rows * scheme.bits // WORD_BITS), groups)
    else:
        wanted = scales
    if stored.shape(name) != wanted:
        raise misfit(stored, name, f"shape {list(wanted)}")
    zeros = _zero_points(stored, name, scheme.bits, rows).astype(np.int64)
    top, middle = (1 << scheme.bits) - 1, 1 << (scheme.bits - 1)
    wrong = zeros[(zeros < 0) | (zeros > top) | (scheme.symmetric & (zeros != middle))]
    if wrong.size:
        raise CheckpointError(
            stored.where(name),
            found=f"the zero point {wrong[0] - middle}",
            expected=f"0 everywhere, as {scheme.where}.symmetric says"
            if scheme.symmetric
            else f"{-middle}..{middle - 1}",
            remedy=SAME_REVISION,
        )
    return scheme.symmetric


def _zero_points(stored: StoredTensors, name: str, bits: int, rows: int) -> np.ndarray:
    """Return zero points as codes, [N, G] or [G']; those out of range are not wrapped."""
    value = stored.raw(name)
    if value.dtype == np.int8:
        return value.astype(np.int16) + np.int16(1 << (bits - 1))
    return unpack(value.T, bits).T[:rows]


def _matrix(
    stored: StoredTensors,
    scheme: Scheme,
    layer: str,
    shape: tuple[int, int],
    is_symmetric: bool,
    order: Order | None,
) -> QuantizedMatrix:
    grid = Grid(scheme.bits, is_symmetric, shape[1] if scheme.group == -1 else scheme.group, order)
    names = stored.names()
    parts = ("weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx", "weight")
    read = partial(_read, stored, layer, shape, grid)
    kind = named(TOOL, scheme.bits, scheme.group, is_reordered=order is not None)
    return QuantizedMatrix(
        kind if scheme.strategy != "tensor" else f"{TOOL} int{scheme.bits}, one scale",
        shape,
        tuple(f"{layer}.{part}" for part in parts if f"{layer}.{part}" in names),
        lambda: read().dequantize(),
        read,
        grid.format,
        order,
    )


def _read(stored: StoredTensors, layer: str, shape: tuple[int, int], grid: Grid) -> BlockTensor:
    rows, width = shape
    if f"{layer}.weight_packed" in stored.names():
        codes: Codes = unpack(stored.raw(f"{layer}.weight_packed"), grid.bits)[:, :width]
    else:  # adding 128 to an int8 flips the sign bit of the byte
        codes = stored.raw(f"{layer}.weight").view(np.uint8) ^ np.uint8(0x80)
    scales = _by_row(stored.raw(f"{layer}.weight_scale").astype(np.float32), rows)
    zeros = None
    if not grid.is_symmetric:
        found = _zero_points(stored, f"{layer}.weight_zero_point", grid.bits, rows).astype(np.uint8)
        zeros = _by_row(found, rows)
    return grid.blocks(codes, scales, zeros)


def _by_row(values: np.ndarray, rows: int) -> np.ndarray:
    """Return values [N, G], or one for all, as [N, G]."""
    return np.broadcast_to(values.reshape(1, 1), (rows, 1)) if values.size == 1 else values.reshape(rows, -1)
