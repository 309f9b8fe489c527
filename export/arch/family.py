"""Describes a decoder-only family as data: which field of its config says what, and what is fixed.

A value is either fixed, or a :class:`Key`: a field of ``config.json`` with the default that the family's class in
transformers has. :mod:`shortstack.export.arch.read_family` turns a config into a spec by this table, and
:mod:`shortstack.export.arch.write_family` a spec into a config. A family's file in this folder names what differs from
Llama.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from shortstack.export.arch.architecture import RopePairs, Source
from shortstack.export.checkpoint.config import Config
from shortstack.graphs.layer_spec import Activation, NormKind, QKNormOver
from shortstack.graphs.spec import ModelSpec

FULL, SLIDING = "full_attention", "sliding_attention"
REQUIRED: Final = "required"


@dataclass(frozen=True, slots=True)
class Key:
    """A field of the config.

    Attributes:
        name: The field.
        default: Its value where it is absent or null; :data:`REQUIRED` for none.
    """

    name: str
    default: Any = REQUIRED


Position = Literal["before_attention", "after_attention", "before_mlp", "after_mlp"]
PRE_NORMS: tuple[Position, ...] = ("before_attention", "before_mlp")
POST_NORMS: tuple[Position, ...] = ("after_attention", "after_mlp")
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}
"""Ours by transformers' name."""


NEUTRAL: Mapping[str, object] = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "is_causal": True,
    "use_bidirectional_attention": False,
    "attention_chunk_size": None,
    "clip_qkv": None,
    "alibi": False,
}
"""Fields of any config that change what a model computes, and the one value that our graphs have."""


def all_full(config: Config, layers: int) -> tuple[str, ...]:
    """Return the types of layers that all see everything."""
    return (FULL,) * layers


def has_rope(config: Config, types: tuple[str, ...]) -> tuple[bool, ...]:
    """Return that every layer has a rotary embedding."""
    return (True,) * len(types)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family; the defaults are Llama's.

    Attributes:
        model_type: Its name in ``config.json``.
        transformers_class: Its class in transformers, for the configs that training writes.
        sources: The tensor of each role.
        prefixes: See :class:`Architecture`.
        num_layers: L.
        hidden: Width of the residual stream.
        inner: Width of the MLP.
        heads: Query heads.
        kv_heads: Key/value heads; null and a default of None are as many as query heads.
        head_dim: Width of one head; null and a default of None are hidden / heads. None: it is that in all models.
        vocab: Rows of the embedding.
        context: The longest context.
        tied: The LM head is the embedding.
        norm_kind: Of all norms of the stream.
        norm_eps: Of all norms.
        norm_bias: Norms of the stream have a bias.
        norms: Which norms a layer has.
        is_parallel: Attention and MLP read the same stream.
        activation: Between the projections of the MLP.
        activations: The names of activations that the family may have.
        activation_means: Names that mean another activation in this family than elsewhere.
        is_gated: The MLP has a gate.
        qkv_bias: The q, k and v projections have biases.
        out_bias: The o projection has one; None: where the others do.
        mlp_bias: The projections of the MLP have biases.
        qk_norm: Over what queries and keys are normalised; None for not at all.
        qk_norm_after_rope: They are normalised after their rotation.
        softcap: Of attention's scores; 0 for none.
        scale: What scores are multiplied by; None for head_dim ** -0.5.
        scale_base: A number whose power -0.5 is the scale; None for none.
        residual_scale: Of both branches.
        rope_theta: The default base of the rotary frequencies.
        rope_parameters: The object of the rotary embedding that a config without one stands for; None for none.
        rope_share: Which share of a head is rotated.
        local_rope: The default base of the rotary embedding that sliding layers have of their own, and the field, if
            any, that names it in older configs; None if all layers share one.
        rope_pairs: See :class:`Architecture`.
        theta_key: The field at the top of the config that names the base.
        rope_same_as: Kinds of scaling that the family means by other names.
        original_context: Its class has the field ``original_max_position_embeddings`` with this default; None: it has
            no such field.
        layer_types: Reads the type of each layer.
        window: How many positions a sliding layer sees.
        has_null_window: A window of null says that no layer slides. Others need a number even then.
        window_switch: The field without which layers do not slide; None for none.
        has_rope: Which layers have a rotary embedding, by their types.
        embed_scale: Of the embeddings; ``root`` for the root of the hidden size.
        learns_positions: A table of positions, as long as the context, is added to the embeddings.
        logit_scale: What logits are multiplied by. ``divides_logits`` makes it a divisor.
        divides_logits: See ``logit_scale``.
        logit_softcap: Of the logits; 0 for none.
        neutral: Further fields as in :data:`NEUTRAL`.
        reads_sharing: ``extend`` reads the fields of :mod:`shortstack.export.arch.own_sharing`, and ``extra_config``
            writes them.
        extend: Changes the spec as further fields of the config say.
        extra_config: Further fields of a config that describes a spec.
        is_in_transformers: See :class:`Architecture`.
    """

    model_type: str
    transformers_class: str
    sources: Mapping[str, Source]
    prefixes: tuple[str, ...] = ("",)
    num_layers: Key = Key("num_hidden_layers")
    hidden: Key = Key("hidden_size")
    inner: Key = Key("intermediate_size")
    heads: Key = Key("num_attention_heads")
    kv_heads: Key | None = Key("num_key_value_heads", None)
    head_dim: Key | None = Key("head_dim", None)
    vocab: Key = Key("vocab_size")
    context: Key = Key("max_position_embeddings", 2048)
    tied: Key | bool = Key("tie_word_embeddings", False)
    norm_kind: NormKind = "rms"
    norm_eps: Key = Key("rms_norm_eps", 1e-6)
    norm_bias: bool = False
    norms: tuple[Position, ...] = PRE_NORMS
    is_parallel: Key | bool = False
    activation: Key = Key("hidden_act", "silu")
    activations: tuple[str, ...] = ("silu",)
    activation_means: Mapping[str, Activation] = field(default_factory=dict)
    is_gated: bool = True
    qkv_bias: Key | bool = Key("attention_bias", False)
    out_bias: Key | bool = Key("attention_bias", False)
    mlp_bias: Key | bool = False
    qk_norm: QKNormOver | None = None
    qk_norm_after_rope: bool = False
    softcap: Key | float = 0.0
    scale: Key | None = None
    scale_base: Key | None = None
    residual_scale: Key | float = 1.0
    rope_theta: float = 10000.0
    rope_parameters: Mapping[str, object] | None = None
    rope_share: Key | float = 1.0
    local_rope: Key | float | None = None
    rope_pairs: RopePairs = "halves"
    theta_key: str = "rope_theta"
    rope_same_as: Mapping[str, str] = field(default_factory=dict)
    original_context: int | None = None
    layer_types: Callable[[Config, int], tuple[str, ...]] = all_full
    window: Key = Key("sliding_window")
    has_null_window: bool = False
    window_switch: str | None = None
    has_rope: Callable[[Config, tuple[str, ...]], tuple[bool, ...]] = has_rope
    embed_scale: Key | float | Literal["root"] = 1.0
    learns_positions: bool = False
    logit_scale: Key | float = 1.0
    divides_logits: bool = False
    logit_softcap: Key | float = 0.0
    neutral: Mapping[str, object] = field(default_factory=dict)
    reads_sharing: bool = False
    extend: Callable[[Config, ModelSpec], ModelSpec] = lambda config, spec: spec
    extra_config: Callable[[ModelSpec], dict[str, Any]] = lambda spec: {}
    is_in_transformers: Callable[[ModelSpec], bool] = field(default=lambda spec: True)


def llama_sources(modules: Mapping[str, str] = {}, **options: Any) -> dict[str, Source]:  # never changed
    """Return the tensors of a family whose checkpoints are named as Llama's.

    Args:
        modules: The modules of further roles, or of renamed ones, without ``.weight``: such as
            ``{"q_norm": "self_attn.q_layernorm"}``. Those of a layer are named within it.
        **options: Of the sources of the norms' weights: ``plus``.
    """
    found = {
        "embed_tokens.weight": Source("model.embed_tokens.weight"),
        "lm_head.weight": Source("lm_head.weight"),
        **{f"final_norm.{kind}": Source(f"model.norm.{kind}", **options) for kind in ("weight", "bias")},
    }
    for role, module in {**_MODULES, **modules}.items():
        own = options if role.endswith("norm") else {}
        found |= {f"{role}.{kind}": Source(f"{LAYER}.{module}.{kind}", **own) for kind in ("weight", "bias")}
    return found


KINDS = ("weight", "bias")
LAYER = "model.layers.{layer}"
_MODULES = {
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    **{role: f"self_attn.{role}" for role in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")},
    **{role: f"mlp.{role}" for role in ("gate_proj", "up_proj", "down_proj")},
}
