"""Writes drafters as GGUF files, as llama.cpp's converter does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file, save_file

from helpers.gguf_converter import convert
from helpers.gguf_files import Kind, byte_level, permute

_EAGLE3 = {
    "fc": "fc",
    "norm": "output_norm",
    "lm_head": "output",
    "embed_tokens": "token_embd",
    "midlayer.hidden_norm": "blk.0.attn_norm_2",
    "midlayer.input_layernorm": "blk.0.attn_norm",
    "midlayer.post_attention_layernorm": "blk.0.ffn_norm",
    "midlayer.self_attn.q_proj": "blk.0.attn_q",
    "midlayer.self_attn.k_proj": "blk.0.attn_k",
    "midlayer.self_attn.v_proj": "blk.0.attn_v",
    "midlayer.self_attn.o_proj": "blk.0.attn_output",
    "midlayer.mlp.gate_proj": "blk.0.ffn_gate",
    "midlayer.mlp.up_proj": "blk.0.ffn_up",
    "midlayer.mlp.down_proj": "blk.0.ffn_down",
}
_NEXTN = {
    "eh_proj": "nextn.eh_proj",
    "enorm": "nextn.enorm",
    "hnorm": "nextn.hnorm",
    "embed_tokens": "nextn.embed_tokens",
    "shared_head.head": "nextn.shared_head_head",
    "shared_head.norm": "nextn.shared_head_norm",
}


def eagle3_gguf(
    folder: Path,
    file: Path,
    *,
    layers: str = "target_layers",
    changed: Mapping[str, np.ndarray | None] = {},  # never changed
    architecture: str = "eagle3",
) -> Path:
    """Convert an EAGLE-3 head.

    Args:
        folder: The head, as EAGLE saves it.
        file: The file to write.
        layers: The key of the depths that it reads.
        changed: Tensors that differ, by GGUF name; None leaves one out.
        architecture: What the file says that it is.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_array(f"{architecture}.{layers}", config["eagle_aux_hidden_state_layer_ids"])
    writer.add_bool(f"{architecture}.norm_before_residual", config.get("norm_before_residual", False))
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    stored: dict[str, np.ndarray | None] = {}
    for name, value in load_file(folder / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if name == "d2t":
            stored[name] = value + np.arange(len(value))
        elif name != "t2d":
            kind = stem[-6] if stem.endswith(("q_proj", "k_proj")) else ""
            stored[f"{_EAGLE3[stem]}.weight"] = permute(value, heads[kind]) if kind else value
    for name, value in {**stored, **changed}.items():
        if value is not None:
            writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def with_mtp_gguf(
    folder: Path, file: Path, architecture: str, *, skip: str = "nothing", kind: Kind | None = None
) -> Path:
    """Convert a model whose checkpoint has layers for multi-token prediction above its own, tokenizer included.

    Args:
        folder: The model, with the names of DeepSeek's layers.
        file: The file to write.
        architecture: llama.cpp's name of its architecture.
        skip: A part of the GGUF names of tensors of such layers to leave out.
        kind: Type of the model's own matrices; None for float32.
    """
    config = json.loads((folder / "config.json").read_text())
    layers, vocab = config["num_hidden_layers"], config["vocab_size"]
    found = load_file(folder / "model.safetensors")
    above = {name: value for name, value in found.items() if _number(name) >= layers}
    count = max(map(_number, above)) - layers + 1
    base = file.parent / "base"
    base.mkdir()
    save_file({name: value for name, value in found.items() if name not in above}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(config))
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, layers + count)
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    extra = {}
    for name, value in above.items():
        stem, suffix = name.rsplit(".", 1)
        own = stem.split(".", 3)[3]
        if architecture == "llama" and own.endswith(("q_proj", "k_proj")):
            value = permute(value, heads[own[-6]])
        target = f"blk.{_number(name)}.{_NEXTN[own]}" if own in _NEXTN else names.get_name(stem)
        if skip not in f"{target}.{suffix}":
            extra[f"{target}.{suffix}"] = np.ascontiguousarray(value)

    def edit(writer: gguf.GGUFWriter) -> None:
        byte_level(writer)
        few = writer.kv_data[0]["tokenizer.ggml.tokens"].value
        types = writer.kv_data[0]["tokenizer.ggml.token_type"].value
        writer.add_token_list([*few, *(f"[{index}]" for index in range(len(few), vocab))])
        writer.add_token_types([*types, *[1] * (vocab - len(few))])
        writer.add_block_count(layers + count)
        writer.add_nextn_predict_layers(count)

    return convert(base, file, architecture, kind=kind, edit=edit, extra=extra)


def _number(name: str) -> int:
    return int(name.split(".")[2]) if name.startswith("model.layers.") else -1
