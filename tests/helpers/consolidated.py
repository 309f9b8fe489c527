"""Writes a Mistral that transformers saved in the layout of Mistral's own code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

RENAMED = {
    r"model\.embed_tokens": "tok_embeddings",
    r"model\.norm": "norm",
    r"lm_head": "output",
    r"model\.layers\.(\d+)\.input_layernorm": r"layers.\1.attention_norm",
    r"model\.layers\.(\d+)\.post_attention_layernorm": r"layers.\1.ffn_norm",
    r"model\.layers\.(\d+)\.self_attn\.([qkvo])_proj": r"layers.\1.attention.w\2",
    r"model\.layers\.(\d+)\.mlp\.gate_proj": r"layers.\1.feed_forward.w1",
    r"model\.layers\.(\d+)\.mlp\.down_proj": r"layers.\1.feed_forward.w2",
    r"model\.layers\.(\d+)\.mlp\.up_proj": r"layers.\1.feed_forward.w3",
}


def neighbours(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Return the rows of q or k in the order in which Mistral's code rotates them: the halves of a head alternate."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def consolidated(folder: Path, out: Path, *, shards: int = 1, **params: Any) -> Path:
    """Write a copy of a folder of ``mistral``.

    Args:
        folder: What transformers saved.
        out: The folder to write.
        shards: Into how many files the weights go.
        **params: Other values of ``params.json``; None leaves a param out.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    out.mkdir(parents=True)
    state: dict[str, torch.Tensor] = {}
    for name, value in load_file(folder / "model.safetensors").items():
        for theirs, ours in RENAMED.items():
            name = re.sub(rf"^{theirs}\.weight$", rf"{ours}.weight", name)
        if name.endswith(("wq.weight", "wk.weight")):
            value = neighbours(value, heads if "wq" in name else kv_heads)
        state[name] = value.contiguous()
    if shards == 1:
        save_file(state, out / "consolidated.safetensors")
    else:
        weight_map: dict[str, str] = {}
        for number in range(shards):
            file, names = f"consolidated-{number + 1:05d}-of-{shards:05d}.safetensors", sorted(state)[number::shards]
            save_file({name: state[name] for name in names}, out / file)
            weight_map |= dict.fromkeys(names, file)
        index = out / "consolidated.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    values: dict[str, Any] = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "head_dim": config["head_dim"],
        "hidden_dim": config["intermediate_size"],
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "norm_eps": config["rms_norm_eps"],
        "vocab_size": config["vocab_size"],
        "rope_theta": config["rope_parameters"]["rope_theta"],
        "sliding_window": config["sliding_window"],
        "tied_embeddings": config["tie_word_embeddings"],
        "max_seq_len": config["max_position_embeddings"],
        **params,
    }
    written = {name: value for name, value in values.items() if value is not None}
    (out / "params.json").write_text(json.dumps(written), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (folder / name).exists():
            (out / name).write_bytes((folder / name).read_bytes())
    return out
