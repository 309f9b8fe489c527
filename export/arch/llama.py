"""Llama: Llama 2, 3, 3.1 and 3.2, SmolLM and SmolLM2, TinyLlama, and LayerSkip's checkpoints of them.

The fields and their defaults are those of ``transformers.LlamaConfig``. https://arxiv.org/abs/2307.09288 describes the
model. Layers may share keys and values and have windows, see :mod:`shortstack.export.arch.kv_sharing`.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import cast

from shortstack.export.arch.architecture import Architecture
from shortstack.export.arch.kv_sharing import read_sharing
from shortstack.export.checkpoint.config import Config, not_one_of
from shortstack.graphs.errors import CheckpointError, UnsupportedError
from shortstack.graphs.spec import ModelSpec, RopeKind, RopeScaling

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

_MAX_LAYERS = 4096  # a damaged file must not make us list billions of tensors

_ROPE_TYPES: tuple[RopeKind, ...] = ("default", "linear", "llama3", "factors")


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
    heads = _positive(config, "num_attention_heads")
    kv_heads = _positive(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(
            config.where("num_key_value_heads"), found=kv_heads, expected=f"a divisor of num_attention_heads, {heads}"
        )
    hidden_size = _positive(config, "hidden_size")
    if "head_dim" not in config and hidden_size % heads:
        raise CheckpointError(
            f"{config.where('hidden_size')} does not divide into {heads} heads, and head_dim is not given",
            found=hidden_size,
        )
    head_dim = _positive(config, "head_dim", max(hidden_size // heads, 1))
    if head_dim % 2:
        raise CheckpointError(config.where("head_dim"), found=head_dim, expected="an even number, for rotary embedding")
    eps = config.read(float, "rms_norm_eps", 1e-6)
    if eps <= 0:
        raise config.wrong("rms_norm_eps", "a positive number")
    layers = _positive(config, "num_hidden_layers")
    if layers > _MAX_LAYERS:
        raise config.wrong("num_hidden_layers", f"at most {_MAX_LAYERS}")
    attention_bias = config.read(bool, "attention_bias", False)
    rope_theta, rope_scaling = read_rope(config)
    return ModelSpec(
        model_type="llama",
        num_hidden_layers=layers,
        hidden_size=hidden_size,
        intermediate_size=_positive(config, "intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=_positive(config, "vocab_size"),
        rms_norm_eps=eps,
        rope_theta=rope_theta,
        max_position_embeddings=_positive(config, "max_position_embeddings", 2048),
        tie_word_embeddings=config.read(bool, "tie_word_embeddings", False),
        rope_scaling=rope_scaling,
        qkv_bias=attention_bias,
        attention_out_bias=config.read(bool, "attention_out_bias", attention_bias),  # split only by our GGUF reader
        mlp_bias=config.read(bool, "mlp_bias", False),
    )


def read_rope(config: Config) -> tuple[float, RopeScaling]:
    """Read the rotary base and its scaling, in the style of transformers 4 or 5.

    Version 4 writes ``rope_theta`` and ``rope_scaling``, version 5 ``rope_parameters: {rope_theta, rope_type, ...}``.
    Where both styles are present, a field of ``rope_parameters`` wins.

    Raises:
        CheckpointError: A field is missing, has the wrong type, or is not positive.
        UnsupportedError: The rotary embedding is of a kind this version cannot export.
    """
    parameters, scaling = config.section("rope_parameters"), config.section("rope_scaling")
    theta_place = parameters if parameters is not None and "rope_theta" in parameters else config
    theta = _positive_float(theta_place, "rope_theta", 10000.0)
    for place in (config, parameters, scaling):
        if place is not None and place.read(float, "partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedError(
                f"{place.where('partial_rotary_factor')}: partial rotary embedding",
                found=place.read(float, "partial_rotary_factor"),
                expected="1.0",
            )
    fields = parameters if parameters is not None and _rope_type_key(parameters) else scaling
    if fields is None:
        return theta, RopeScaling()
    key = _rope_type_key(fields)
    if key is None:
        if "factor" not in fields:
            return theta, RopeScaling()
        raise CheckpointError(
            f"{fields.where('rope_type')} is missing", expected=f"one of {', '.join(_ROPE_TYPES[:3])}"
        )
    kind = fields.read(str, key)
    if kind not in _ROPE_TYPES:
        raise not_one_of(fields.where(key), kind, _ROPE_TYPES[:3])
    if kind == "default":
        return theta, RopeScaling()
    if kind == "factors":
        return theta, RopeScaling(kind="factors")
    factor = _positive_float(fields, "factor")
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=factor)
    low, high = _positive_float(fields, "low_freq_factor"), _positive_float(fields, "high_freq_factor")
    if high <= low:
        raise CheckpointError(
            fields.where("high_freq_factor"), found=high, expected=f"more than low_freq_factor, {low}"
        )
    original = _positive(fields, "original_max_position_embeddings")
    return theta, RopeScaling(cast("RopeKind", kind), factor, low, high, original)


def _rope_type_key(fields: Config) -> str | None:
    """Return the name of the field that holds the kind of scaling: before transformers 4.43 it was ``type``."""
    return next((key for key in ("rope_type", "type") if key in fields), None)


def _positive(config: Config, key: str, default: int | None = None) -> int:
    value = config.read(int, key) if default is None else config.read(int, key, default)
    if value <= 0:
        raise config.wrong(key, "a positive integer")
    return value


def _positive_float(config: Config, key: str, default: float | None = None) -> float:
    value = config.read(float, key) if default is None else config.read(float, key, default)
    if value <= 0:
        raise config.wrong(key, "a positive number")
    return value


ARCH = Architecture(model_type="llama", read_spec=read_spec, tensor_names=MappingProxyType(_TENSOR_NAMES))
