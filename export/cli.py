"""`shortstack export`."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import click

from shortstack.command_options import (
    Command,
    allow_pickle_option,
    follow_links_option,
    genai_option,
    option_group,
    refuse_given,
)
from shortstack.command_paths import CheckpointPath
from shortstack.graphs.errors import RequestError
from shortstack.quant.options import (
    PRESET_HELP,
    Calibrating,
    Mixing,
    calibrating_options,
    mixing_options,
    tell_reach,
)


@click.command(cls=Command)
@click.argument("checkpoint", type=CheckpointPath())
@click.argument("out", type=click.Path(path_type=Path))
@option_group(
    "Exits",
    click.option(
        "--exit-layer",
        "-e",
        "exit_layers",
        type=int,
        multiple=True,
        metavar="E",
        help="Cut after E layers and put an exit there; may be given more than once. Without it the model stays whole, "
        "or, if it was trained with exits (EE-LLM), gets all of them.",
    ),
    click.option(
        "--exits",
        type=click.Path(path_type=Path),
        metavar="FOLDER",
        help="Cut where this folder's trained exits are (exits.json, exits.safetensors) and put them there. Exits that "
        "lie next to the checkpoint are used only if they are named here. --exit-layer adds plain exits at other "
        "depths. The folder takes the place of exits that the checkpoint itself holds.",
    ),
    click.option(
        "--draft-vocab",
        type=int,
        metavar="N",
        help="Trim the head of plain exits to the N most useful token ids. The verified output stays the same.",
    ),
    click.option(
        "--draft-text",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Choose those ids by frequency in this text instead of the shipped one.",
    ),
)
@option_group(
    "Drafter",
    click.option(
        "--drafter",
        metavar="DRAFTER",
        help="Write a trained drafter beside the model: the folder or hub id of an EAGLE, EAGLE-2 or EAGLE-3 head or "
        "of an assistant of Gemma 4, the GGUF file of an EAGLE-3 head, or `mtp` for the layers for multi-token "
        "prediction that the checkpoint itself has.",
    ),
)
@option_group(
    "Model",
    click.option("--revision", help="Branch, tag or commit of a hub id."),
    follow_links_option,
    allow_pickle_option,
    click.option(
        "--adapter",
        type=click.Path(path_type=Path),
        metavar="FOLDER",
        help="Merge this LoRA adapter, as peft saves it. With --keep-blocks, the quantized matrices that it changes "
        "become int8.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["fp32", "fp16"]),
        default="fp32",
        show_default=True,
        help="Type of weights and activations; fp16 is for GPUs.",
    ),
    click.option(
        "--keep-blocks",
        is_flag=True,
        help="Keep the blocks of a quantized checkpoint: of a GGUF file bit for bit or, for types with minima (Q4_K), "
        "nearly; those of GPTQ, AWQ, compressed-tensors and onnxruntime-genai bit for bit. Quantized matrices whose "
        "blocks cannot be kept become int8, or with --preset what that says. Without it, all become floats.",
    ),
    click.option(
        "--max-length",
        type=int,
        metavar="C",
        help="Longest context in tokens.  [default: the model's own, at most 131072]",
    ),
)
@mixing_options(
    None,
    "Write the weights in blocks at once, as `shortstack quantize` would; the options below change parts of a preset, "
    f"and have no effect without one. {PRESET_HELP}",
)
@calibrating_options
@option_group(
    "Output",
    genai_option,
    click.option("--overwrite", is_flag=True, help="Replace an existing bundle."),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
)
def export(
    checkpoint: str,
    out: Path,
    exit_layers: tuple[int, ...],
    exits: Path | None,
    draft_vocab: int | None,
    draft_text: Path | None,
    drafter: str | None,
    dtype: str,
    keep_blocks: bool,
    adapter: Path | None,
    max_length: int | None,
    revision: str | None,
    follow_links: bool,
    genai: bool,
    allow_pickle: bool,
    mixing: Mixing,
    calibrating: Calibrating,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Cut CHECKPOINT at its exits into the ONNX bundle OUT.

    CHECKPOINT is a folder of Hugging Face, Mistral, Megatron, EE-LLM or onnxruntime-genai, a GGUF file or a hub id.
    With --allow-pickle it may be a file of torch.save next to its config.json. With --preset, OUT is the bundle that
    `shortstack quantize` would make of it, and no float bundle is written in between.
    """
    from shortstack.export.assemble import export_bundle
    from shortstack.export.kept_blocks import KeptBlocks
    from shortstack.export.spec import DTYPES, ExportSpec
    from shortstack.quant.quality_table import error_lines, search_lines, tuning_lines
    from shortstack.quant.record import read_record

    if draft_text is not None and draft_vocab is None:
        raise RequestError("--draft-text chooses the ids for --draft-vocab", remedy="add --draft-vocab N")
    if mixing.preset_name is None:
        options = [field.name for group in (Mixing, Calibrating) for field in fields(group)]
        refuse_given(tuple(options), "without --preset, weights stay floats", "add --preset int4")
    chosen: list[KeptBlocks] = []  # one, or none without --keep-blocks
    request = ExportSpec(
        checkpoint=checkpoint,
        out=out,
        exit_layers=tuple(sorted(exit_layers)),
        draft_vocab=draft_vocab,
        draft_text=draft_text,
        dtype=DTYPES[dtype],
        keep_blocks=keep_blocks,
        max_length=max_length,
        revision=revision,
        follow_links=follow_links,
        genai=genai,
        allow_pickle=allow_pickle,
        overwrite=overwrite,
        adapter=adapter,
        exits=exits,
        drafter=drafter,
    )
    if mixing.preset_name is None:
        bundle = export_bundle(request, chosen.append)
    else:
        from shortstack.export.quantized import export_quantized

        bundle = export_quantized(request, calibrating.quantization(mixing), chosen.append, tell_reach)
    record = read_record(bundle)
    for kept in chosen:
        click.echo("\n".join(kept.lines()), err=True)
    said = () if record is None else (*search_lines(record), *tuning_lines(record.fates()), *error_lines(record))
    for line in said:
        click.echo(line, err=True)
    manifest = bundle.manifest
    total_bytes = sum(entry.bytes for entry in manifest.files.values())
    segments = [[s.start, s.end] for s in manifest.plan.segments]
    if as_json:
        blocks = {key: value for kept in chosen for key, value in kept.to_json().items()}
        found = {"bundle": str(out), "segments": segments, "bytes": total_bytes, "max_length": manifest.max_length}
        quantized = {} if record is None else {**record.found(), "worst": record.worst(8)}
        click.echo(json.dumps({**found, **blocks, **quantized}))
    else:
        cuts = " | ".join(f"layers {start}-{end - 1}" for start, end in segments)
        click.echo(f"{out}: {cuts}; {total_bytes / 1e6:.1f} MB")
