"""Configs of all families are read as transformers reads them, and written so that it reads the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, PreTrainedConfig

from helpers.family_configs import FAMILIES, LAYERS, fields_of, read, their_fields, their_shapes
from shortstack.export.arch import ARCHITECTURES, expected_tensors
from shortstack.export.checkpoint.config import Config
from shortstack.graphs.spec import ModelSpec

ALTERNATING = ["full_attention", "sliding_attention"] * (LAYERS // 2)
SLIDES = {"layer_types": ALTERNATING, "sliding_window": 9}
ALL_FULL = {"layer_types": ["full_attention"] * LAYERS}
ANY: tuple[dict[str, Any], ...] = (
    {"num_key_value_heads": 1},
    {"num_key_value_heads": 8},
    {"max_position_embeddings": 77},
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": False},
    {"rope_theta": 5000.0},
    {"rope_parameters": None},
    {"eos_token_id": [3, 4]},
)
RMS, LAYER_NORM = {"rms_norm_eps": 0.1}, {"layer_norm_eps": 0.1}
HEADS = ({"head_dim": 16}, {"head_dim": None}, {"head_dim": 16, "num_key_value_heads": 4})
BIAS = ({"attention_bias": True}, {"attention_bias": False})
NULL_HEADS = {"num_key_value_heads": None}
UPPER = {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": 9}
GEMMA = (
    RMS,
    *BIAS,
    {"head_dim": 16},
    {"query_pre_attn_scalar": 24},
    {"final_logit_softcapping": 9.0},
    {"final_logit_softcapping": None},
    {"attn_logit_softcapping": 9.0},
    {"attn_logit_softcapping": None},
    {"hidden_activation": "gelu_pytorch_tanh"},
    {"sliding_window": 9},
    {"sliding_window_pattern": 3},
    {"use_bidirectional_attention": False},
    {"use_bidirectional_attention": None},
    SLIDES,
    ALL_FULL,
)
PARTIAL = ({"partial_rotary_factor": 0.75}, {"partial_rotary_factor": 1.0})
GROWS = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 32,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.2,
}
SWITCHED = (UPPER, {**UPPER, "sliding_window": None}, {**UPPER, **SLIDES}, {**UPPER, "max_window_layers": LAYERS})
OWN: dict[str, tuple[dict[str, Any], ...]] = {
    "llama": (RMS, *HEADS, *BIAS, {"mlp_bias": True}, NULL_HEADS, {"sliding_window": 9}),
    "qwen2": (RMS, {"head_dim": 16}, NULL_HEADS, *SWITCHED, ALL_FULL, {"use_sliding_window": True}),
    "qwen3": (RMS, {"head_dim": 16}, NULL_HEADS, *BIAS, *SWITCHED, ALL_FULL, {"use_sliding_window": True}),
    "mistral": (RMS, *HEADS, {"sliding_window": None}, {"sliding_window": 9}),
    "ministral": (RMS, {"head_dim": 16}, {"sliding_window": None}, {"sliding_window": 9}, SLIDES, ALL_FULL),
    "ministral3": (
        RMS,
        {"head_dim": 16},
        {"head_dim": 16, "num_key_value_heads": 4},
        {"sliding_window": 9},
        {"rope_parameters": GROWS},
        {"rope_parameters": {**GROWS, "mscale_all_dim": 0.5}},
        {"rope_parameters": {**GROWS, "rope_type": "default"}},
        {"rope_scaling": GROWS},
    ),
    "hunyuan_v1_dense": (
        RMS,
        {"head_dim": 16},
        {"head_dim": 16, "num_key_value_heads": 4},
        NULL_HEADS,
        *BIAS,
        {"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}},
        {"rope_parameters": {"rope_type": "dynamic", "alpha": 7.0, "factor": 1.0, "rope_theta": 500.0}, "head_dim": 16},
        {"rope_scaling": {"type": "dynamic", "alpha": None, "factor": 2.0}},
    ),
    "gemma": (RMS, {"head_dim": 16}, *BIAS, {"hidden_act": "gelu"}),
    "gemma2": GEMMA,
    "gemma3_text": (*GEMMA, {"rope_local_base_freq": 300.0}, {"rope_local_base_freq": 300.0, "rope_theta": 500.0}),
    "phi3": (RMS, {"head_dim": 16}, NULL_HEADS, *PARTIAL, {"sliding_window": 9}, {"sliding_window": None}),
    "smollm3": (
        RMS,
        {"head_dim": 16},
        NULL_HEADS,
        *BIAS,
        {"mlp_bias": True},
        {"no_rope_layers": [1, 0] * (LAYERS // 2)},
        {"no_rope_layers": [0] * LAYERS},
        {"no_rope_layer_interval": 3},
        {"use_sliding_window": True, "sliding_window": 9},
        {"use_sliding_window": True},
        {"sliding_window": 9},
        {"use_sliding_window": True, **SLIDES},
        ALL_FULL,
    ),
    "olmo2": (RMS, {"head_dim": 16}, NULL_HEADS, *BIAS),
    "olmo3": (RMS, {"head_dim": 16}, NULL_HEADS, *BIAS, {"sliding_window": 9}, {"sliding_window_pattern": 2}, SLIDES),
    "granite": (
        RMS,
        {"head_dim": 16},
        NULL_HEADS,
        *BIAS,
        {"mlp_bias": True},
        {"attention_multiplier": 0.015625},
        {"embedding_multiplier": 12},
        {"residual_multiplier": 0.22},
        *({"logits_scaling": value} for value in (8.0, 49, 0.3)),
    ),
    "gpt_neox": (
        LAYER_NORM,
        *BIAS,
        {"rotary_pct": 0.5},
        {"rotary_pct": 1.0},
        {"rotary_emb_base": 500},
        {"partial_rotary_factor": 0.5},
        {"use_parallel_residual": False},
        *({"hidden_act": name} for name in ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")),
    ),
    "arcee": (RMS, *HEADS, *BIAS, NULL_HEADS, {"mlp_bias": True}),
    "cohere2": (
        LAYER_NORM,
        {"head_dim": 16},
        NULL_HEADS,
        *BIAS,
        {"logit_scale": 0.3},
        {"sliding_window": 9},
        {"sliding_window_pattern": 2},
        SLIDES,
        ALL_FULL,
    ),
    "helium": (RMS, {"attention_bias": True}, {"mlp_bias": True}),
    "ernie4_5": (RMS, *HEADS, NULL_HEADS, {"use_bias": True}),
    "exaone4": (
        RMS,
        {"head_dim": 16},
        {"sliding_window": 9},
        {"sliding_window_pattern": 3},
        SLIDES,
        ALL_FULL,
        {**ALL_FULL, "sliding_window": None},
    ),
    "glm4": (RMS, {"head_dim": 16}, *BIAS, *PARTIAL),
    "seed_oss": (RMS, *HEADS, NULL_HEADS, *BIAS, {"attention_out_bias": True}, {"mlp_bias": True}),
    "stablelm": (
        LAYER_NORM,
        {"use_qkv_bias": True},
        {"qk_layernorm": False},
        {"qk_layernorm": True},
        {"use_parallel_residual": False},
        {"use_parallel_residual": True},
        *PARTIAL,
    ),
    "starcoder2": (
        {"norm_epsilon": 0.1},
        {"head_dim": 16},
        {"use_bias": False},
        {"sliding_window": 9},
        *({"hidden_act": name} for name in ("gelu", "gelu_pytorch_tanh")),
    ),
}
CASES = [(name, changes) for name in FAMILIES for changes in ({}, *ANY, *OWN[name])]


def named(case: object) -> str:
    return "+".join(case) or "few" if isinstance(case, dict) else str(case)


@pytest.mark.parametrize(("model_type", "changes"), CASES, ids=named)
def test_few_fields_mean_what_transformers_makes_of_them(model_type: str, changes: dict[str, Any]) -> None:
    fields = fields_of(model_type, **changes)
    assert read(their_fields(fields)) == read(fields)


@pytest.mark.parametrize(("model_type", "changes"), CASES, ids=named)
def test_a_written_config_is_read_back_by_both(model_type: str, changes: dict[str, Any]) -> None:
    spec = read(fields_of(model_type, **changes))
    written = ARCHITECTURES[model_type].write_config(spec)
    assert read(written) == spec
    assert read(their_fields(written)) == spec


CHANGES_NOTHING = {"initializer_range", "use_cache", "pretraining_tp", "is_decoder"}
NOT_ASKED: dict[str, set[str]] = {
    "gemma3_text": {"attn_logit_softcapping"},  # transformers' model stores it and never uses it
    "phi3": {"original_max_position_embeddings"},  # for longrope alone
    "qwen2": {"max_window_layers", "sliding_window"},  # where use_sliding_window is true
    "qwen3": {"max_window_layers", "sliding_window"},
    "smollm3": {"sliding_window"},
}


class Listening(dict[str, Any]):
    """Fields that remember which of them were asked for."""

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__(fields)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_field_of_transformers_class_is_read_or_changes_nothing(model_type: str) -> None:
    fields = Listening(fields_of(model_type))
    ARCHITECTURES[model_type].read_spec(Config(fields, "config.json"))
    own = {field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type])}
    of_all = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    left = own - of_all - fields.asked - CHANGES_NOTHING - NOT_ASKED.get(model_type, set())
    assert {name for name in left if not name.endswith(("dropout", "pdrop", "_token_id"))} == set()


def shapes(model_type: str, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    return expected_tensors(ARCHITECTURES[model_type], spec)


SHAPES = ("use_parallel", "head_dim", "bias", "tie", "num_key", "layer_types", "qk_layernorm")
SHAPED = [case for case in CASES if not case[1] or any(word in key for key in case[1] for word in SHAPES)]


@pytest.mark.parametrize(("model_type", "changes"), SHAPED, ids=named)
def test_expected_tensors_are_those_of_transformers_model(model_type: str, changes: dict[str, Any]) -> None:
    fields = fields_of(model_type, pad_token_id=None, **changes)
    assert shapes(model_type, read(fields)) == their_shapes(fields)
