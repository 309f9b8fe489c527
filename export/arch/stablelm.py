"""StableLM 2: Llama with layer norms, a quarter of each head rotated.

Attention and MLP may run in parallel, and each head may have a norm with weights of its own.

https://arxiv.org/abs/2402.17834
"""

from __future__ import annotations

from dataclasses import replace

from shortstack.export.arch.family import Family, Key, llama_sources
from shortstack.export.arch.make_family import architecture
from shortstack.export.checkpoint.checkpoint import HEAD
from shortstack.export.checkpoint.config import Config
from shortstack.graphs.layer_spec import Layer, Norm
from shortstack.graphs.spec import ModelSpec


def _layers(config: Config, spec: ModelSpec) -> ModelSpec:
    """Return the model; attention and MLP that run in parallel share a norm, and each head may have one of its own."""
    normalises_heads = config.read(bool, "qk_layernorm", False)

    def layer(own: Layer) -> Layer:
        attention, eps = own.attention, spec.norm_eps
        if normalises_heads:
            attention = replace(attention, qk_norm=Norm("layer", eps), qk_norm_over="each_head")
        return replace(own, attention=attention, before_mlp=None if own.is_parallel else own.before_mlp)

    return replace(spec, layers=tuple(map(layer, spec.layers)))


FAMILY = Family(
    model_type="stablelm",
    transformers_class="StableLmForCausalLM",
    sources=llama_sources({name: f"self_attn.{name[0]}_layernorm.norms.{HEAD}" for name in ("q_norm", "k_norm")}),
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
    extend=_layers,
    extra_config=lambda spec: {"qk_layernorm": spec.layers[0].attention.qk_norm is not None},
)

ARCH = architecture(FAMILY)
