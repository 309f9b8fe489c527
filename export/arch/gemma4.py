"""Gemma 4: Gemma 3 whose full layers have heads of their own, shared keys and values, and a table of tokens per layer.

Norms multiply by the weight itself, scores are not scaled, values are normalised. E2B and E4B have the tables and share
keys and values; in 12B and 31B full layers take their values from the k projection. Mixtures of experts are refused.
https://ai.google.dev/gemma/docs/core
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shortstack.export.arch import gemma3
from shortstack.export.arch.architecture import Source
from shortstack.export.arch.family import FULL, LAYER, SLIDING, Key, llama_sources
from shortstack.export.arch.kv_sharing import gemma_kv_map
from shortstack.export.arch.layer_types import every
from shortstack.export.arch.make_family import architecture
from shortstack.export.arch.rope_config import rope_of_type
from shortstack.export.arch.text_part import text_part
from shortstack.export.checkpoint.config import Config, positive
from shortstack.graphs.errors import CheckpointError, UnsupportedError
from shortstack.graphs.layer_spec import Attention, Layer, Norm, PerLayerInput, Rope, RopeScaling
from shortstack.graphs.spec import ModelSpec

_LOCAL, _GLOBAL, _GLOBAL_SHARE = 10_000.0, 1_000_000.0, 0.25  # of the rotary embeddings of a config without them
_HEADS = {"head_dim": "head_dim", "num_key_value_heads": "kv_heads"}  # our field, by the config's


def _layer_types(config: Config, layers: int) -> tuple[str, ...]:
    """Read the types of the layers; the last one always sees everything."""
    return (*every(6, None)(config, layers)[:-1], FULL)


def _extend(config: Config, spec: ModelSpec) -> ModelSpec:
    depth = spec.num_hidden_layers
    types = _layer_types(config, depth)
    kv_map = gemma_kv_map(config, types)
    takes_keys = config.read(bool, "attention_k_eq_v", False)
    of_full = _heads_of_full_layers(config, spec.layers[0].attention, types, takes_keys)
    norm = Norm("rms", spec.norm_eps)
    by_type = {kind: _rope(config, kind, of_full.head_dim, spec) for kind in dict.fromkeys(types)}
    ropes = tuple(dict.fromkeys(by_type.values()))
    width = config.read(int, "hidden_size_per_layer_input", 256)
    if width < 0:
        raise config.wrong("hidden_size_per_layer_input", "0 for none, or a width")
    tokens = None
    if width:
        vocab = positive(config, "vocab_size_per_layer_input", 262_144)
        tokens = PerLayerInput(width, vocab, spec.layers[0].mlp.activation, norm)
    is_double = config.read(bool, "use_double_wide_mlp", False)

    def layer(number: int, own: Layer) -> Layer:
        is_full = types[number] == FULL
        attention = of_full if is_full else own.attention
        attention = replace(
            attention,
            scale=1.0,
            window=own.attention.window,
            rope=ropes.index(by_type[types[number]]),
            v_norm=norm,
            k_equals_v=is_full and takes_keys,
        )
        mlp = replace(own.mlp, width=2 * own.mlp.width) if is_double and kv_map[number] != number else own.mlp
        return replace(own, attention=attention, mlp=mlp, per_layer_input=tokens, has_scalar=True)

    layers = tuple(layer(number, own) for number, own in enumerate(spec.layers))
    return replace(spec, layers=layers, ropes=ropes, kv_map=kv_map)


def _heads_of_full_layers(config: Config, usual: Attention, types: tuple[str, ...], takes_keys: bool) -> Attention:
    """Return the attention of full layers, whose heads have another width and number."""
    by_layer = config.section("per_layer_config")
    if by_layer is None:
        head_dim = positive(config, "global_head_dim", 512)
        kv_heads = positive(config, "num_global_key_value_heads", usual.kv_heads) if takes_keys else usual.kv_heads
        return _checked(config, "global_head_dim", replace(usual, head_dim=head_dim), kv_heads)
    found: set[tuple[int, int]] = set()
    for number, kind in enumerate(types):
        own = by_layer.section(str(number))
        heads = [
            getattr(usual, ours) if own is None else positive(own, key, getattr(usual, ours))
            for key, ours in _HEADS.items()
        ]
        if kind == FULL:
            found.add((heads[0], heads[1]))
        elif heads != [usual.head_dim, usual.kv_heads]:
            where = by_layer.where(str(number))
            raise CheckpointError(where, found="heads of its own", expected="none, for a sliding layer")
    if len(found) > 1:
        raise CheckpointError(
            config.where("per_layer_config"), found="full layers with different heads", expected="the same in all"
        )
    ((head_dim, kv_heads),) = found
    return _checked(config, "per_layer_config", replace(usual, head_dim=head_dim), kv_heads)


def _checked(config: Config, key: str, attention: Attention, kv_heads: int) -> Attention:
    if attention.head_dim % 2:
        raise CheckpointError(config.where(key), found=attention.head_dim, expected="an even head_dim")
    if attention.heads % kv_heads:
        raise CheckpointError(
            config.where(key), found=f"{kv_heads} key/value heads", expected=f"a divisor of {attention.heads}"
        )
    return replace(attention, kv_heads=kv_heads)


def _rope(config: Config, kind: str, head_dim_of_full: int, spec: ModelSpec) -> Rope:
    head_dim = head_dim_of_full if kind == FULL else spec.layers[0].attention.head_dim
    if config.section("rope_parameters") is None:
        if kind == SLIDING:
            return Rope(_LOCAL, head_dim, head_dim)
        return Rope(_GLOBAL, head_dim, int(head_dim * _GLOBAL_SHARE), RopeScaling("proportional"))
    rope = rope_of_type(FAMILY, config, kind, spec.max_position_embeddings, head_dim)
    if rope.dims != head_dim and rope.scaling.kind != "proportional":
        raise UnsupportedError(
            f"{config.where('rope_parameters')}.{kind}: a share of the head is rotated",
            found=f"rope_type {rope.scaling.kind}",
            expected="rope_type proportional, or a partial_rotary_factor of 1",
        )
    return rope


def _extra_config(spec: ModelSpec) -> dict[str, Any]:
    producers = [number for number in range(spec.num_hidden_layers) if spec.owns_kv(number)]
    full = next(layer for layer in spec.layers if not layer.attention.window)
    sliding = next((layer for layer in spec.layers if layer.attention.window), full)
    tokens = spec.layers[0].per_layer_input
    widths = {layer.mlp.width for layer in spec.layers}
    return {
        "head_dim": sliding.attention.head_dim,
        "num_key_value_heads": sliding.attention.kv_heads,
        "global_head_dim": full.attention.head_dim,
        "num_global_key_value_heads": full.attention.kv_heads if full.attention.k_equals_v else None,
        "attention_k_eq_v": full.attention.k_equals_v,
        "num_kv_shared_layers": spec.num_hidden_layers - len(producers),
        "intermediate_size": min(widths),
        "use_double_wide_mlp": len(widths) > 1,
        "hidden_size_per_layer_input": 0 if tokens is None else tokens.width,
        "vocab_size_per_layer_input": spec.vocab_size if tokens is None else tokens.vocab,
    }


_TOKENS = {
    "per_layer_embed.weight": Source("model.embed_tokens_per_layer.weight", layers="columns"),
    "per_layer_context.weight": Source("model.per_layer_model_projection.weight", layers="rows"),
    "per_layer_norm.weight": Source("model.per_layer_projection_norm.weight", layers="same"),
    "per_layer_gate.weight": Source(f"{LAYER}.per_layer_input_gate.weight"),
    "per_layer_out.weight": Source(f"{LAYER}.per_layer_projection.weight"),
    "per_layer_out_norm.weight": Source(f"{LAYER}.post_per_layer_input_norm.weight"),
    "layer_scalar.weight": Source(f"{LAYER}.layer_scalar"),
}
_NORMS = {
    "attention_out_norm": "post_attention_layernorm",
    "post_attention_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}

FAMILY = replace(
    gemma3.FAMILY,
    model_type="gemma4_text",
    transformers_class="Gemma4ForCausalLM",
    sources=llama_sources(_NORMS) | _TOKENS,
    scale_base=None,
    window=Key("sliding_window", 512),
    rope_theta=_GLOBAL,
    local_rope=_LOCAL,
    rope_share=Key("partial_rotary_factor", 1.0),
    layer_types=_layer_types,
    neutral={"enable_moe_block": False},
    extend=_extend,
    extra_config=_extra_config,
)

ARCH = architecture(FAMILY)
_SIZES = gemma3.DEFAULT_SIZES | {
    "num_layers": Key("num_hidden_layers", 30),
    "vocab": Key("vocab_size", 262_144),
}
WHOLE_ARCH = text_part("gemma4", architecture(replace(FAMILY, **_SIZES)))
