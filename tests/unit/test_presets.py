"""Presets: what the command line changes in them, and that nothing in them is forgotten."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from shortstack.graphs.errors import RequestError
from shortstack.graphs.precision import BlockFormat
from shortstack.quant.method import METHODS
from shortstack.quant.preset import Preset
from shortstack.quant.presets import PRESETS, find_preset

INT4, INT8 = BlockFormat(4), BlockFormat(8)
EVERYWHERE = Preset(
    "everywhere",
    "a format in every field that takes one",
    "rtn",
    weights=BlockFormat(4, has_offsets=True),
    head=INT8,
    embedding=INT4,
    first_rows=100,
    first_rows_format=INT8,
    draft_head=INT4,
    parts={"attn.qkv_proj.weight": INT8, "mlp.up_proj.weight": None},
    layers={0: INT8, -1: None},
)


def formats_in(value: Any) -> list[BlockFormat]:
    if isinstance(value, Preset):
        return [found for field in fields(value) for found in formats_in(getattr(value, field.name))]
    if isinstance(value, dict):
        return [found for wanted in value.values() for found in formats_in(wanted)]
    return [value] if isinstance(value, BlockFormat) else []


def test_another_block_size_reaches_every_format_of_a_preset() -> None:
    before, after = formats_in(EVERYWHERE), formats_in(EVERYWHERE.reshaped(block_size=64))
    assert len(before) == 7
    assert after == [replace(block_format, block_size=64) for block_format in before]


def test_another_symmetry_reaches_every_format_of_a_preset() -> None:
    before, after = formats_in(EVERYWHERE), formats_in(EVERYWHERE.reshaped(is_symmetric=True))
    assert after == [replace(block_format, is_symmetric=True) for block_format in before]


def test_what_is_not_a_format_is_kept() -> None:
    assert EVERYWHERE.reshaped() == EVERYWHERE
    after = EVERYWHERE.reshaped(128, is_symmetric=True)
    assert (after.name, after.method, after.first_rows, after.kv_cache) == ("everywhere", "rtn", 100, "float")
    assert (after.parts["mlp.up_proj.weight"], after.layers[-1]) == (None, None)


def test_every_preset_names_a_method_that_exists() -> None:
    assert {preset.method for preset in PRESETS.values()} <= METHODS.keys()


def test_an_unknown_preset_is_named_with_those_that_exist() -> None:
    with pytest.raises(RequestError, match="--preset is unknown: found 'int3', expected one of int4, int4-fast, int8"):
        find_preset("int3")
