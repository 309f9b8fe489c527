"""Helium: Llama that rotates neighbouring columns.

https://huggingface.co/kyutai/helium-1-2b
"""

from __future__ import annotations

from shortstack.export.arch.family import Family, Key, llama_sources
from shortstack.export.arch.make_family import architecture

FAMILY = Family(
    model_type="helium",
    transformers_class="HeliumForCausalLM",
    sources=llama_sources(),
    kv_heads=Key("num_key_value_heads", 20),
    head_dim=Key("head_dim", 128),
    norm_eps=Key("rms_norm_eps", 1e-8),
    context=Key("max_position_embeddings", 4096),
    out_bias=False,
    mlp_bias=Key("mlp_bias", False),
    rope_theta=100_000.0,
    rope_pairs="neighbours",
)

ARCH = architecture(FAMILY)
