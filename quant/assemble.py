"""From a float bundle to a smaller bundle, nothing half-written in between."""

from __future__ import annotations

import numpy as np

from shortstack.graphs import names
from shortstack.graphs.bundle import Bundle, check_free, open_bundle, staged_folder
from shortstack.graphs.errors import RequestError
from shortstack.graphs.genai_config import check_uncut
from shortstack.graphs.ir.write_bundle import tool_versions
from shortstack.graphs.manifest import packed_files
from shortstack.progress import Stage, progress_stages
from shortstack.quant.bundle_floats import BundleFloats
from shortstack.quant.engine import KVScales, choose_formats, job_key, least_formats, plan_job, write_job
from shortstack.quant.kv_scales import measure_kv_scales
from shortstack.quant.needs import check_needs
from shortstack.quant.source import Source
from shortstack.quant.spec import QuantizeSpec
from shortstack.quant.texts import calibration_rows, open_tokenizer, text_ends
from shortstack.quant.unfinished import Unfinished


def quantize_bundle(request: QuantizeSpec, stage: Stage | None = None) -> Bundle:
    """Shrink a bundle.

    Args:
        request: What to quantize, and how.
        stage: Starts a stage of the progress bar; None shows progress of its own.

    Returns:
        The finished bundle; :func:`shortstack.quant.quality_report.make_report` compares it with its source.

    Raises:
        BundleError: The source cannot be read, or the output folder is in the way.
        RequestError: The source is quantized already, an option does not fit, or there is not enough disk or memory.
    """
    if stage is None:
        with progress_stages() as stage:
            return quantize_bundle(request, stage)
    check_free(request.out, request.overwrite)
    if request.out.resolve() == request.bundle.resolve():
        raise RequestError(f"{request.out} is the bundle to be quantized", remedy="choose another output folder")
    bundle = open_bundle(request.bundle)
    source, manifest = Source(BundleFloats(bundle)), bundle.manifest
    has_genai = request.genai or names.GENAI_CONFIG_FILE in manifest.files
    if has_genai:
        check_uncut(manifest.spec)
    job = plan_job(
        source,
        request.quantization(),
        request.dtype or manifest.dtype,
        lambda wanted: calibration_rows(wanted, open_tokenizer(bundle), manifest.max_length),
    )
    check_needs(job, least_formats(job), request.out)  # a search takes long
    # Weights may be damaged: what overflows is refused by the name of its matrix, and not by numpy's warnings before.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        mix = choose_formats(job, stage)
        check_needs(job, mix.assignment, request.out)
        scales: KVScales = {}
        if request.preset.kv_cache == "int8" and not job.is_layerwise:
            assert job.rows is not None
            scales = measure_kv_scales(bundle, job.rows, stage("Running the float model", len(job.rows)))
        weights = bundle.folder / names.WEIGHTS_FILE
        key = job_key(job, mix.assignment, manifest.to_json(), weights.stat().st_mtime_ns, tool_versions())
        with staged_folder(request.out, overwrite=request.overwrite, work=key) as folder:
            graphs = {names.segment_file(s.start, s.end) for s in manifest.plan.segments} | packed_files(manifest.plan)
            graphs |= manifest.drafter_contracts().keys()
            # A float16 copy made by `shortstack quantize` has a record and a report: on itself, not on what is made
            # of it.
            own = {names.WEIGHTS_FILE, names.QUANTIZATION_FILE, names.QUALITY_FILE, *names.GENAI_FILES}
            files = {name: (bundle.folder / name).read_bytes() for name in manifest.files.keys() - graphs - own}
            unfinished = Unfinished.open(folder, key)
            ends = text_ends(bundle) if has_genai else None
            write_job(job, mix, folder, files, manifest.weights_sha256, unfinished, stage, scales, ends)
    return open_bundle(request.out)
