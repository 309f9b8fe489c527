"""The quantization itself: a float bundle in, a smaller bundle out, nothing half-written in between."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from shortstack.graphs import names
from shortstack.graphs.bundle import Bundle, check_free, open_bundle, staged_folder
from shortstack.graphs.errors import RequestError, UnsupportedError
from shortstack.graphs.genai_config import check_uncut
from shortstack.graphs.ir.block_tensor import BlockTensor
from shortstack.graphs.ir.cast import cast
from shortstack.graphs.ir.weights import TOO_LARGE, WeightStore
from shortstack.graphs.ir.write_bundle import tool_versions, write_bundle
from shortstack.graphs.manifest import packed_files
from shortstack.graphs.precision import SPARE_ROWS, Precision
from shortstack.graphs.spec import DType, ModelSpec
from shortstack.progress import Stage, progress_stages
from shortstack.quant.kv_scales import measure_kv_scales
from shortstack.quant.layers import Weight
from shortstack.quant.method import find_method
from shortstack.quant.preset import assign
from shortstack.quant.record import QuantizationRecord
from shortstack.quant.rounding import LayerwiseRounding, Rounded
from shortstack.quant.search import search
from shortstack.quant.side_product import Fate
from shortstack.quant.source import Source
from shortstack.quant.spec import QuantizeSpec
from shortstack.quant.texts import Rows, open_tokenizer, read_rows, row_length, text_ends


def quantize_bundle(request: QuantizeSpec, stage: Stage | None = None) -> Bundle:
    """Shrink a bundle.

    Args:
        request: What to quantize, and how.
        stage: Starts a stage of the progress bar; None shows progress of its own.

    Returns:
        The finished bundle; :func:`shortstack.quant.quality_report.make_report` compares it with its source.

    Raises:
        BundleError: The source cannot be read, or the output folder is in the way.
        RequestError: The source is quantized already, or an option does not fit.
    """
    if stage is None:
        with progress_stages() as stage:
            return quantize_bundle(request, stage)
    check_free(request.out, request.overwrite)
    if request.out.resolve() == request.bundle.resolve():
        raise RequestError(f"{request.out} is the bundle to be quantized", remedy="choose another output folder")
    source = Source(open_bundle(request.bundle))
    if _has_genai(request, source.bundle):
        check_uncut(source.spec)
    method = find_method(request.preset.method)
    is_int8_cache = request.preset.kv_cache == "int8"
    is_weighed = method.uses_text or request.max_kl is not None
    is_layerwise = _check_layerwise(source.spec, is_weighed)
    rows = _read_calibration(source.bundle, request) if is_weighed or is_int8_cache else None
    assignment = assign(request.preset, source.spec, source.bundle.manifest.plan)
    # Weights may be damaged: what overflows is refused by the name of its matrix, and not by numpy's warnings before.
    quiet = np.errstate(over="ignore", invalid="ignore", divide="ignore")
    with quiet, staged_folder(request.out, overwrite=request.overwrite) as folder:
        if request.max_kl is not None:
            assert rows is not None
            assignment = search(source, method, assignment, rows, request.max_kl, stage, request.tuning)
        scales: Mapping[str, np.ndarray] = {}
        if is_int8_cache and not is_layerwise:
            assert rows is not None
            scales = measure_kv_scales(source.bundle, rows, stage("Running the float model", len(rows)))
        seen = rows if is_layerwise else None
        rounding = LayerwiseRounding(source, assignment, method, seen, is_int8_cache, request.tuning)
        _write(rounding, scales, folder, request, rows, stage)
    return open_bundle(request.out)


def _check_layerwise(spec: ModelSpec, is_weighed: bool) -> bool:
    """Return whether the layers of a model can be run one by one; refuse to calibrate where they cannot."""
    blind = [layer for layer in range(spec.num_hidden_layers) if not spec.sees_itself(layer)]
    if is_weighed and blind:
        raise UnsupportedError(
            f"calibration runs layer after layer, and layers {blind} use keys and values that are not there yet",
            found=f"kv_map {list(spec.kv_map)}",
            expected="a method that looks at weights only",
            remedy="add --method rtn (or hqq), without --max-kl",
        )
    return not blind


def _read_calibration(bundle: Bundle, request: QuantizeSpec) -> Rows:
    """Read the calibration text in rows that fit the bundle's context."""
    length, tokens = row_length(bundle.manifest.max_length), request.calibration_tokens
    return read_rows(request.calibration, "--calibration", open_tokenizer(bundle), tokens, length)


def _write(
    rounding: LayerwiseRounding,
    kv_scales: Mapping[str, np.ndarray],
    folder: Path,
    request: QuantizeSpec,
    rows: Rows | None,
    stage: Stage,
) -> None:
    """Round the model and write all files of the bundle."""
    source, manifest = rounding.source, rounding.source.bundle.manifest
    dtype = request.dtype or manifest.dtype
    with WeightStore(folder) as store:
        advance = stage(f"Rounding ({request.preset.method})", source.spec.num_hidden_layers + 3)
        errors, fates = _store_weights(rounding, kv_scales, dtype, store, advance)
    record = QuantizationRecord(
        preset=request.preset.name,
        method=request.preset.method,
        source_weights_sha256=manifest.weights_sha256,
        calibration=None if rows is None else f"{_readable(request.calibration.name)}: {rows.size} tokens",
        max_kl=request.max_kl,
        errors=errors,
        tuning=fates,
    )
    result = dataclasses.replace(
        manifest,
        dtype=dtype,
        files={},
        tools=manifest.tools | tool_versions(),
        precision=Precision(store.formats, request.preset.kv_cache),
    )
    graphs = {names.segment_file(s.start, s.end) for s in manifest.plan.segments} | packed_files(manifest.plan)
    # A float16 copy made by `shortstack quantize` has a record and a report: on itself, not on what is made of it.
    own = {names.WEIGHTS_FILE, names.QUANTIZATION_FILE, names.QUALITY_FILE, *names.GENAI_FILES}
    files = {name: (source.bundle.folder / name).read_bytes() for name in manifest.files.keys() - graphs - own}
    ends = text_ends(source.bundle) if _has_genai(request, source.bundle) else None
    write_bundle(folder, result, store, {**files, names.QUANTIZATION_FILE: record.content()}, stage, ends)


def _has_genai(request: QuantizeSpec, source: Bundle) -> bool:
    return request.genai or names.GENAI_CONFIG_FILE in source.manifest.files


def _readable(name: str) -> str:
    """Return a file's name as text; bytes of it that are not UTF-8, which JSON cannot hold, become U+FFFD."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _store_weights(
    rounding: LayerwiseRounding,
    kv_scales: Mapping[str, np.ndarray],
    dtype: DType,
    store: WeightStore,
    advance: Callable[[float], None],
) -> tuple[dict[str, float], dict[str, Fate]]:
    """Write every tensor of the bundle to the store.

    Args:
        rounding: Gives the tensors, and the scales of an int8 cache if it was asked for them.
        kv_scales: Scales that were found before.
        dtype: Type of what is not in blocks.
        store: Where they go.
        advance: Called with 1 after each layer, and with 3 at the end.

    Returns:
        The relative error of each rounded matrix, and what became of fine-tunings; both by name.
    """
    source = rounding.source
    errors: dict[str, float] = {}
    fates: dict[str, Fate] = {}
    for rounded in rounding.layers():
        _store(rounded, dtype, store, errors)
        fates |= rounded.fates
        advance(1)
    for name, scale in kv_scales.items():
        store.add(name, scale)
    known: dict[str, str] = {}
    for rounded in rounding.heads():
        _store(rounded, dtype, store, errors, known)
    for rounded in rounding.exits():
        _store(rounded, dtype, store, errors)
    if names.UNIT_NORM in source:
        store.add(names.UNIT_NORM, source.floats(names.UNIT_NORM).astype(dtype))
    if source.spec.ends.learned_positions:
        table = source.floats(names.EMBED_POSITIONS)
        store.add(names.EMBED_POSITIONS, cast(names.EMBED_POSITIONS, table, dtype))
    for name, norm in source.final_norm().items():
        store.add(name, cast(name, norm, dtype))
    for name in names.rope_tables(len(source.spec.ropes)):
        table, fill = source.floats(name), float(name.endswith(names.ROPE_PARTS[0]))
        # A bundle before format 2 is without the spare row.
        missing = max(0, source.bundle.manifest.max_length + SPARE_ROWS - len(table))
        store.add(name, cast(name, np.pad(table, ((0, missing), (0, 0)), constant_values=fill), dtype))
    _store_id_maps(source, store)
    advance(3)
    return errors, fates


def _store(
    rounded: Rounded, dtype: DType, store: WeightStore, errors: dict[str, float], known: dict[str, str] | None = None
) -> None:
    """Store what was rounded; with ``known``, the names of stored matrices by their hash, equal ones once.

    Exits have equal heads, unless a method rounded each head for its own inputs.

    Raises:
        UnsupportedError: The weights of a matrix are too large for a grid.
    """
    for name, error in rounded.errors.items():
        if not math.isfinite(error):
            raise UnsupportedError(f"matrix {name} in blocks: its error", found=error, remedy=TOO_LARGE)
    for name, tensor in rounded.tensors.items():
        same = name if known is None else known.setdefault(_digest(tensor), name)
        if same != name:
            store.alias(name, same)
        elif isinstance(tensor, BlockTensor):
            store.add_blocks(name, tensor, dtype)
        elif name.endswith("_scale"):
            store.add(name, tensor)  # of an int8 cache: always float32
        else:
            store.add(name, cast(name, tensor, dtype))
    errors |= rounded.errors


def _digest(tensor: Weight) -> str:
    """Return a hash of a matrix, its format included."""
    if isinstance(tensor, BlockTensor):
        kind, parts = str((tensor.format, tensor.shape)), list(tensor.packed_parts().values())
    else:
        kind, parts = str(tensor.shape), [tensor]
    digest = hashlib.sha256(kind.encode())
    for part in parts:
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


def _store_id_maps(source: Source, store: WeightStore) -> None:
    """Store the id maps of trimmed exit heads; equal ones once."""
    known: dict[bytes, str] = {}
    for exit_spec in source.bundle.manifest.plan.exits:
        name = names.exit_weight(exit_spec.exit_layer, "head.ids")
        if exit_spec.draft_vocab is None:
            continue
        ids = np.asarray(source.array(name))
        if (same := known.setdefault(ids.tobytes(), name)) == name:
            store.add(name, ids)
        else:
            store.alias(name, same)
