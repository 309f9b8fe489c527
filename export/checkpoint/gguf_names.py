"""Tensor names of llama.cpp's ``llama`` architecture and their Hugging Face counterparts, as data.

The left column is gguf-py's ``TENSOR_NAMES``; the right one is what ``transformers`` calls the same weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

LLAMA_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
        "blk.{layer}.attn_norm": "model.layers.{layer}.input_layernorm",
        "blk.{layer}.attn_q": "model.layers.{layer}.self_attn.q_proj",
        "blk.{layer}.attn_k": "model.layers.{layer}.self_attn.k_proj",
        "blk.{layer}.attn_v": "model.layers.{layer}.self_attn.v_proj",
        "blk.{layer}.attn_output": "model.layers.{layer}.self_attn.o_proj",
        "blk.{layer}.attn_rot_embd": "model.layers.{layer}.self_attn.rotary_emb",
        "blk.{layer}.ffn_norm": "model.layers.{layer}.post_attention_layernorm",
        "blk.{layer}.ffn_gate": "model.layers.{layer}.mlp.gate_proj",
        "blk.{layer}.ffn_up": "model.layers.{layer}.mlp.up_proj",
        "blk.{layer}.ffn_down": "model.layers.{layer}.mlp.down_proj",
    }
)

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
    if stem not in table or suffix not in ("weight", "bias"):
        return name
    return f"{table[stem].replace('{layer}', layer)}.{suffix}"
