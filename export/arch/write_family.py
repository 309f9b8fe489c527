"""Turns a spec into a config that its family reads back (:mod:`shortstack.export.arch.family`)."""

from __future__ import annotations

import math
from typing import Any

from shortstack.export.arch.family import ACTIVATIONS, FULL, SLIDING, Family, Key
from shortstack.graphs.layer_spec import Rope
from shortstack.graphs.spec import ModelSpec


def write_family(family: Family, spec: ModelSpec) -> dict[str, Any]:
    """Return the fields of a ``config.json``, under the family's names."""
    layer, ends = spec.layers[0], spec.ends
    attention = layer.attention
    scale = _whole(1.0 / ends.logit_scale) if family.divides_logits else ends.logit_scale
    meanings = {**ACTIVATIONS, **family.activation_means}
    activation = next(name for name in family.activations if meanings[name] == layer.mlp.activation)
    values: tuple[tuple[Any, Any], ...] = (
        (family.num_layers, spec.num_hidden_layers),
        (family.hidden, spec.hidden_size),
        (family.inner, layer.mlp.width),
        (family.heads, attention.heads),
        (family.kv_heads, attention.kv_heads),
        (family.head_dim, attention.head_dim),
        (family.vocab, spec.vocab_size),
        (family.activation, activation),
        (family.norm_eps, ends.final_norm.eps),
        (family.context, spec.max_position_embeddings),
        (family.tied, spec.tie_word_embeddings),
        (family.qkv_bias, attention.qkv_bias),
        (family.out_bias, attention.out_bias),
        (family.mlp_bias, layer.mlp.has_bias),
        (family.is_parallel, layer.is_parallel),
        (family.softcap, attention.softcap or None),
        (family.scale, attention.scale),
        (family.scale_base, _whole(attention.score_scale**-2) if family.scale_base else None),
        (family.residual_scale, layer.residual_scale),
        (family.embed_scale, ends.embed_scale),
        (family.logit_scale, scale),
        (family.logit_softcap, ends.logit_softcap or None),
    )
    config: dict[str, Any] = {"architectures": [family.transformers_class], "model_type": spec.model_type}
    config |= {key.name: value for key, value in values if isinstance(key, Key)}
    config["pad_token_id"] = None  # the default of some classes is beyond the end of a smaller vocabulary
    if family.layer_types.__name__ != "all_full":
        config["layer_types"] = [SLIDING if own.attention.window else FULL for own in spec.layers]
        if window := max(own.attention.window for own in spec.layers):
            config[family.window.name] = window
        elif family.has_null_window:
            config[family.window.name] = None
        if family.window_switch is not None:
            config[family.window_switch] = window > 0
    return config | _ropes(family, spec) | family.extra_config(spec)


def _whole(value: float) -> float | int:
    """Return an integer that a power of it has been rounded from."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-9) else value


def _ropes(family: Family, spec: ModelSpec) -> dict[str, Any]:
    if not spec.ropes:
        return {}
    if family.local_rope is None:
        (rope,) = spec.ropes
        fields = _rope(family, rope)
        top = {"rope_theta": rope.theta, "rope_parameters": fields}
        if family.original_context is not None and "original_max_position_embeddings" in fields:
            top["original_max_position_embeddings"] = fields["original_max_position_embeddings"]
        return top
    by_type: dict[str, Any] = {}
    for layer in spec.layers:
        if layer.attention.rope is not None:
            rope = spec.ropes[layer.attention.rope]
            by_type[SLIDING if layer.attention.window else FULL] = _rope(family, rope)
    return {"rope_parameters": by_type}


def _rope(family: Family, rope: Rope) -> dict[str, Any]:
    scaling = rope.scaling
    fields: dict[str, Any] = {"rope_type": scaling.kind, "rope_theta": rope.theta}
    if scaling.kind in ("linear", "llama3", "proportional"):
        fields["factor"] = scaling.factor
    if scaling.kind == "llama3":
        fields |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    if scaling.kind in ("yarn", "longrope"):
        fields |= {
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
            "attention_factor": scaling.attention_factor,
        }
    if scaling.kind == "yarn":
        fields |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
    if scaling.kind == "longrope":
        fields |= {"short_factor": list(scaling.short_factors), "long_factor": list(scaling.long_factors)}
    if isinstance(family.rope_share, Key):
        fields["partial_rotary_factor"] = _share(rope)
    return fields


def _share(rope: Rope) -> float:
    """Return a share of the head that gives the same columns when readers cut their number down to an integer."""
    share = rope.dims / rope.head_dim
    return share if int(rope.head_dim * share) == rope.dims else (rope.dims + 0.5) / rope.head_dim
