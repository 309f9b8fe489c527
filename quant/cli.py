"""`shortstack quantize`."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import click

from shortstack.command_options import Command, genai_option, option_group, refuse_given
from shortstack.command_paths import BundlePath
from shortstack.graphs.bundle import Bundle, open_bundle
from shortstack.graphs.spec import DType
from shortstack.quant.options import (
    PRESET_HELP,
    Calibrating,
    Mixing,
    Reporting,
    calibrating_options,
    mixing_options,
    reporting_options,
)
from shortstack.quant.quality import Quality

_DTYPES: dict[str, DType] = {"fp32": "float32", "fp16": "float16"}


@click.command(cls=Command)
@click.argument("bundle", type=BundlePath(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@mixing_options("int4", PRESET_HELP)
@option_group(
    "Formats",
    click.option(
        "--dtype",
        type=click.Choice(list(_DTYPES)),
        help="Type of activations and of what is not in blocks: fp16 is for GPUs.  [default: the bundle's]",
    ),
)
@calibrating_options
@reporting_options
@option_group(
    "Output",
    genai_option,
    click.option("--overwrite", is_flag=True, help="Replace an existing bundle."),
    click.option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
)
def quantize(
    bundle: Path,
    out: Path,
    mixing: Mixing,
    dtype: str | None,
    calibrating: Calibrating,
    reporting: Reporting,
    genai: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Shrink BUNDLE into the bundle OUT: weights in blocks of 4 or 8 bits, activations in fp16, an int8 KV cache.

    A report then compares OUT with BUNDLE. OUT is complete before that, and stays if the report is interrupted.
    """
    from shortstack.progress import progress_stages
    from shortstack.quant.assemble import quantize_bundle
    from shortstack.quant.quality_report import measure_report, read_report_texts, store_report
    from shortstack.quant.quality_table import search_lines, tuning_lines
    from shortstack.quant.record import read_record
    from shortstack.quant.spec import QuantizeSpec

    report = reporting.spec(bundle, out)
    keeping = functools.partial(_keeping, out, reporting.later(bundle, out))
    quality = None
    if reporting.report_only:
        assert report is not None
        options = [field.name for group in (Mixing, Calibrating) for field in fields(group)]
        refuse_given((*options, "dtype", "genai", "overwrite"), "OUT is quantized already", "drop it, or --report-only")
        quality = measure_report(report)
    else:
        wanted = calibrating.quantization(mixing)
        request = QuantizeSpec(
            bundle=bundle,
            out=out,
            preset=wanted.preset,
            dtype=None if dtype is None else _DTYPES[dtype],
            calibration=wanted.calibration,
            calibration_tokens=wanted.calibration_tokens,
            max_kl=wanted.max_kl,
            tuning=wanted.tuning,
            overwrite=overwrite,
            genai=genai,
        )
        texts = None if report is None else read_report_texts(report)  # a bad file is refused before long work
        with progress_stages() as stage:
            record = read_record(quantize_bundle(request, stage))
            if report is not None:
                with keeping():
                    quality = measure_report(report, texts, stage)
        for line in () if record is None else (*search_lines(record), *tuning_lines(record.fates())):
            click.echo(line, err=True)
    if quality is None:
        _print(out, None, _total_bytes(open_bundle(out)), as_json)
        return
    total_bytes = quality.result.disk_bytes
    try:
        with contextlib.nullcontext() if reporting.report_only else keeping():
            total_bytes = _total_bytes(store_report(out, quality))
    finally:  # the work is done: a report that cannot be stored is shown all the same, and then the error
        _print(out, quality, total_bytes, as_json)


def _total_bytes(bundle: Bundle) -> int:
    return sum(entry.bytes for entry in bundle.manifest.files.values())


def _print(out: Path, quality: Quality | None, total_bytes: int, as_json: bool) -> None:
    from shortstack.quant.quality_table import print_quality
    from shortstack.quant.record import read_record

    if as_json:
        found = None if quality is None else quality.to_json()
        record = read_record(open_bundle(out))
        done = {"tuning": {}} if record is None else record.found()
        data = {"bundle": str(out), "bytes": total_bytes, **done, "quality": found}
        click.echo(json.dumps(data, ensure_ascii=False))
        return
    if quality is not None:
        print_quality(quality)
    click.echo(f"{out}: {total_bytes / 1e6:.1f} MB")


@contextlib.contextmanager
def _keeping(out: Path, later: str) -> Iterator[None]:
    """Say what is there when a report stops, and how to make it later."""
    try:
        yield
    except BaseException:
        click.echo(f"{out} is complete, but its report is not. To make it: {later}", err=True)
        raise
