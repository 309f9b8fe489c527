"""StableLM 2: Llama with layer norms, a quarter of each head rotated. Attention and MLP may run in parallel.

https://arxiv.org/abs/2402.17834
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from shortstack.export.arch.family import Family, Key, llama_sources
from shortstack.export.arch.make_family import architecture
from shortstack.export.checkpoint.config import Config
from shortstack.graphs.spec import ModelSpec


def _with_one_norm(config: Config, spec: ModelSpec) -> ModelSpec:
    """Return the model, in which attention and MLP that run in parallel share a norm."""
    return replace(
        spec,
        layers=tuple(replace(layer, before_mlp=None) if layer.is_parallel else layer for layer in spec.layers),
    )


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
    is_parallel=Key("use_parallel_residual", False),
    neutral=MappingProxyType({"qk_layernorm": False}),
    extend=_with_one_norm,
)

ARCH = architecture(FAMILY)
