"""onnxruntime-genai's model of a checkpoint, built by its own builder, under an interpreter that has it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from shortstack.samples.bench.artifacts import Precision, make

# The same block size and accuracy level as our recipes. The rest is the builder's choice: symmetric round-to-nearest,
# and for a tied model one quantized matrix that is both embedding and head.
_BLOCKS = ("block_size=32", "accuracy_level=4")
_OPTIONS: dict[Precision, tuple[str, ...]] = {"fp32": (), "int4": _BLOCKS, "int8": _BLOCKS}


def build_genai(source: Path, folder: Path, precision: Precision, python: str) -> Path:
    """Return onnxruntime-genai's model of the same weights, built unless it is there.

    Args:
        source: The checkpoint.
        folder: Where its models of this checkpoint are kept.
        precision: Of its matrices.
        python: An interpreter that has onnxruntime-genai, torch and transformers.
    """
    out = folder / precision
    if out.is_dir():
        return out
    checkpoint = folder / "checkpoint"
    partial = folder / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    make([sys.executable, "-m", "shortstack.samples.bench.hf_folder", str(source), str(checkpoint)], "weights")
    builder = [python, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(partial)]
    options = ["-c", str(folder / "cache"), "--extra_options", "hf_token=false", *_OPTIONS[precision]]
    make([*builder, "-p", precision, "-e", "cpu", *options], f"onnxruntime-genai's {precision} model")
    _never_end(partial / "genai_config.json")
    shutil.rmtree(checkpoint)
    partial.rename(out)
    return out


def _never_end(config_file: Path) -> None:
    """Let the engine continue after an end-of-sequence token, as ours does when asked: chunks must be equally long."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["model"]["eos_token_id"] = config["model"]["vocab_size"] - 1
    config_file.write_text(json.dumps(config, indent=1), encoding="utf-8")
