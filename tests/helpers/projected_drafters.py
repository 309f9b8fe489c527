"""Writes EAGLE heads beside a checkpoint, and layers for multi-token prediction into a copy of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from helpers.drafters import Projected
from shortstack.export.spec import OWN_DRAFTER, ExportSpec


def written(checkpoint: Path, drafter: Projected, folder: Path) -> ExportSpec:
    """Write a drafter into a folder, or a layer into a copy of the checkpoint, and return the export of both."""
    if drafter.kind == "eagle":
        folder.mkdir()
        config = json.loads((checkpoint / "config.json").read_text())
        own = {"num_hidden_layers": 1, "rms_norm_eps": 1e-5, "bias": drafter.has_bias}
        (folder / "config.json").write_text(json.dumps({**config, **own}))
        save_file(drafter.tensors(), str(folder / "model.safetensors"))
        return ExportSpec(str(checkpoint), folder / "bundle", drafter=str(folder))
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    if drafter.kind == "mimo":
        own = {"model_type": "mimo", "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
        (folder / "config.json").write_text(json.dumps({**config, **own}))
    weights = load_file(str(folder / "model.safetensors"))
    if drafter.kind == "mimo":  # Qwen2's layers have biases, of zeros here
        for name in [name for name in weights if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]:
            weights[name.replace("weight", "bias")] = weights[name].new_zeros(len(weights[name]))
    save_file({**weights, **with_biases(drafter)}, str(folder / "model.safetensors"))
    return ExportSpec(str(folder), folder / "bundle", drafter=OWN_DRAFTER)


def with_biases(drafter: Projected) -> dict[str, object]:
    found = dict(drafter.tensors())
    if drafter.kind == "mimo":
        for name in [n for n in found if n.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]:
            found[name.replace("weight", "bias")] = found[name].new_zeros(len(found[name]))
    return found
