"""The forms of drafters that the tests go through, and the folders that they are exported from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from helpers.drafters import Eagle3, Projected
from shortstack.export.spec import OWN_DRAFTER, ExportSpec

HEADS = {
    "as EAGLE saves it": Eagle3(),
    "ids out of order": Eagle3(seed=1),
    "as speculators saves it": Eagle3(draft_vocab=None, in_speculators=True, first="layers.0"),
    "a norm over all features": Eagle3(options={"norm_before_fc": True}),
    "a norm over each feature": Eagle3(options={"fc_norm": True}),
    "a normalised stream and feedback": Eagle3(options={"norm_before_residual": True, "norm_output": True}),
    "narrower, with its own embedding": Eagle3(hidden=48, has_embedding=True, theta=500.0, features=(2, 4)),
    "heads off 16": Eagle3(head_dim=12),
}
KINDS = {
    "EAGLE": Projected("eagle"),
    "EAGLE without a bias": Projected("eagle", has_bias=False),
    "MiMo's layer": Projected("mimo"),
    "DeepSeek's layer": Projected("deepseek"),
}


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
