"""GPTQ, as AutoGPTQ, GPTQModel and optimum store it.

==========  =======================  ==================================================================
tensor      type, shape              what it holds
==========  =======================  ==================================================================
X.qweight   int32 [in * bits/32, N]  codes, packed along the inputs, lowest bits first
X.qzeros    int32 [G, N * bits/32]   zero points, packed along the outputs N in the same way
X.scales    float16 [G, N]           one scale for each group of inputs and each output
X.g_idx     int32 [in]               the group of each input; not in the oldest files
==========  =======================  ==================================================================

Files of the first version (``checkpoint_format`` ``gptq``, the default) hold each zero point minus one, those of the
second version (``gptq_v2``) the zero point itself. GPTQModel subtracts the ones from whole words, so that a zero point
of 0 borrows from its neighbour; adding them to whole words brings all of them back. Other tools leave no way back:
there a stored zero point of all ones is refused. ``dynamic`` lists matrices with other settings by patterns of their
names; the patterns are not run, since shapes say what each matrix is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from shortstack.export.checkpoint.config import Config, not_one_of
from shortstack.export.checkpoint.quantized.codes import (
    WIDTHS,
    WORD_BITS,
    Grid,
    group_count,
    is_group_size,
    named,
    unpack,
)
from shortstack.export.checkpoint.quantized.input_order import read_order
from shortstack.export.checkpoint.quantized.stored import (
    SAME_REVISION,
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
    stems,
)
from shortstack.graphs.errors import CheckpointError
from shortstack.graphs.ir.block_tensor import BlockTensor, Codes

T = TypeVar("T", int, bool)

TOOL = "GPTQ"
_FORMATS = {"gptq": 1, "gptq_v2": 0}
"""What is added to a stored zero point, by ``checkpoint_format``."""

_BORROWS = "gptqmodel"  # in ``meta.quantizer``


@dataclass(frozen=True, slots=True)
class Settings:
    """What a config says: the values for most matrices first, then those that some have.

    Attributes:
        bits: Bits of a code.
        groups: Columns that share a scale; -1 for all.
        symmetric: Whether all zero points are the middle code; empty if it does not say.
        act_order: Whether columns may belong to any group; empty if it does not say.
        added: What is added to a stored zero point.
        borrows: It is added to whole words.
    """

    bits: tuple[int, ...]
    groups: tuple[int, ...]
    symmetric: tuple[bool, ...]
    act_order: tuple[bool, ...]
    added: int
    borrows: bool


def read_gptq(stored: StoredTensors, section: Config) -> Quantized:
    """Find the matrices that GPTQ has quantized; errors as :func:`dequantizable` says."""
    settings = read_settings(section)
    layers = stems(stored, ".qweight")
    if not layers:
        raise nothing_quantized(stored, section, TOOL, "X.qweight")
    _check_complete(stored, layers)
    found = {f"{layer}.weight": _matrix(stored, section, settings, layer) for layer in layers}
    _check_described(section, settings, stored, layers)
    may_be_sorted = section.read(bool, "static_groups", False) or -1 in settings.groups
    if settings.act_order == (True,) and not may_be_sorted and all(m.order is None for m in found.values()):
        said = "false, as each input stands in its own group in every g_idx"
        if not all(m.shape[1] <= settings.groups[0] for m in found.values()):
            raise contradiction(section, "desc_act", said)
    return Quantized(found)


def read_settings(section: Config) -> Settings:
    """Read the config.

    Raises:
        CheckpointError: A field is missing or no valid value.
        UnsupportedError: A layout that is not read.
    """
    name = section.read(str, "checkpoint_format", section.read(str, "format", "gptq"))
    if section.read(bool, "is_marlin_format", False):
        name = "marlin"
    if name not in _FORMATS:
        raise not_one_of(section.where("checkpoint_format"), name, _FORMATS, "save the model again in one of these")
    parts = [section]
    dynamic = section.section("dynamic")
    for pattern in () if dynamic is None else dynamic.data:
        own = None if dynamic is None else dynamic.section(pattern)
        if own is not None and not pattern.startswith("-:"):  # those are matrices that stay floats
            parts.append(own)
    bits, groups = [section.read(int, "bits")], [section.read(int, "group_size", 128)]
    symmetric: list[bool] = []
    act_order: list[bool] = []
    for part in parts:
        bits.append(part.read(int, "bits", bits[0]))
        groups.append(part.read(int, "group_size", groups[0]))
        if bits[-1] not in WIDTHS:
            raise not_one_of(part.where("bits"), str(bits[-1]), map(str, WIDTHS), "take a file of one of these widths")
        if not is_group_size(groups[-1]):
            raise part.wrong("group_size", "-1 or a multiple of 32")
        for key, values in (("sym", symmetric), ("desc_act", act_order)):
            if (value := part.read(bool, key, None)) is not None:
                values.append(value)
    meta = section.section("meta")
    made_by = "" if meta is None else str(meta.data.get("quantizer"))
    return Settings(
        _once(bits), _once(groups), _once(symmetric), _once(act_order), _FORMATS[name], _BORROWS in made_by.lower()
    )


def _once(values: Iterable[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(values))


def _check_complete(stored: StoredTensors, layers: Sequence[str]) -> None:
    require(stored, [f"{layer}.{part}" for layer in layers for part in ("qzeros", "scales")], "all parts of a matrix")
    orphans = [f"{layer}.qweight" for part in ("qzeros", "g_idx") for layer in stems(stored, f".{part}")]
    require(stored, orphans, "all parts of a matrix")


def _matrix(stored: StoredTensors, section: Config, settings: Settings, layer: str) -> QuantizedMatrix:
    qweight, qzeros, scales, g_idx = (f"{layer}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx"))
    for name, types in ((qweight, ("I32",)), (qzeros, ("I32",)), (scales, SCALE_TYPES)):
        check_type(stored, name, types)
        if len(stored.shape(name)) != 2:
            raise misfit(stored, name, "two dimensions")
    (count, rows), (packed, columns), (zero_rows, zero_words) = map(stored.shape, (scales, qweight, qzeros))
    if columns != rows:
        raise misfit(stored, qweight, f"{rows} columns, as {scales} has")
    if zero_rows != count:
        raise misfit(stored, qzeros, f"{count} rows, as {scales} has")
    bits = zero_words * WORD_BITS // rows
    if bits not in WIDTHS or zero_words * WORD_BITS != bits * rows:
        raise misfit(stored, qzeros, f"[{count}, {rows * settings.bits[0] // WORD_BITS}] for {settings.bits[0]} bits")
    if bits not in settings.bits:
        expected = f"{bits}, as {stored.where(qzeros)} of shape {[zero_rows, zero_words]} has"
        raise contradiction(section, "bits", expected)
    width = packed * WORD_BITS // bits
    if width * bits != packed * WORD_BITS:
        raise misfit(stored, qweight, f"whole codes of {bits} bits in each column")
    group = next((g for g in settings.groups if group_count(width, g) == count), None)
    if group is None:
        expected = f"a size that cuts {width} columns into {count} groups, as {stored.where(scales)} has"
        raise contradiction(section, "group_size", expected)
    order, is_indexed = None, g_idx in stored.names()
    if is_indexed:
        order = read_order(stored, g_idx, width, group)
    elif settings.act_order == (True,):
        require(stored, [g_idx], "the group of each column, as desc_act is true")
    if order is not None and settings.act_order and True not in settings.act_order:
        raise contradiction(section, "desc_act", f"true, as {stored.where(g_idx)} is not in ascending order")
    is_symmetric = _check_zero_points(stored, qzeros, bits, settings)
    grid = Grid(bits, is_symmetric, width if group == -1 else group, order)
    read = partial(_read, stored, layer, grid, settings)
    return QuantizedMatrix(
        named(TOOL, bits, group, is_reordered=order is not None),
        (rows, width),
        (qweight, qzeros, scales, *([g_idx] if is_indexed else [])),
        lambda: read().dequantize(),
        read,
        grid.format,
        order,
    )


def _check_zero_points(stored: StoredTensors, qzeros: str, bits: int, settings: Settings) -> bool:
    """Check a matrix's zero points, and return whether all are the middle code and need not be stored.

    Raises:
        CheckpointError: One is out of range, or is not the middle code although the config says that all are.
    """
    zeros = zero_points(stored.raw(qzeros), bits, settings)
    top, middle = (1 << bits) - 1, 1 << (bits - 1)
    if zeros.max() > top:
        raise CheckpointError(
            stored.where(qzeros),
            found=f"the zero point {zeros.max()}",
            expected=f"0..{top}; tools disagree on what a larger one means",
            remedy="quantize the model again with the checkpoint format gptq_v2",
        )
    is_middle = bool((zeros == middle).all())
    if settings.symmetric == (True,) and not is_middle:
        other = zeros[zeros != middle][0]
        raise CheckpointError(
            stored.where(qzeros),
            found=f"the zero point {other}",
            expected=f"{middle} everywhere, as sym is true",
            remedy=f"{SAME_REVISION}; checkpoint_format says whether zero points are stored minus one",
        )
    return is_middle and settings.symmetric != (False,)


def zero_points(words: npt.NDArray[Any], bits: int, settings: Settings) -> npt.NDArray[np.int64]:
    """Return zero points [G, N]; those of other tools than GPTQModel may be out of range."""
    if not settings.added:
        return unpack(words, bits).astype(np.int64)
    if not settings.borrows:
        return unpack(words, bits).astype(np.int64) + 1
    if WORD_BITS % bits:  # codes that lie across words are shifted one by one
        return (unpack(words, bits).astype(np.int64) + 1) % (1 << bits)
    ones = np.uint32(sum(1 << place for place in range(0, WORD_BITS, bits)))
    return unpack((words.view(np.uint32) + ones).view(np.int32), bits).astype(np.int64)


def _read(stored: StoredTensors, layer: str, grid: Grid, settings: Settings) -> BlockTensor:
    codes = unpack(stored.raw(f"{layer}.qweight").T, grid.bits)  # [N, in]
    zeros: Codes | None = None
    if not grid.is_symmetric:
        zeros = zero_points(stored.raw(f"{layer}.qzeros"), grid.bits, settings).astype(np.uint8).T  # [N, G]
    scales: Floats = stored.raw(f"{layer}.scales").astype(np.float32).T
    return grid.blocks(codes, scales, zeros)


def _check_described(section: Config, settings: Settings, stored: StoredTensors, layers: Sequence[str]) -> None:
    """Check that each width of codes which the config describes is that of some matrix.

    Raises:
        CheckpointError: One is not.
    """
    found = {stored.shape(f"{x}.qzeros")[1] * WORD_BITS // stored.shape(f"{x}.scales")[1] for x in layers}
    if absent := [bits for bits in settings.bits if bits not in found]:
        raise CheckpointError(
            f"{section.where('dynamic') if len(settings.bits) > 1 else section.where('bits')} describes matrices of "
            f"{' and '.join(map(str, absent))} bits",
            found=f"matrices of {' and '.join(map(str, sorted(found)))} bits only",
            remedy=f"finish the download, or {SAME_REVISION}",
        )
