"""A config or checkpoint of any family that cannot be used gives one line that says why, and writes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers.bad_input import Refused, left_behind
from helpers.family_configs import FAMILIES, LAYERS, fields_of, read, write_checkpoint
from shortstack.export.arch import ARCHITECTURES
from shortstack.export.arch.missing import MISSING
from shortstack.graphs.errors import CheckpointError, UnsupportedError

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
GEMMA = {"gemma2", "gemma3_text"}
LAYER_NORM = {"gpt_neox", "cohere2", "stablelm"}
EPS = {**dict.fromkeys(FAMILIES, "rms_norm_eps"), **dict.fromkeys(LAYER_NORM, "layer_norm_eps")}
EPS["starcoder2"] = "norm_epsilon"
TYPED = ("gemma2", "gemma3_text", "ministral", "qwen2", "qwen3", "smollm3", "olmo3", "cohere2", "exaone4", "llama")
BASE_KEY = {**dict.fromkeys(FAMILIES, "rope_theta"), "gpt_neox": "rotary_emb_base"}
Case = tuple[dict[str, Any], tuple[str, ...]]


def bad_configs(family: str) -> dict[str, Case]:
    """Return changes of a config, and the words of the line that refuses it."""
    act, eps, base = "hidden_activation" if family in GEMMA else "hidden_act", EPS[family], BASE_KEY[family]
    nested = family in ("gemma3_text", "olmo3")
    rope = "rope_scaling"
    cases: dict[str, Case] = {
        **{f"no {key}": ({key: None}, (f"{key} is missing", "expected an integer", "Add the field")) for key in SIZES},
        **{f"{key} as text": ({key: "8"}, (f"{key}: found '8'", "an integer", "Correct the field")) for key in SIZES},
        "a share of a layer": ({"num_hidden_layers": 2.5}, ("num_hidden_layers: found 2.5", "an integer")),
        "a billion layers": ({"num_hidden_layers": 10**9}, ("num_hidden_layers: found 1000000000", "at most 4096")),
        "no heads": ({"num_attention_heads": 0}, ("num_attention_heads: found 0", "a positive integer")),
        "a huge vocabulary": ({"vocab_size": 10**30}, ("vocab_size: found 1000000", "at most 2147483647")),
        "an unknown activation": ({act: "mish"}, (f"{act}: found 'mish'", "expected", "Export a model that does not")),
        "an activation that is a number": ({act: 3}, (f"{act}: found 3", "a string", "Correct the field")),
        "eps of 0": ({eps: 0}, (f"{eps}: found 0", "a positive number", "Correct the field")),
        "eps as text": ({eps: "1e-6"}, (f"{eps}: found '1e-6'", "a number")),
        "tie as text": ({"tie_word_embeddings": "no"}, ("tie_word_embeddings: found 'no'", "true or false")),
        "a context of 0": ({"max_position_embeddings": 0}, ("max_position_embeddings: found 0", "positive integer")),
        "a base of 0": ({base: 0}, (f"{base}: found 0", "a number above 1")),
        "an unknown rope": (
            {rope: {"rope_type": "ntk", "factor": 2.0}},
            ("rope_scaling.rope_type: found 'ntk'", "one of", "Export a model"),
        ),
        "a rope that is text": ({rope: "linear"}, ("rope_scaling: found 'linear'", "an object")),
        "a factor of 0": ({rope: {"rope_type": "linear", "factor": 0}}, ("rope_scaling.factor: found 0", "positive")),
        "no factor": ({rope: {"rope_type": "linear"}}, ("rope_scaling.factor is missing", "a number")),
        "an encoder": ({"is_encoder_decoder": True}, ("is_encoder_decoder changes", "found True", "false, or null")),
        "both ways": ({"use_bidirectional_attention": True}, ("use_bidirectional_attention changes", "false, or null")),
        "not causal": ({"is_causal": False}, ("is_causal changes what the model computes", "found False", "true, or")),
        "clipped": ({"clip_qkv": 8.0}, ("clip_qkv changes what the model computes", "found 8.0", "null")),
    }
    if family == "phi3":
        cases["an unknown rope"] = ({rope: {"type": "ntk"}}, ("rope_scaling.type: found 'ntk'", "one of"))
    if family != "gpt_neox":
        cases["key/value heads"] = ({"num_key_value_heads": 3}, ("num_key_value_heads: found 3", "num_attention_heads"))
    if family in ("gpt_neox", "stablelm"):
        cases["a width of heads"] = (
            {"head_dim": 6},
            ("head_dim contradicts", "found 6", "hidden_size / num_attention"),
        )
    else:
        cases["an odd width of heads"] = ({"head_dim": 7}, ("head_dim: found 7", "an even number"))
    if family in TYPED:
        cases["too few types"] = ({"layer_types": ["full_attention"]}, ("layer_types: found 1 entries", "= 8"))
        cases["an unknown type"] = (
            {"layer_types": ["full_attention"] * 7 + ["linear_attention"]},
            ("layer_types[7]: found 'linear_attention'", "full_attention, sliding_attention"),
        )
        cases["types as text"] = ({"layer_types": "full_attention"}, ("layer_types: found", "a list of strings"))
        if family not in ("llama", "qwen2", "qwen3", "smollm3"):
            cases["sliding without a window"] = (
                {"layer_types": ["sliding_attention"] * LAYERS, "sliding_window": None},
                ("sliding_window is null, and layer 0 is of type sliding_attention", "number of positions"),
            )
            cases["a negative window"] = ({"sliding_window": -1}, ("sliding_window: found -1", "a positive integer"))
    if family in ("qwen2", "qwen3", "smollm3"):
        cases["sliding, switched off"] = (
            {"layer_types": ["sliding_attention"] * LAYERS, "sliding_window": 4},
            ("use_sliding_window is false, and layer 0 is of type sliding_attention", "full_attention for all layers"),
        )
    if family in ("phi3", "starcoder2"):
        cases["types that are not read"] = (
            {"layer_types": ["sliding_attention"] * LAYERS},
            ("layer_types contradicts sliding_window", "full_attention for all layers"),
        )
    for key in {"gemma2": ("attn_logit_softcapping",), "gemma3_text": ()}.get(family, ()) + (
        ("final_logit_softcapping",) if family in GEMMA else ()
    ):
        cases[f"negative {key}"] = ({key: -1.0}, (f"{key}: found -1.0", "a positive number, or null"))
        cases[f"{key} as text"] = ({key: "30"}, (f"{key}: found '30'", "a number"))
        cases[f"{key} that is no number"] = ({key: float("nan")}, (f"{key}: found nan", "a finite number"))
    if family in GEMMA:
        cases["a scale of 0"] = ({"query_pre_attn_scalar": 0}, ("query_pre_attn_scalar: found 0", "a positive number"))
    if family == "granite":
        cases["logits divided by 0"] = ({"logits_scaling": 0}, ("logits_scaling: found 0", "a number other than 0"))
        cases["scores times 0"] = ({"attention_multiplier": 0}, ("attention_multiplier: found 0", "a positive number"))
    if family == "ministral3":
        del cases["a base of 0"]  # without an object of the rotary embedding, the field at the top is not read
        growth = {"rope_type": "default", "original_max_position_embeddings": 8}
        cases["no growth"] = (
            {"rope_parameters": growth},
            ("rope_parameters.llama_4_scaling_beta is missing", "number"),
        )
        cases["a negative growth"] = (
            {"rope_parameters": {**growth, "llama_4_scaling_beta": -0.1}},
            ("rope_parameters.llama_4_scaling_beta: found -0.1", "a number of at least 0"),
        )
        cases["no context to grow beyond"] = (
            {"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}},
            ("rope_parameters.original_max_position_embeddings is missing", "an integer"),
        )
    if family == "hunyuan_v1_dense":
        for name, alpha in (("a huge alpha", 1e308), ("a negative alpha", -2.0), ("a tiny alpha", 1e-9)):
            rope_type = {"rope_type": "dynamic", "factor": 1.0, "alpha": alpha}
            cases[name] = ({"rope_parameters": rope_type}, (f"rope_parameters.alpha: found {alpha}", "number"))
        cases["layers that share"] = ({"use_cla": True}, ("use_cla changes what the model computes", "false, or null"))
    if family == "smollm3":
        cases["too few marks"] = ({"no_rope_layers": [1]}, ("no_rope_layers: found 1 entries", "num_hidden_layers = 8"))
        cases["an interval of 0"] = ({"no_rope_layer_interval": 0}, ("no_rope_layer_interval: found 0", "positive"))
    if family == "exaone4":
        cases["a pattern"] = ({"sliding_window_pattern": "LLX"}, ("sliding_window_pattern: found 'LLX'", "integer"))
    if family in ("glm4", "phi3", "stablelm"):
        key = "partial_rotary_factor"
        cases["a share above 1"] = ({key: 1.5}, (f"{key}: found 1.5", "a share of"))
        cases["a share of an odd column"] = ({key: 0.01}, (f"{key}: found 0.01", "a share of"))
    elif family != "gpt_neox" and not nested:
        cases["a share"] = ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor: partial rotary", "found 0.5"))
    return cases


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bad_config_gives_one_line_with_the_field_and_a_remedy(family: str, tmp_path: Path, refused: Refused) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", fields_of(family, num_hidden_layers=2))
    for case, (changes, says) in bad_configs(family).items():
        (folder / "config.json").write_text(json.dumps(fields_of(family, **changes)), encoding="utf-8")
        line = refused(["export", folder, tmp_path / "out", "-e", 1], f"{folder / 'config.json'}: ")
        for words in says:
            assert words in line, (case, line)
        assert line.endswith(".\n"), (case, line)  # only a remedy ends with a full stop
        assert left_behind(tmp_path) == ["checkpoint"], case


def tensor_of(family: str, role: str, layer: int | None = 1) -> str:
    return ARCHITECTURES[family].tensor_name(f"{role}.weight", layer)


Tensors = dict[str, np.ndarray]


def bad_tensors(family: str) -> dict[str, tuple[Callable[[Tensors], object], tuple[str, ...]]]:
    down, query, up = (tensor_of(family, role) for role in ("down_proj", "q_proj", "up_proj"))
    norm = ARCHITECTURES[family].tensor_name("final_norm.weight")
    apart = query.replace("qkv_proj", "q_proj").replace("query_key_value", "query")
    cases: dict[str, tuple[Callable[[Tensors], object], tuple[str, ...]]] = {
        "missing": (lambda t: t.pop(down), ("1 missing", down)),
        "extra": (lambda t: t.update({f"{down}_2": t[down]}), ("1 extra", f"{down}_2")),
        "transposed": (lambda t: t.update({down: t[down].T.copy()}), ("1 misshapen", down, "but its transpose")),
        "fewer rows": (lambda t: t.update({query: t[query][:-1].copy()}), ("1 misshapen", query)),
        "flat": (lambda t: t.update({up: t[up].reshape(-1)}), ("1 misshapen", up)),
        "a wide norm": (lambda t: t.update({norm: np.ones(7, np.float32)}), (f"{norm} is [7], not [",)),
        "a layer of another model": (
            lambda t: t.update({down.replace(".1.", ".2."): t[down]}),
            ("1 extra", down.replace(".1.", ".2.")),
        ),
    }
    if apart != query:
        cases["queries apart"] = (
            lambda t: t.update({apart: t.pop(query)}),
            ("1 missing", query, "1 extra", apart),
        )
    return cases


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_that_do_not_fit_are_named(family: str, tmp_path: Path, refused: Refused) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", fields_of(family, num_hidden_layers=2))
    whole = load_file(folder / "model.safetensors")
    for edit, says in bad_tensors(family).values():
        tensors = dict(whole)
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")
        refused(["export", folder, tmp_path / "out", "-e", 1], str(folder), *says, "Check that weights and config")
        assert left_behind(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_shards_are_named(family: str, tmp_path: Path, refused: Refused) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", fields_of(family, num_hidden_layers=2), shards=4)
    for number in (2, 4):
        (folder / f"model-{number:05}-of-00004.safetensors").unlink()
    refused(["export", folder, tmp_path / "out", "-e", 1], str(folder), "model-00002-of-00004.safetensors")
    assert left_behind(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        *((name, "a mixture of experts") for name in ("qwen3_moe", "mixtral", "olmoe", "gpt_oss", "granitemoe")),
        *((name, "a mixture of experts") for name in ("phimoe", "qwen2_moe", "dbrx", "ernie4_5_moe", "glm4_moe")),
        ("deepseek_v3", "a mixture of experts and latent attention"),
        ("llama4", "a mixture of experts and images or sound"),
        *((name, "recurrent layers") for name in ("mamba", "mamba2", "lfm2", "rwkv", "falcon_h1", "recurrent_gemma")),
        *((name, "a mixture of experts and recurrent layers") for name in ("jamba", "qwen3_next", "granitemoehybrid")),
        *((name, "an encoder") for name in ("t5", "bart", "t5gemma", "pegasus")),
        ("whisper", "an encoder and images or sound"),
        *((name, "images or sound") for name in ("gemma3n", "llava", "qwen2_vl", "paligemma")),
        *((name, "attention to later positions") for name in ("bert", "modernbert")),
    ],
)
def test_a_family_that_needs_more_is_refused_by_what_is_missing(
    name: str, missing: str, checkpoint: Path, tmp_path: Path, refused: Refused
) -> None:
    config = checkpoint / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": name}))
    line = refused(
        ["export", checkpoint, tmp_path / "out", "-e", 1],
        f"{config}: model_type: this version cannot export models with {missing}: found '{name}', expected one of",
        "llama",
    )
    assert ("If its language model alone" in line) is ("images" in missing)
    assert left_behind(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize(
    ("name", "nearest"), [("lama", "llama"), ("qwen4", "qwen3"), ("gemma3_txt", "gemma3_text"), ("olmo4", "olmo3")]
)
def test_an_unknown_family_is_refused_with_the_nearest(
    name: str, nearest: str, checkpoint: Path, tmp_path: Path, refused: Refused
) -> None:
    config = checkpoint / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": name}))
    words = f"model_type: found '{name}', expected one of", f"(the nearest is {nearest})", "Export a model of one of"
    refused(["export", checkpoint, tmp_path / "out", "-e", 1], *words)
    assert left_behind(tmp_path) == ["checkpoint"]


def test_no_supported_family_is_said_to_need_more() -> None:
    assert not MISSING.keys() & ARCHITECTURES.keys()
    assert all(MISSING.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_neutral_values_are_read(family: str) -> None:
    neutral = {"is_encoder_decoder": False, "use_bidirectional_attention": None, "clip_qkv": None, "is_causal": True}
    assert read(fields_of(family, **neutral)) == read(fields_of(family))
    with pytest.raises(UnsupportedError, match="is_causal changes"):
        read(fields_of(family, is_causal=1))
    with pytest.raises(CheckpointError):
        read({**fields_of(family), "hidden_size": None})
