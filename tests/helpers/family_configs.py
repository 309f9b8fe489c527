"""Configs of every family that transformers has, small, and what its classes make of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from helpers.tiny_models import write_tokenizer
from shortstack.export.arch import ARCHITECTURES, expected_tensors
from shortstack.export.checkpoint.config import Config
from shortstack.graphs.spec import ModelSpec

LAYERS = 8
OTHER_FORMS = ("gpt2", "gemma3", "gemma4", "gemma4_text", "mistral3")
"""Families whose configs have other fields: test_other_configs.py, and test_text_parts.py of tests/families."""
FAMILIES = tuple(name for name in ARCHITECTURES if name in CONFIG_MAPPING and name not in OTHER_FORMS)
FEW: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_hidden_layers": LAYERS,
    "vocab_size": 100,
}
"""The fields without which a config says nothing; the classes have defaults for all others."""
MORE: dict[str, dict[str, Any]] = {
    "qwen2": {"num_key_value_heads": 2},  # the default, 32, does not fit so few heads
    "qwen3": {"num_key_value_heads": 2},
    "gemma": {"num_key_value_heads": 2},
    "helium": {"num_key_value_heads": 2, "head_dim": 8},  # its o_proj is [hidden, hidden]
    "ministral": {"head_dim": 16},  # its class has no default
    "hunyuan_v1_dense": {"head_dim": 8},  # transformers' model fails without it
    "exaone4": {"num_key_value_heads": 2},
    "stablelm": {"num_key_value_heads": 2, "hidden_size": 128},  # a quarter of 8 columns is 2, too few to tell
    "gpt_neox": {"hidden_size": 128},
}


def fields_of(model_type: str, **changes: Any) -> dict[str, Any]:
    """Return the fields of a small config."""
    return copy.deepcopy({"model_type": model_type, **FEW, **MORE.get(model_type, {}), **changes})


def read(fields: dict[str, Any]) -> ModelSpec:
    return ARCHITECTURES[fields["model_type"]].read_spec(Config(copy.deepcopy(fields), "config.json"))


def their_config(fields: dict[str, Any]) -> Any:
    """Return what transformers makes of a config, which it changes on the way."""
    others = {name: value for name, value in copy.deepcopy(fields).items() if name not in ("model_type",)}
    return CONFIG_MAPPING[fields["model_type"]](**others)


def their_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the config that transformers writes after it has read one."""
    written: dict[str, Any] = json.loads(their_config(fields).to_json_string(use_diff=False))
    return written


def their_shapes(fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that transformers' model has, without the head of a tied one."""
    config = their_config(fields)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    head = "lm_head.weight"  # GPT-NeoX's checkpoints call it by another name than its model
    if config.tie_word_embeddings:
        state.pop(head)
    stored = {head: ARCHITECTURES[fields["model_type"]].tensor_name(head)}
    return {stored.get(name, name): tuple(value.shape) for name, value in state.items()}


def family_tensors(fields: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return random weights that fit a config."""
    shapes = expected_tensors(ARCHITECTURES[fields["model_type"]], read(fields))
    return {name: np.random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_checkpoint(folder: Path, fields: dict[str, Any], shards: int = 1) -> Path:
    """Write a checkpoint of random weights, in one file or in several."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    write_tokenizer(folder, fields["vocab_size"])
    tensors = family_tensors(fields)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}), encoding="utf-8")
    return folder
