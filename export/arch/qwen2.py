"""Qwen2 and Qwen2.5: Llama with biases on q, k and v.

https://arxiv.org/abs/2407.10671
"""

from __future__ import annotations

from shortstack.export.arch.family import Family, Key, llama_sources
from shortstack.export.arch.layer_types import upper_slide
from shortstack.export.arch.make_family import architecture

FAMILY = Family(
    model_type="qwen2",
    transformers_class="Qwen2ForCausalLM",
    sources=llama_sources(),
    kv_heads=Key("num_key_value_heads", 32),
    context=Key("max_position_embeddings", 32768),
    qkv_bias=True,
    out_bias=False,
    layer_types=upper_slide,
    window=Key("sliding_window", 4096),
    window_switch="use_sliding_window",
)

ARCH = architecture(FAMILY)
