"""Tensor names of llama.cpp and their Hugging Face counterparts, as data, by layout of a layer.

The left column is gguf-py's ``TENSOR_NAMES``; the right one is what ``transformers`` calls the same weight. Most
architectures differ from Llama in a few names; None says that an architecture has no such tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_rot_embd": "self_attn.rotary_emb",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

QK_NORMS: Mapping[str, str | None] = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
QK_NORMS_OF_HUNYUAN: Mapping[str, str | None] = {
    "attn_q_norm": "self_attn.query_layernorm",
    "attn_k_norm": "self_attn.key_layernorm",
}
NORMS_OF_EACH_HEAD: Mapping[str, str | None] = {
    "attn_q_norm": "self_attn.q_layernorm.norms.{head}",
    "attn_k_norm": "self_attn.k_layernorm.norms.{head}",
}
"""Of one tensor, whose rows are those of the heads."""
POST_NORMS: Mapping[str, str | None] = {
    "attn_norm": None,
    "ffn_norm": None,
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
"""Norms after the branches alone: OLMo 2, EXAONE 4."""
FOUR_NORMS: Mapping[str, str | None] = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
"""Norms before and after the branches: Gemma 2 and 3."""
FOUR_NORMS_OF_GLM: Mapping[str, str | None] = {
    "post_attention_norm": "post_self_attn_layernorm",
    "post_ffw_norm": "post_mlp_layernorm",
}
TOKEN_BRANCH: Mapping[str, str | None] = {
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "layer_output_scale.weight": "layer_scalar",
}
"""The branch on tokens and the scalar of each layer of Gemma 4."""
GEMMA4_ENDS: Mapping[str, str] = {
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}
STACKED_QKV: Mapping[str, str | None] = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q": None,
    "attn_k": None,
    "attn_v": None,
}
STACKED_GATE: Mapping[str, str | None] = {"ffn_gate": None, "ffn_up": "mlp.gate_up_proj"}
NO_GATE: Mapping[str, str | None] = {"ffn_gate": None}


def llama_names(*changes: Mapping[str, str | None], ends: Mapping[str, str] = {}) -> Mapping[str, str]:
    """Return the names of an architecture that differs from Llama by these names within a layer.

    Args:
        *changes: Names within a layer; one that ends in ``.weight`` stands for a tensor whose name ends differently.
        ends: Further names outside the layers.
    """
    layer: dict[str, str | None] = {**_LAYER}
    for change in changes:
        layer |= change
    layers = {f"blk.{{layer}}.{stem}": f"model.layers.{{layer}}.{name}" for stem, name in layer.items() if name}
    return MappingProxyType({**_ENDS, **ends, **layers})


LLAMA_NAMES = llama_names()
NEOX_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "token_embd": "gpt_neox.embed_in",
        "output_norm": "gpt_neox.final_layer_norm",
        "output": "embed_out",
        "blk.{layer}.attn_norm": "gpt_neox.layers.{layer}.input_layernorm",
        "blk.{layer}.attn_qkv": "gpt_neox.layers.{layer}.attention.query_key_value",
        "blk.{layer}.attn_output": "gpt_neox.layers.{layer}.attention.dense",
        "blk.{layer}.ffn_norm": "gpt_neox.layers.{layer}.post_attention_layernorm",
        "blk.{layer}.ffn_up": "gpt_neox.layers.{layer}.mlp.dense_h_to_4h",
        "blk.{layer}.ffn_down": "gpt_neox.layers.{layer}.mlp.dense_4h_to_h",
    }
)
GPT2_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "token_embd": "transformer.wte",
        "position_embd": "transformer.wpe",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
        "blk.{layer}.attn_norm": "transformer.h.{layer}.ln_1",
        "blk.{layer}.attn_qkv": "transformer.h.{layer}.attn.c_attn",
        "blk.{layer}.attn_output": "transformer.h.{layer}.attn.c_proj",
        "blk.{layer}.ffn_norm": "transformer.h.{layer}.ln_2",
        "blk.{layer}.ffn_up": "transformer.h.{layer}.mlp.c_fc",
        "blk.{layer}.ffn_down": "transformer.h.{layer}.mlp.c_proj",
    }
)

NEXTN_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "blk.{layer}.nextn.eh_proj": "model.layers.{layer}.eh_proj",
        "blk.{layer}.nextn.enorm": "model.layers.{layer}.enorm",
        "blk.{layer}.nextn.hnorm": "model.layers.{layer}.hnorm",
        "blk.{layer}.nextn.embed_tokens": "model.layers.{layer}.embed_tokens",
        "blk.{layer}.nextn.shared_head_head": "model.layers.{layer}.shared_head.head",
        "blk.{layer}.nextn.shared_head_norm": "model.layers.{layer}.shared_head.norm",
    }
)
"""What layers for multi-token prediction have besides those of other layers, in any architecture."""

EAGLE3_IDS, EAGLE3_DEPTHS = "d2t_holds_ids", "layer_ids_are_depths"
"""Fields of our own in the config of an EAGLE-3 head: ``d2t`` holds token ids, and layers are named by their depth."""

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


def to_hugging_face(name: str, table: Mapping[str, str] = LLAMA_NAMES) -> str:
    """Return the Hugging Face name of a GGUF tensor; a name that is not in the table stays as it is.

    >>> to_hugging_face("blk.3.attn_q.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    stem, _, suffix = name.rpartition(".")
    layer = ""
    if match := _BLOCK.fullmatch(stem):
        layer, stem = match[1], "blk.{layer}." + match[2]
    if (whole := f"{stem}.{suffix}") in table:
        return table[whole].replace("{layer}", layer)
    if stem not in table or suffix not in ("weight", "bias"):
        return name
    return f"{table[stem].replace('{layer}', layer)}.{suffix}"


def stem_of(name: str) -> str:
    """Return what a GGUF tensor is, without its layer and kind.

    >>> stem_of("blk.3.attn_q.weight")
    'attn_q'
    """
    stem = name.rpartition(".")[0]
    match = _BLOCK.fullmatch(stem)
    return match[2] if match else stem
