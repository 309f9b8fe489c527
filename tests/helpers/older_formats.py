"""The content of bundle.json as older versions wrote it, from that of this version."""

from __future__ import annotations

from typing import Any

from shortstack.graphs import manifest
from shortstack.graphs.layer_spec import Norm


def flat(model: dict[str, Any], version: int) -> dict[str, Any]:
    """Return the object `model` as formats 1 to 3 have it."""
    ((kind,), (rope,)) = model["layer_kinds"], model["ropes"]
    attention, mlp = kind["attention"], kind["mlp"]
    sizes = ("model_type", "hidden_size", "vocab_size", "max_position_embeddings", "tie_word_embeddings", "kv_map")
    scaling = {"kind": "default", "factor": 1.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    found = {name: model[name] for name in sizes} | {
        "num_hidden_layers": len(model["layers"]),
        "intermediate_size": mlp["width"],
        "num_attention_heads": attention["heads"],
        "num_key_value_heads": attention["kv_heads"],
        "head_dim": attention["head_dim"],
        "rms_norm_eps": model["ends"]["final_norm"].get("eps", Norm().eps),
        "rope_theta": rope["theta"],
        "rope_scaling": scaling | {"original_max_position_embeddings": 0},
        **dict.fromkeys(("qkv_bias", "attention_out_bias", "mlp_bias"), False),
    }
    return found if version < 3 else found | {"windows": [], "masks_diagonal": False}


def as_format(data: dict[str, Any], version: int) -> dict[str, Any]:
    """Return the whole object as a format has it, with its digest."""
    older = data | {"format_version": version, "model": flat(data["model"], version)}
    if version < 3:
        older["exits"] = [{key: own[key] for key in ("exit_layer", "draft_vocab")} for own in data["exits"]]
    if version < 2:
        del older["precision"]
    return older | {"digest": manifest._digest(older)}
