"""Configs of Gemma 4 and GPT-2, whose fields are not those of the others: read, written and refused."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from shortstack.export.arch import ARCHITECTURES
from shortstack.export.checkpoint.config import Config
from shortstack.graphs.errors import CheckpointError, UnsupportedError
from shortstack.graphs.spec import ModelSpec

SLIDING, FULL = "sliding_attention", "full_attention"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 8,
    "vocab_size": 100,
}
GEMMA4: dict[str, dict[str, Any]] = {
    "few fields": {},
    "shared": {"num_kv_shared_layers": 2, "use_double_wide_mlp": True, "layer_types": [SLIDING, FULL] * 3 + [FULL]},
    "keys as values": {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0},
    "keys as values, as many": {"attention_k_eq_v": True, "global_head_dim": 128},
    "other numbers": {"global_head_dim": 64, "head_dim": 32, "final_logit_softcapping": 30.0, "sliding_window": 12},
    "ropes": {
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": 5000.0},
            FULL: {"rope_type": "proportional", "rope_theta": 2e6, "partial_rotary_factor": 0.5},
        }
    },
    "the last layer slides": {"layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING, SLIDING]},
}
GPT2: dict[str, dict[str, Any]] = {
    "few fields": {},
    "own inner width": {"n_inner": 80, "n_positions": 64},
    "untied": {"tie_word_embeddings": False, "activation_function": "gelu"},
}


def read(model_type: str, fields: dict[str, Any]) -> ModelSpec:
    return ARCHITECTURES[model_type].read_spec(Config(copy.deepcopy(fields), "config.json"))


def theirs(model_type: str, fields: dict[str, Any]) -> dict[str, Any]:
    written: dict[str, Any] = json.loads(
        CONFIG_MAPPING[model_type](**copy.deepcopy(fields)).to_json_string(use_diff=False)
    )
    return written


CASES = [
    *(("gemma4_text", {**SIZES, **changes}) for changes in GEMMA4.values()),
    *(("gpt2", {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 100, **changes}) for changes in GPT2.values()),
]
NAMES = [*(f"gemma4, {name}" for name in GEMMA4), *(f"gpt2, {name}" for name in GPT2)]


@pytest.mark.parametrize(("model_type", "fields"), CASES, ids=NAMES)
def test_few_fields_are_read_as_transformers_completes_them(model_type: str, fields: dict[str, Any]) -> None:
    assert read(model_type, fields) == read(model_type, theirs(model_type, fields))


@pytest.mark.parametrize(("model_type", "fields"), CASES, ids=NAMES)
def test_what_is_written_is_read_back_by_us_and_by_transformers(model_type: str, fields: dict[str, Any]) -> None:
    spec = read(model_type, fields)
    written = ARCHITECTURES[model_type].write_config(spec)
    assert read(model_type, written) == spec
    others = {name: value for name, value in written.items() if name not in ("model_type", "architectures")}
    assert read(model_type, theirs(model_type, others)) == spec


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"enable_moe_block": True}, UnsupportedError, "enable_moe_block changes what the model computes: found True"),
        ({"global_head_dim": 33}, CheckpointError, "global_head_dim: found 33, expected an even head_dim"),
        (
            {"attention_k_eq_v": True, "num_global_key_value_heads": 3},
            CheckpointError,
            "global_head_dim: found 3 key/value heads, expected a divisor of 8",
        ),
        ({"num_kv_shared_layers": 7}, CheckpointError, "num_kv_shared_layers"),
        (
            {"per_layer_config": {"0": {"head_dim": 16}}},
            CheckpointError,
            r"per_layer_config\.0: found heads of its own",
        ),
        ({"hidden_size_per_layer_input": -1}, CheckpointError, "hidden_size_per_layer_input: found -1"),
        (
            {"rope_parameters": {FULL: {"rope_theta": 1e6, "partial_rotary_factor": 0.25}}},
            UnsupportedError,
            r"rope_parameters\.full_attention: a share of the head is rotated: found rope_type default, expected",
        ),
        ({"layer_types": [FULL, "chunked"] * 3 + [FULL]}, UnsupportedError, "chunked"),
    ],
)
def test_a_gemma_4_that_cannot_be_exported_is_refused_by_field(
    changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        read("gemma4_text", {**SIZES, **changes})


@pytest.mark.parametrize("field", ["scale_attn_by_inverse_layer_idx", "scale_attn_weights"])
def test_a_gpt2_that_scales_otherwise_is_refused(field: str) -> None:
    neutral = field == "scale_attn_weights"
    with pytest.raises(UnsupportedError, match=f"{field} changes what the model computes: found {not neutral}"):
        read("gpt2", {field: not neutral})
