"""Llama: Llama 2, 3, 3.1 and 3.2, SmolLM and SmolLM2, TinyLlama, and LayerSkip's checkpoints of them.

The fields and their defaults are those of ``transformers.LlamaConfig``. https://arxiv.org/abs/2307.09288 describes the
model. Layers may share keys and values and have windows, see :mod:`shortstack.export.arch.kv_sharing`.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from shortstack.export.arch.architecture import Architecture
from shortstack.export.arch.kv_sharing import read_sharing
from shortstack.export.arch.rope_config import positive, read_rope
from shortstack.export.checkpoint.checkpoint import MAX_LAYERS
from shortstack.export.checkpoint.config import Config, not_one_of
from shortstack.graphs.errors import CheckpointError
from shortstack.graphs.spec import ModelSpec

_PROJECTIONS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}

_TENSOR_NAMES = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "input_norm.weight": "model.layers.{layer}.input_layernorm.weight",
    "post_attention_norm.weight": "model.layers.{layer}.post_attention_layernorm.weight",
    "final_norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    **{
        f"{role}.{part}": f"model.layers.{{layer}}.{name}.{part}"
        for role, name in _PROJECTIONS.items()
        for part in ("weight", "bias")
    },
}


def read_spec(config: Config) -> ModelSpec:
    """Read a Llama ``config.json``.

    Raises:
        CheckpointError: A field is missing, has the wrong type, or contradicts another one.
        UnsupportedError: The config asks for something this version cannot export.
    """
    spec = read_stack(config)
    return replace(spec, **read_sharing(config, spec).fields())


def read_stack(config: Config) -> ModelSpec:
    """Read all but the sharing and the windows, which related families spell differently; errors as in read_spec."""
    activation = config.read(str, "hidden_act", "silu")
    if activation != "silu":
        raise not_one_of(config.where("hidden_act"), activation, ("silu",))
    heads = positive(config, "num_attention_heads")
    kv_heads = positive(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(
            config.where("num_key_value_heads"), found=kv_heads, expected=f"a divisor of num_attention_heads, {heads}"
        )
    hidden_size = positive(config, "hidden_size")
    if "head_dim" not in config and hidden_size % heads:
        raise CheckpointError(
            f"{config.where('hidden_size')} does not divide into {heads} heads, and head_dim is not given",
            found=hidden_size,
        )
    head_dim = positive(config, "head_dim", max(hidden_size // heads, 1))
    if head_dim % 2:
        raise CheckpointError(config.where("head_dim"), found=head_dim, expected="an even number, for rotary embedding")
    eps = config.read(float, "rms_norm_eps", 1e-6)
    if eps <= 0:
        raise config.wrong("rms_norm_eps", "a positive number")
    layers = positive(config, "num_hidden_layers")
    if layers > MAX_LAYERS:
        raise config.wrong("num_hidden_layers", f"at most {MAX_LAYERS}")
    attention_bias = config.read(bool, "attention_bias", False)
    context = positive(config, "max_position_embeddings", 2048)
    rope_theta, rope_scaling = read_rope(config, context)
    return ModelSpec(
        model_type="llama",
        num_hidden_layers=layers,
        hidden_size=hidden_size,
        intermediate_size=positive(config, "intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=positive(config, "vocab_size"),
        rms_norm_eps=eps,
        rope_theta=rope_theta,
        max_position_embeddings=context,
        tie_word_embeddings=config.read(bool, "tie_word_embeddings", False),
        rope_scaling=rope_scaling,
        qkv_bias=attention_bias,
        attention_out_bias=config.read(bool, "attention_out_bias", attention_bias),  # split only by our GGUF reader
        mlp_bias=config.read(bool, "mlp_bias", False),
    )


ARCH = Architecture(model_type="llama", read_spec=read_spec, tensor_names=MappingProxyType(_TENSOR_NAMES))
