"""Recognizes checkpoints that another tool has quantized, so that the refusal names the tool and not its tensors.

Those that are read (:mod:`shortstack.export.checkpoint.quantized`) look like checkpoints of floats here.
"""

from __future__ import annotations

import re

from shortstack.export.checkpoint.checkpoint import Checkpoint
from shortstack.export.checkpoint.quantized.stored import SECTIONS
from shortstack.graphs.errors import CheckpointError, UnsupportedError

_BITS = ("bits", "w_bit", "weight_bits", "nbits")
_TENSORS: tuple[tuple[str, str], ...] = (
    (r"\.(absmax|quant_map|quant_state\.\w+|SCB)$", "bitsandbytes"),
    (r"\.(qweight|qzeros|g_idx)$", "GPTQ or AWQ"),
    (r"\.(weight_packed|weight_shape|weight_zero_point)$", "compressed-tensors"),
    (r"\.(weight_scale|weight_scale_inv|input_scale|activation_scale)$", "fp8"),
    (r"_(blocks|scales)$", "MXFP4"),
)
"""What the tensors of a format are called beside the weights, for checkpoints whose config does not say it."""


def check_not_quantized(checkpoint: Checkpoint) -> None:
    """Check that a checkpoint's weights are stored as floats, or as a GGUF file stores them.

    Raises:
        CheckpointError: They are quantized, and the config does not say how.
        UnsupportedError: They are quantized; the message names the tool or format, and says what to do.
    """
    found = _said_by_config(checkpoint)
    if found is None and (tool := _said_by_tensors(checkpoint)) is not None:
        raise CheckpointError(
            f"{checkpoint.folder_or_file} has tensors as {tool} writes them, and config.json does not say so",
            expected="a quantization_config",
            remedy="take config.json and the weights from one revision of the model",
        )
    if found is not None:
        raise UnsupportedError(
            f"{checkpoint.folder_or_file} is quantized by {found}, which this version does not read",
            remedy="export the model that it was made from, then shrink the bundle with `shortstack quantize`; "
            "if there is only this one, transformers can write it as floats: `AutoModelForCausalLM.from_pretrained"
            "(FOLDER).dequantize().save_pretrained(NEW_FOLDER)`",
        )


def _said_by_config(checkpoint: Checkpoint) -> str | None:
    for key in SECTIONS:
        section = checkpoint.config.section(key)
        if section is not None and section.data:
            method = section.data.get("quant_method") or section.data.get("quant_algo") or f"what {key} describes"
            bits = next((section.data[name] for name in _BITS if type(section.data.get(name)) is int), None)
            if bits is None:
                bits = {"load_in_4bit": 4, "load_in_8bit": 8}.get(
                    next((name for name in ("load_in_4bit", "load_in_8bit") if section.data.get(name) is True), "")
                )
            return f"{method}" if bits is None else f"{method} to {bits} bit"
    return None


def _said_by_tensors(checkpoint: Checkpoint) -> str | None:
    names = checkpoint.names()
    for pattern, tool in _TENSORS:
        if any(re.search(pattern, name) for name in names):
            return tool
    return None
