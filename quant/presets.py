"""The presets, by name; docs/benchmarks.md has what they give on three models, one of them fine-tuned."""

from __future__ import annotations

from shortstack.graphs.errors import RequestError
from shortstack.graphs.precision import BlockFormat
from shortstack.quant.preset import Preset

INT4 = BlockFormat(4)
INT4_SYMMETRIC = BlockFormat(4, is_symmetric=True)
INT8 = BlockFormat(8)
INT4_OFFSETS = BlockFormat(4, has_offsets=True)

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "int4",
            "int4 weights by GPTQ, in layers with offsets; int8 rows of frequent tokens, int8 cache",
            "gptq",
            weights=INT4_OFFSETS,
            head=INT4,
            embedding=INT4,
            first_rows=12_288,
            first_rows_format=INT8,
            kv_cache="int8",
        ),
        Preset(
            "int4-fast",
            "symmetric int4 weights by GPTQ without anything else, int8 cache: smallest, fastest, worst",
            "gptq",
            weights=INT4_SYMMETRIC,
            head=INT4_SYMMETRIC,
            embedding=INT4_SYMMETRIC,
            kv_cache="int8",
        ),
        Preset(
            "int8",
            "int8 weights, int4 draft heads, float cache: nearly the float model",
            "rtn",
            weights=INT8,
            head=INT8,
            embedding=INT8,
            draft_head=INT4,
        ),
        Preset(
            "float",
            "nothing in blocks: for --dtype fp16 or --kv-cache int8 alone",
            "rtn",
            weights=None,
            head=None,
            embedding=None,
        ),
    )
}


def find_preset(name: str) -> Preset:
    """Return a preset by name.

    Raises:
        RequestError: No preset has that name.
    """
    if name not in PRESETS:
        raise RequestError(
            "--preset is unknown",
            found=repr(name),
            expected=f"one of {', '.join(PRESETS)}",
            remedy="choose one of these, and change parts of it with --weights, --head, --draft-head or --method",
        )
    return PRESETS[name]
