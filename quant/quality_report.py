"""The quality report of a finished bundle: measured, and put into the bundle as its quality.json.

The bundle is in place and complete before its report begins, and it stays so whenever the report stops.
"""

from __future__ import annotations

from pathlib import Path

from shortstack.graphs import names
from shortstack.graphs.bundle import Bundle, check_writable, open_bundle, put_file
from shortstack.graphs.errors import BundleError, RequestError
from shortstack.progress import Stage, progress_stages
from shortstack.quant.quality import Quality
from shortstack.quant.quality_measure import judge
from shortstack.quant.record import QuantizationRecord, read_record
from shortstack.quant.spec import ReportSpec
from shortstack.quant.texts import ReportTexts, open_tokenizer, read_prompts, read_rows, row_length


def read_report_texts(request: ReportSpec) -> ReportTexts:
    """Read the held-out text, so that a file which cannot be used is refused before long work.

    Raises:
        BundleError: The source cannot be read.
        RequestError: The text cannot be read, or holds too little.
    """
    source = open_bundle(request.source)
    tokenizer, longest = open_tokenizer(source), source.manifest.max_length
    heldout = read_rows(request.heldout, "--heldout", tokenizer, request.heldout_tokens, row_length(longest))
    found = read_prompts(request.heldout, "--heldout", tokenizer, request.prompts)
    return ReportTexts(heldout, tuple(prompt[: max(1, longest // 2)] for prompt in found))  # room to continue


def make_report(request: ReportSpec) -> Quality:
    """Compare a quantized bundle with its source, and put the report into the bundle.

    Args:
        request: Which bundles, and on how much text.

    Returns:
        The report.

    Raises:
        BundleError: A bundle cannot be read, was replaced meanwhile, or the report cannot be stored.
        RequestError: The bundles do not belong together, or the text cannot be used.
    """
    quality = measure_report(request)
    store_report(request.result, quality)
    return quality


def measure_report(request: ReportSpec, texts: ReportTexts | None = None, stage: Stage | None = None) -> Quality:
    """Compare a quantized bundle with its source, after checks of all that could make the report useless.

    Args:
        request: Which bundles, and on how much text.
        texts: What :func:`read_report_texts` read; None reads it here.
        stage: Starts a stage of the progress bar; None shows progress of its own.

    Returns:
        The report, for :func:`store_report`.

    Raises:
        BundleError: A bundle cannot be read.
        RequestError: The bundles do not belong together, the text cannot be used, or the report could not be stored.
    """
    if stage is None:
        with progress_stages() as stage:
            return measure_report(request, texts, stage)
    if not (request.result / names.MANIFEST_FILE).is_file():
        raise RequestError(
            f"{request.result} is not a bundle, so there is nothing to report on",
            remedy=f"make it with `shortstack quantize {request.source} {request.result}`",
        )
    source, result = open_bundle(request.source), open_bundle(request.result)
    record = read_record(result)
    _check_pair(source, result, record)
    try:
        check_writable(result.folder)
    except OSError as error:
        raise RequestError(
            f"{result.folder} cannot be written, so a report could not be put into it: {error.strerror or error}",
            remedy="make the folder writable, or copy the bundle to a folder that is",
        ) from None
    return judge(source, result, texts or read_report_texts(request), request, record, stage)


def store_report(folder: Path, quality: Quality) -> Bundle:
    """Put a report into the bundle that it is about.

    Args:
        folder: The quantized bundle.
        quality: What :func:`measure_report` returned.

    Returns:
        The bundle with the report.

    Raises:
        BundleError: The bundle was replaced meanwhile, or cannot be read or written.
    """
    bundle = open_bundle(folder)
    if bundle.manifest.weights_sha256 != quality.result.weights_sha256:
        raise BundleError(f"{folder} was replaced while it was measured", remedy="make the report again")
    try:
        return put_file(bundle, names.QUALITY_FILE, quality.content())
    except OSError as error:
        raise BundleError(
            f"{folder / names.QUALITY_FILE} cannot be stored: {error.strerror or error}",
            remedy="make room, make the folder writable, and make the report again",
        ) from error


def _check_pair(source: Bundle, result: Bundle, record: QuantizationRecord | None) -> None:
    """Refuse a pair of which one was not made from the other.

    Raises:
        RequestError: It was not.
    """
    before, after = source.manifest, result.manifest
    if record is not None and record.source_weights_sha256 is not None:
        belongs = record.source_weights_sha256 == before.weights_sha256
    else:  # of an older version, or made from a checkpoint: it only shows whether both come from one, cut in one way
        belongs = before.precision.is_float and not after.precision.is_float
        belongs &= (before.source_sha256, before.spec, before.plan) == (after.source_sha256, after.spec, after.plan)
    if not belongs:
        raise RequestError(
            f"{result.folder} was not made from {source.folder}",
            remedy="name the bundle that it was quantized from, and then the quantized one",
        )
