"""A checkpoint straight to blocks, and the same in two steps: both give the same bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from helpers.quantized import INT4_OFFSETS, INT8, preset, stored_tensors
from shortstack.export.assemble import export_bundle
from shortstack.export.quantized import export_quantized
from shortstack.export.spec import ExportSpec
from shortstack.graphs import names
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.spec import DType
from shortstack.quant.assemble import quantize_bundle
from shortstack.quant.preset import Preset
from shortstack.quant.record import read_record
from shortstack.quant.spec import Quantization, QuantizeSpec

FEW = 256  # tokens of calibration


def mix(method: str, **changes: Any) -> Preset:
    """int4 with all that a preset can ask for: offsets in layers, first rows in int8, an int8 cache."""
    fields = {"method": method, "first_rows": 40, "first_rows_format": INT8, "draft_head": INT8, **changes}
    return preset(INT4_OFFSETS, fields.pop("kv_cache", "int8"), **fields)


def in_two_steps(request: ExportSpec, wanted: Preset, folder: Path, dtype: DType = "float32") -> Path:
    export_bundle(replace(request, out=folder / "floats"))
    quantize_bundle(QuantizeSpec(folder / "floats", folder / "two", wanted, dtype, calibration_tokens=FEW))
    return folder / "two"


def at_once(request: ExportSpec, wanted: Preset) -> Path:
    export_quantized(request, Quantization(wanted, calibration_tokens=FEW))
    return request.out


def check_same(request: ExportSpec, wanted: Preset, folder: Path) -> None:
    two, one = in_two_steps(request, wanted, folder), at_once(request, wanted)
    same = (one / names.WEIGHTS_FILE).read_bytes() == (two / names.WEIGHTS_FILE).read_bytes()
    assert same, differing(one, two)
    for bundle in (one, two):
        open_bundle(bundle, verify_hashes=True)
    ours, theirs = (open_bundle(folder).manifest.to_json() for folder in (one, two))
    for one_of in (ours, theirs):  # a record also says what its source was
        del one_of["digest"], one_of["files"][names.QUANTIZATION_FILE]
    assert ours == theirs
    records = [read_record(open_bundle(bundle)) for bundle in (one, two)]
    assert records[0] is not None
    assert records[1] is not None
    assert records[0].errors == records[1].errors
    assert (records[0].calibration, records[0].tuning) == (records[1].calibration, records[1].tuning)


def differing(one: Path, two: Path) -> list[str]:
    ours, theirs = stored_tensors(one), stored_tensors(two)
    return [name for name in ours if ours[name].read(one).tobytes() != theirs[name].read(two).tobytes()]
