"""`shortstack quantize`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from shortstack.graphs import names
from shortstack.graphs.precision import BLOCK_SIZES, EXACT_BLOCK_SIZE, KV_TYPES, KVType
from shortstack.graphs.spec import DType
from shortstack.quant.method import METHODS
from shortstack.quant.preset import FORMAT_NAMES, Format, parse_format
from shortstack.quant.presets import PRESETS, find_preset

_DTYPES: dict[str, DType] = {"fp32": "float32", "fp16": "float16"}
_FORMAT = click.Choice(FORMAT_NAMES)
_PRESETS = "; ".join(f"{preset.name}: {preset.summary}" for preset in PRESETS.values())


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--preset",
    "--recipe",
    "-r",
    "preset_name",
    default="int4",
    show_default=True,
    help=f"A named mix of formats; --recipe is an older spelling. {_PRESETS}.",
)
@click.option("--method", type=click.Choice(list(METHODS)), help="How weights are rounded.  [default: the preset's]")
@click.option("--weights", type=_FORMAT, help="Format of all matrices of the layers.")
@click.option("--head", type=_FORMAT, help="Format of the LM head, and of the embedding where it is tied.")
@click.option("--draft-head", type=_FORMAT, help="Format of the exits' heads: changes speed, never output.")
@click.option("--kv-producers", type=_FORMAT, help="Format of the q, k, v projections of layers that own a cache.")
@click.option("--kv-cache", type=click.Choice(KV_TYPES), help="Element type of the KV cache.")
@click.option(
    "--block-size",
    type=click.Choice([str(b) for b in BLOCK_SIZES]),
    help="Weights that share a scale; only 32 verifies drafts bit for bit.  [default: the preset's]",
)
@click.option(
    "--symmetric/--asymmetric",
    "is_symmetric",
    default=None,
    help="Blocks without or with a zero point.  [default: the preset's]",
)
@click.option(
    "--dtype",
    type=click.Choice(list(_DTYPES)),
    help="Type of activations and of what is not in blocks: fp16 is for GPUs.  [default: the bundle's]",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Text or jsonl that calibrated methods look at, instead of the shipped one.",
)
@click.option("--calibration-tokens", type=int, default=8_192, show_default=True)
@click.option(
    "--heldout",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Text or jsonl that the result is judged on, instead of the shipped one.",
)
@click.option("--heldout-tokens", type=int, default=8_192, show_default=True)
@click.option(
    "--max-kl",
    type=float,
    metavar="X",
    help="Search the cheapest mix of int4, int8 and float parts that stays under X nats of KL divergence per token.",
)
@click.option("--no-report", is_flag=True, help="Do not compare the result with its source.")
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def quantize(
    bundle: Path,
    out: Path,
    preset_name: str,
    method: str | None,
    weights: str | None,
    head: str | None,
    draft_head: str | None,
    kv_producers: str | None,
    kv_cache: KVType | None,
    block_size: str | None,
    is_symmetric: bool | None,
    dtype: str | None,
    calibration: Path | None,
    calibration_tokens: int,
    heldout: Path | None,
    heldout_tokens: int,
    max_kl: float | None,
    no_report: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Shrink BUNDLE into the bundle OUT: weights in blocks of 4 or 8 bits, activations in fp16, an int8 KV cache."""
    from shortstack.graphs.texts import CALIBRATION_TEXT, HELDOUT_TEXT
    from shortstack.quant.assemble import quantize_bundle
    from shortstack.quant.quality_table import print_quality
    from shortstack.quant.spec import QuantizeSpec

    def named(name: str) -> Format:
        return parse_format(name, int(block_size or EXACT_BLOCK_SIZE), bool(is_symmetric))

    preset = find_preset(preset_name).reshaped(None if block_size is None else int(block_size), is_symmetric)
    if weights is not None:
        preset = dataclasses.replace(preset, weights=named(weights), parts={}, layers={})
    if head is not None:
        preset = dataclasses.replace(preset, head=named(head), embedding=named(head), first_rows_format=None)
    if draft_head is not None:
        preset = dataclasses.replace(preset, draft_head=named(draft_head))
    if kv_producers is not None:
        preset = dataclasses.replace(preset, parts={**preset.parts, names.QKV_PROJ: named(kv_producers)})
    if method is not None:
        preset = dataclasses.replace(preset, method=method)
    if kv_cache is not None:
        preset = dataclasses.replace(preset, kv_cache=kv_cache)
    result, quality = quantize_bundle(
        QuantizeSpec(
            bundle=bundle,
            out=out,
            preset=preset,
            dtype=None if dtype is None else _DTYPES[dtype],
            calibration=calibration or CALIBRATION_TEXT,
            calibration_tokens=calibration_tokens,
            heldout=heldout or HELDOUT_TEXT,
            heldout_tokens=heldout_tokens,
            max_kl=max_kl,
            with_report=not no_report,
            overwrite=overwrite,
        )
    )
    total_bytes = sum(entry.bytes for entry in result.manifest.files.values())
    if as_json:
        report = None if quality is None else quality.to_json()
        click.echo(json.dumps({"bundle": str(out), "bytes": total_bytes, "quality": report}, ensure_ascii=False))
        return
    if quality is not None:
        print_quality(quality)
    click.echo(f"{out}: {total_bytes / 1e6:.1f} MB")
