"""Seed-OSS: Llama with biases on q, k and v.

https://huggingface.co/ByteDance-Seed/Seed-OSS-36B-Base
"""

from __future__ import annotations

from shortstack.export.arch.family import Family, Key, llama_sources
from shortstack.export.arch.make_family import architecture

FAMILY = Family(
    model_type="seed_oss",
    transformers_class="SeedOssForCausalLM",
    sources=llama_sources(),
    kv_heads=Key("num_key_value_heads", 8),
    head_dim=Key("head_dim", 128),
    context=Key("max_position_embeddings", 524288),
    qkv_bias=Key("attention_bias", True),
    out_bias=Key("attention_out_bias", False),
    mlp_bias=Key("mlp_bias", False),
)

ARCH = architecture(FAMILY)
