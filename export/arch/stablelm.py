"""StableLM 2: Llama with layer norms, a quarter of each head rotated.

https://arxiv.org/abs/2402.17834
"""

from __future__ import annotations

from types import MappingProxyType

from shortstack.export.arch.family import Family, Key, llama_sources
from shortstack.export.arch.make_family import architecture

FAMILY = Family(
    model_type="stablelm",
    transformers_class="StableLmForCausalLM",
    sources=llama_sources(),
    norm_kind="layer",
    norm_bias=True,
    norm_eps=Key("layer_norm_eps", 1e-5),
    kv_heads=Key("num_key_value_heads", 32),
    head_dim=None,
    context=Key("max_position_embeddings", 4096),
    qkv_bias=Key("use_qkv_bias", False),
    out_bias=False,
    rope_share=Key("partial_rotary_factor", 0.25),
    neutral=MappingProxyType({"qk_layernorm": False, "use_parallel_residual": False}),
)

ARCH = architecture(FAMILY)
