"""From a checkpoint straight to a quantized bundle: no float bundle in between, nothing half-written.

The only file of the room, beside the command, that opens ``quant``: it joins a checkpoint's floats and the engine that
quantizes bundles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from shortstack.export.assemble import OpenedModel, open_model
from shortstack.export.checkpoint_floats import CheckpointFloats
from shortstack.export.kept_blocks import KeptBlocks
from shortstack.export.spec import ExportSpec
from shortstack.graphs.bundle import Bundle, check_free, open_bundle, staged_folder
from shortstack.graphs.errors import RequestError, UnsupportedError
from shortstack.graphs.ir.write_bundle import tool_versions
from shortstack.graphs.precision import Precision
from shortstack.progress import Stage, progress_stages
from shortstack.quant.engine import Job, choose_formats, job_key, least_formats, plan_job, write_job
from shortstack.quant.needs import check_needs
from shortstack.quant.preset import Preset
from shortstack.quant.reach import Reach, reach_of
from shortstack.quant.record import QuantizationRecord, read_record
from shortstack.quant.source import Source
from shortstack.quant.spec import Quantization
from shortstack.quant.texts import calibration_rows, check_text, tokenizer_of
from shortstack.quant.unfinished import Unfinished


def export_quantized(
    request: ExportSpec,
    wanted: Quantization,
    tell: Callable[[KeptBlocks], None] = lambda blocks: None,
    planned: Callable[[Reach], None] = lambda reach: None,
) -> Bundle:
    """Cut a checkpoint into a quantized bundle.

    The weights are those that ``quantize`` gives for a bundle of fp32 weights that ``export`` made, byte for byte. With
    ``keep_blocks``, kept matrices stay as they are, and all others are rounded as is wanted.

    Args:
        request: What to export, and how. ``dtype`` is the type of activations and of what is not in blocks.
        wanted: How it is quantized.
        tell: Called with what becomes of each matrix, if the checkpoint's blocks are to be kept.
        planned: Called before any work with what is going to be rounded; what it raises stops the export.

    Returns:
        The finished bundle.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        UnsupportedError: It can be read, but not exported or not calibrated.
        RequestError: An option does not fit the model, or there is not enough disk or memory.
        BundleError: The output folder is in the way.
    """
    if wanted.preset.is_float:
        raise RequestError(
            f"--preset {wanted.preset.name} puts nothing in blocks",
            remedy="leave it out, or choose another preset or --weights",
        )
    check_free(request.out, request.overwrite)  # before a download, not after
    if wanted.reads_text:
        check_text(wanted.calibration, "--calibration")
    with progress_stages() as stage:
        model = open_model(request)
        reader = _reader(request, wanted, model, digest="")
        planned(_checked_reach(wanted.preset, reader))
        job = _job(request, wanted, model, reader)
        check_needs(job, least_formats(job), request.out)
        # All options were checked: from here on it takes long.
        advance = stage("Hashing the checkpoint", 1)
        digest = model.checkpoint.digest()
        advance(1)
        reader = _reader(request, wanted, model, digest)
        job = replace(job, source=Source(reader))
        # Weights may be damaged: what overflows is refused by the name of its matrix, and not by numpy's warnings.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            _write(job, request, model, digest, stage, reader)
    bundle = open_bundle(request.out)
    if request.keep_blocks:
        record = read_record(bundle)
        assert record is not None
        tell(_measured_blocks(reader, record, bundle.manifest.precision))
    return bundle


def _reader(request: ExportSpec, wanted: Quantization, model: OpenedModel, digest: str) -> CheckpointFloats:
    manifest = model.manifest(request, "float32", digest)
    return CheckpointFloats(model, manifest, request.dtype, keeps_trimmed=wanted.preset.draft_head == "as head")


def _checked_reach(preset: Preset, reader: CheckpointFloats) -> Reach:
    """Return what is going to be rounded.

    Raises:
        RequestError: It is nothing, and the cache is float.
    """
    manifest = reader.manifest
    reach = reach_of(preset, manifest.spec, manifest.plan, reader.kept_names)
    if reach.is_nothing:
        raise RequestError(
            f"--preset {preset.name} would have no effect: every matrix keeps the checkpoint's blocks",
            found="a float cache",
            remedy="leave out --preset, leave out --keep-blocks to round all matrices, or add --kv-cache int8",
        )
    return reach


def _job(request: ExportSpec, wanted: Quantization, model: OpenedModel, reader: CheckpointFloats) -> Job:
    job = plan_job(
        Source(reader),
        wanted,
        request.dtype,
        lambda wanted: calibration_rows(wanted, tokenizer_of(model.files), model.max_length),
    )
    if wanted.preset.kv_cache == "int8" and not job.is_layerwise:
        raise UnsupportedError(
            "the scales of an int8 cache come from the layers, and these do not run one by one",
            found=f"kv_map {list(model.spec.kv_map)}",
            remedy="add --kv-cache float, or export without --preset and quantize that bundle",
        )
    return job


def _write(
    job: Job, request: ExportSpec, model: OpenedModel, digest: str, stage: Stage, reader: CheckpointFloats
) -> None:
    mix = choose_formats(job, stage)
    check_needs(job, mix.assignment, request.out)
    exits = [(name, array.tobytes()) for name, array in sorted(model.exit_weights.items())]
    manifest = job.source.manifest.to_json()
    key = job_key(job, mix.assignment, manifest, exits, sorted(model.blocks.kept), sorted(model.files), tool_versions())
    with staged_folder(request.out, overwrite=request.overwrite, work=key) as folder:
        unfinished = Unfinished.open(folder, key)
        write_job(
            job,
            mix,
            folder,
            model.files,
            None,
            unfinished,
            stage,
            ends=model.ends,
            origins=lambda record, precision: _measured_blocks(reader, record, precision).origins(),
        )


def _measured_blocks(reader: CheckpointFloats, record: QuantizationRecord, precision: Precision) -> KeptBlocks:
    return reader.measured_blocks(record.errors, record.of_outputs or (), precision)
