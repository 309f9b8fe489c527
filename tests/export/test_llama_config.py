"""Llama configs of all transformers versions, and the errors for configs that are not valid."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shortstack.export.arch import ARCHITECTURES, expected_tensors, resolve
from shortstack.export.arch.llama import ARCH, read_spec
from shortstack.export.checkpoint.config import Config
from shortstack.export.rope import inverse_frequencies
from shortstack.graphs.errors import CheckpointError, UnsupportedError
from shortstack.graphs.layer_spec import RopeScaling
from shortstack.graphs.spec import ModelSpec

BASE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 8192,
}


def config(**changes: Any) -> Config:
    return Config({**BASE, **changes}, "config.json")


def test_defaults_are_those_of_transformers() -> None:
    from transformers import LlamaConfig

    theirs = LlamaConfig(**BASE)
    spec = read_spec(config())
    assert spec.layers[0].attention.kv_heads == theirs.num_key_value_heads == 4
    assert spec.layers[0].attention.head_dim == theirs.head_dim == 16
    assert spec.ropes[0].theta == theirs.rope_parameters["rope_theta"] == 10000.0
    assert spec.tie_word_embeddings is theirs.tie_word_embeddings is False
    assert spec.ropes[0].scaling == RopeScaling()
    assert read_spec(Config({k: v for k, v in BASE.items() if k != "rms_norm_eps"}, "f")).norm_eps == 1e-6


@pytest.mark.parametrize("rope", [{}, {"rope_scaling": {"rope_type": "llama3", **LLAMA3}}])
@pytest.mark.parametrize(
    "model", [{"attention_bias": True, "mlp_bias": True}, {"num_key_value_heads": 1, "head_dim": 8}]
)
def test_configs_of_transformers_4_and_5_are_read_the_same(rope: dict[str, Any], model: dict[str, Any]) -> None:
    from transformers import LlamaConfig

    old = {**BASE, **rope, **model, "rope_theta": 500000.0}
    written = json.loads(LlamaConfig(**old).to_json_string())
    assert "rope_parameters" in written
    assert read_spec(Config(written, "config.json")) == read_spec(Config(old, "config.json"))


def test_null_counts_as_absent() -> None:
    assert read_spec(config(head_dim=None, num_key_value_heads=None, rope_scaling=None)) == read_spec(config())


def test_pretraining_tp_is_ignored() -> None:
    assert read_spec(config(pretraining_tp=8)) == read_spec(config())


def biases(spec: ModelSpec) -> tuple[bool, bool, bool]:
    layer = spec.layers[0]
    return layer.attention.qkv_bias, layer.attention.out_bias, layer.mlp.has_bias


def test_biases_come_from_three_fields() -> None:
    spec = read_spec(config(attention_bias=True))
    assert biases(spec) == (True, True, False)
    spec = read_spec(config(attention_bias=True, attention_out_bias=False, mlp_bias=True))
    assert biases(spec) == (True, False, True)


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_scaling_is_read_under_both_names(key: str) -> None:
    assert read_spec(config(rope_scaling={key: "default"})).ropes[0].scaling == RopeScaling()
    assert read_spec(config(rope_scaling={key: "linear", "factor": 2})).ropes[0].scaling == RopeScaling("linear", 2.0)
    scaling = read_spec(config(rope_scaling={key: "llama3", **LLAMA3})).ropes[0].scaling
    assert scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)


STRETCHED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SPELLINGS: dict[str, dict[str, Any]] = {
    "parameters win over the top": {"rope_theta": 1.0, "rope_parameters": {"rope_theta": 7e4, "rope_type": "default"}},
    "theta in the scaling": {"rope_scaling": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
    "theta in the scaling and at the top": {"rope_theta": 2e4, "rope_scaling": {"rope_theta": 5e5}},
    "theta alone in the scaling": {"rope_scaling": {"rope_theta": 5e5}},
    "theta at the top, kind in the parameters": {"rope_theta": 7e4, "rope_parameters": {"type": "linear", "factor": 3}},
    "scaling beside default parameters": {
        "rope_theta": 5e5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "scaling beside default parameters, theta in both": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "rope_scaling": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
    },
    "an empty scaling beside parameters": {
        "rope_scaling": {},
        "rope_parameters": {"rope_theta": 7e4, "type": "default"},
    },
    "two kinds in one object": {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 3.0}},
    "original length in the scaling": {"rope_scaling": {**STRETCHED, "original_max_position_embeddings": 32}},
    "original length at the top": {"rope_scaling": STRETCHED, "original_max_position_embeddings": 32},
    "no original length": {"rope_theta": 5e5, "rope_parameters": STRETCHED},
    "original length in both": {
        "rope_scaling": {**STRETCHED, "original_max_position_embeddings": 32},
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_rotary_embedding_is_read_as_transformers_reads_it(spelling: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    fields = {**BASE, **SPELLINGS[spelling]}
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    ours = inverse_frequencies(read_spec(Config(fields, "config.json")).ropes[0])
    assert torch.equal(torch.from_numpy(ours), theirs.inv_freq)


def test_a_missing_original_length_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert read_spec(config(rope_scaling=STRETCHED)).ropes[0].scaling.original_max_position_embeddings == 128
    (message,) = caplog.messages
    assert message.startswith("config.json: rope_scaling.original_max_position_embeddings is missing")
    assert "max_position_embeddings, 128, takes its place" in message


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"rope_type": "default", "rope_theta": 5e5}, "rope_theta 500000.0 where the other counts as 10000.0"),
        ({"rope_type": "linear", "factor": 2.0}, "rope_type 'linear' where the other counts as 'llama3', factor 2.0"),
        ({**STRETCHED, "factor": 16.0}, "factor 16.0 where the other counts as 8.0"),
    ],
)
def test_two_objects_that_contradict_each_other_are_refused(parameters: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=r"rope_parameters and rope_scaling contradict") as caught:
        read_spec(config(rope_parameters=parameters, rope_scaling=STRETCHED))
    assert says in str(caught.value)


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["mrope", "ntk", "lama3"])
def test_an_unknown_kind_of_scaling_is_refused_with_field_and_choices(place: str, kind: str) -> None:
    with pytest.raises(
        UnsupportedError, match=rf"config\.json: {place}\.rope_type: found '{kind}', expected one of"
    ) as caught:
        read_spec(config(**{place: {"rope_type": kind, "factor": 2.0}}))
    assert "default, linear, llama3" in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
    ],
)
def test_partial_rotary_embedding_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="partial_rotary_factor: partial rotary embedding"):
        read_spec(config(**changes))


def test_another_activation_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"config\.json: hidden_act: found 'gelu', expected silu"):
        read_spec(config(hidden_act="gelu"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": None}, "hidden_size is missing: expected an integer"),
        ({"hidden_size": "64"}, "hidden_size: found '64', expected an integer"),
        ({"hidden_size": 64.0}, r"hidden_size: found 64\.0, expected an integer"),
        ({"hidden_size": True}, "hidden_size: found True, expected an integer"),
        ({"hidden_size": 0}, "hidden_size: found 0, expected a positive integer"),
        ({"hidden_size": 65}, "hidden_size does not divide into 4 heads, and head_dim is not given"),
        ({"intermediate_size": 10**30}, r"intermediate_size: found 1000.*, expected at most 2147483647"),
        ({"max_position_embeddings": 10**30}, r"max_position_embeddings: found 1000.*, expected at most 2147483647"),
        (
            {"rope_scaling": {"type": "llama3", **LLAMA3, "original_max_position_embeddings": 10**30}},
            r"rope_scaling\.original_max_position_embeddings: found 1000.*, expected at most 2147483647",
        ),
        ({"rope_scaling": {"type": "linear", "factor": True}}, r"rope_scaling\.factor: found True, expected a number"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            r"rope_parameters\.full_attention: a rotary embedding for some layers: found an object",
        ),
        (
            {"rope_scaling": {"type": "default", "sliding_attention": {"rope_theta": 1e6}}},
            r"rope_scaling\.sliding_attention: a rotary embedding for some layers: found an object",
        ),
        ({"vocab_size": -1}, "vocab_size: found -1, expected a positive integer"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: found 1000000000, expected at most 4096"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: found 3, expected a divisor of num_attention_heads, 4"),
        ({"head_dim": 15}, "head_dim: found 15, expected an even number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: found 0, expected a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: found nan, expected a finite number"),
        ({"rope_theta": 10**400}, r"rope_theta: found 1000.*\.\.\. .*, expected a finite number"),
        ({"rope_theta": -1.0}, "rope_theta: found -1.0, expected a number above 1"),
        ({"attention_bias": 1}, "attention_bias: found 1, expected true or false"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: found 'yes', expected true or false"),
        ({"hidden_act": 3}, "hidden_act: found 3, expected a string"),
        ({"rope_scaling": []}, r"rope_scaling: found \[\], expected an object"),
        ({"rope_scaling": {"factor": 2.0}}, r"rope_scaling\.rope_type is missing"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling\.factor is missing: expected a number"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, r"rope_scaling\.factor: found 0, expected a positive"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, r"rope_scaling\.low_freq_factor is missing"),
        (
            {"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 1}},
            r"rope_scaling\.high_freq_factor: found 1\.0, expected more than low_freq_factor, 1\.0",
        ),
    ],
)
def test_a_bad_field_is_named_with_its_value_and_what_is_expected(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: {says}"):
        read_spec(config(**changes))


@pytest.mark.parametrize("value", [True, "1", 1.5, [1, "2"], [True], {}])
def test_token_ids_are_ids_or_lists_of_them(value: object) -> None:
    assert config(eos_token_id=2).read_token_ids("eos_token_id") == (2,)
    assert config(eos_token_id=[2, 3]).read_token_ids("eos_token_id") == (2, 3)
    assert config().read_token_ids("eos_token_id") == config(eos_token_id=-1).read_token_ids("eos_token_id") == ()
    with pytest.raises(CheckpointError, match="eos_token_id"):
        config(eos_token_id=value).read_token_ids("eos_token_id")


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    class Stub:
        config = Config({"model_type": "lama"}, "config.json")

    with pytest.raises(UnsupportedError, match=r"config\.json: model_type: found 'lama', expected .*llama"):
        resolve(Stub())  # type: ignore[arg-type]


def test_every_family_is_listed_under_its_model_type() -> None:
    assert all(arch.model_type == name for name, arch in ARCHITECTURES.items())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_expected_tensors_are_those_that_transformers_creates(tied: bool, bias: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {**BASE, "num_key_value_heads": 2, "tie_word_embeddings": tied, "attention_bias": bias, "mlp_bias": bias}
    state = LlamaForCausalLM(LlamaConfig(**fields)).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items() if not (tied and name == "lm_head.weight")}
    assert expected_tensors(ARCH, read_spec(Config(fields, "config.json"))) == shapes


def test_a_consumer_of_another_layers_kv_has_no_k_and_v_projection() -> None:
    spec = replace(read_spec(config()), kv_map=(0, 0))
    assert "model.layers.1.self_attn.k_proj.weight" not in expected_tensors(ARCH, spec)
    assert "model.layers.0.self_attn.k_proj.weight" in expected_tensors(ARCH, spec)


def test_a_role_takes_a_layer_exactly_if_every_layer_has_it() -> None:
    assert ARCH.tensor_name("q_proj.weight", 3) == "model.layers.3.self_attn.q_proj.weight"
    assert ARCH.tensor_name("lm_head.weight") == "lm_head.weight"
    with pytest.raises(ValueError, match="one per layer"):
        ARCH.tensor_name("q_proj.weight")
    with pytest.raises(ValueError, match="not one per layer"):
        ARCH.tensor_name("lm_head.weight", 0)
    with pytest.raises(KeyError):
        ARCH.tensor_name("nope.weight")


def test_optimum_cli_passes_its_arguments_on(tmp_path: Path, monkeypatch: Any) -> None:
    import argparse

    from shortstack.export.optimum_command import ExportShortstackCommand

    asked: list[list[str]] = []
    monkeypatch.setattr("shortstack.__main__.run", lambda arguments: asked.append(arguments) or 2)
    parser = argparse.ArgumentParser()
    ExportShortstackCommand(parser.add_subparsers())
    arguments = ["--exit-layer", "8", "model", "out", "--help", "--", "-x"]
    parsed = parser.parse_args(["shortstack", *arguments])
    with pytest.raises(SystemExit) as caught:
        parsed.func(parsed).run()
    assert caught.value.code == 2
    assert asked == [["export", *arguments]]
