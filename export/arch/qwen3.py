"""Qwen3: Llama with normalised queries and keys.

https://arxiv.org/abs/2505.09388
"""

from __future__ import annotations

from shortstack.export.arch.family import Family, Key, llama_sources
from shortstack.export.arch.layer_types import upper_slide
from shortstack.export.arch.make_family import architecture

FAMILY = Family(
    model_type="qwen3",
    transformers_class="Qwen3ForCausalLM",
    sources=llama_sources(),
    kv_heads=Key("num_key_value_heads", 32),
    head_dim=Key("head_dim", 128),
    context=Key("max_position_embeddings", 32768),
    qk_norm="head",
    layer_types=upper_slide,
    window=Key("sliding_window", 4096),
    window_switch="use_sliding_window",
)

ARCH = architecture(FAMILY)
