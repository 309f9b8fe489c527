"""Gemma 1: Llama with norms that multiply by 1 + weight, a GELU and scaled embeddings.

https://arxiv.org/abs/2403.08295
"""

from __future__ import annotations

from types import MappingProxyType

from shortstack.export.arch.family import Family, Key, llama_sources
from shortstack.export.arch.make_family import architecture

FAMILY = Family(
    model_type="gemma",
    transformers_class="GemmaForCausalLM",
    sources=llama_sources(plus=1.0),
    kv_heads=Key("num_key_value_heads", 16),
    head_dim=Key("head_dim", 256),
    context=Key("max_position_embeddings", 8192),
    tied=Key("tie_word_embeddings", True),
    activation=Key("hidden_act", "gelu_pytorch_tanh"),
    activations=("gelu_pytorch_tanh", "gelu"),
    activation_means=MappingProxyType({"gelu": "gelu_tanh"}),
    embed_scale="root",
)

ARCH = architecture(FAMILY)
