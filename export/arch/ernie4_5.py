"""ERNIE 4.5: Llama that rotates neighbouring columns.

https://huggingface.co/baidu/ERNIE-4.5-0.3B-PT
"""

from __future__ import annotations

from shortstack.export.arch.family import Family, Key, llama_sources
from shortstack.export.arch.make_family import architecture

FAMILY = Family(
    model_type="ernie4_5",
    transformers_class="Ernie4_5ForCausalLM",
    sources=llama_sources(),
    kv_heads=Key("num_key_value_heads", 2),
    head_dim=Key("head_dim", 128),
    norm_eps=Key("rms_norm_eps", 1e-5),
    context=Key("max_position_embeddings", 131072),
    tied=Key("tie_word_embeddings", True),
    qkv_bias=Key("use_bias", False),
    out_bias=Key("use_bias", False),
    mlp_bias=Key("use_bias", False),
    rope_theta=500_000.0,
    rope_pairs="neighbours",
)

ARCH = architecture(FAMILY)
