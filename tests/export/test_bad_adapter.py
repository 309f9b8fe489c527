"""An adapter that cannot be merged gives an error that names the file and the field or tensor, and writes nothing."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.adapters import STEM, A, B, edit_tensors, lora
from helpers.bad_input import Refused, edit_json, left_behind
from helpers.tiny_models import BASE, TinyBundles
from shortstack.export.adapter import AdaptedCheckpoint
from shortstack.export.checkpoint import open_checkpoint
from shortstack.graphs.errors import CheckpointError, UnsupportedError

TIED = replace(BASE, name="adapter-tied", layers=2, is_tied=True)


def nonsense(value: float) -> Callable[[dict[str, np.ndarray]], object]:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors[A][1, 2] = value

    return edit


CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "DoRA": ({"use_dora": True}, ("use_dora: found True, expected nothing, or false", "merge_and_unload")),
    "biases": ({"bias": "lora_only"}, ("bias: found 'lora_only', expected 'none'", "merge_and_unload")),
    "lora_bias": ({"lora_bias": True}, ("lora_bias: found True", "merge_and_unload")),
    "whole modules": ({"modules_to_save": ["lm_head"]}, ("modules_to_save: found ['lm_head']",)),
    "tokens": ({"trainable_token_indices": [1]}, ("trainable_token_indices: found [1]",)),
    "not a LoRA": ({"peft_type": "IA3"}, ("adapter_config.json: peft_type: found 'IA3', expected 'LORA'",)),
    "no peft_type": ({"peft_type": None}, ("peft_type is missing",)),
    "init that moves weights": ({"init_lora_weights": "pissa_niter_4"}, ("'pissa_niter_4'", "weight_conversion")),
    "activated": ({"alora_invocation_tokens": [5]}, ("alora_invocation_tokens: found [5]", "Train a plain LoRA")),
    "replicated layers": ({"layer_replication": [[0, 2]]}, ("layer_replication",)),
    "parameters": ({"target_parameters": ["x"]}, ("target_parameters",)),
    "an unknown field": ({"use_magic": 3}, ("use_magic: found 3",)),
    "several at once": ({"use_dora": True, "bias": "all"}, ("use_dora", "bias: found 'all'")),
    "no rank": ({"r": None}, ("adapter_config.json: r is missing", "an integer")),
    "rank of the wrong type": ({"r": "4"}, ("r: found '4', expected an integer",)),
    "rank zero": ({"r": 0}, ("r: found 0, expected a positive integer",)),
    "rank minus one, by pattern": ({"rank_pattern": {"q_proj": -1}}, ("rank_pattern.q_proj: found -1",)),
    "alpha not a number": ({"lora_alpha": float("nan")}, ("lora_alpha: found nan, expected a finite number",)),
    "alpha by pattern": ({"alpha_pattern": {"q_proj": "8"}}, ("alpha_pattern.q_proj: found '8'",)),
    "rank too small": ({"r": 3}, ("lora_A, lora_B found [[4, 64], [64, 4]], expected [[3, 64], [64, 3]] for rank 3",)),
    "rank by pattern": ({"rank_pattern": {"layers.2.self_attn.q_proj": 5}}, ("layers.2.self_attn.q_proj", "rank 5")),
    "bad pattern": ({"rank_pattern": {"q_proj(": 4}}, ("the pattern 'q_proj('", "not a regular expression")),
    "patterns not an object": ({"rank_pattern": [4]}, ("rank_pattern: found [4], expected an object",)),
    "too many patterns": ({"alpha_pattern": {f"x{i}": 1 for i in range(5000)}}, ("5000 patterns", "at most 4096")),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_cannot_be_merged_is_refused_by_file_and_field(
    base: Path, adapter: Path, tmp_path: Path, refused: Refused, case: str
) -> None:
    fields, says = CONFIGS[case]
    edit_json(adapter / "adapter_config.json", **fields)
    refused(["export", base, tmp_path / "out", "--adapter", adapter], str(adapter), *says)
    assert left_behind(tmp_path) == ["adapter"]


TENSORS: dict[str, tuple[Callable[[dict[str, np.ndarray]], object], tuple[str, ...]]] = {
    "no A": (lambda t: t.pop(A), ("layers.2.self_attn.q_proj lacks lora_A", "trained on")),
    "no B": (lambda t: t.pop(B), ("layers.2.self_attn.q_proj lacks lora_B",)),
    "nothing": (lambda t: t.clear(), ("holds no tensors",)),
    "A too narrow": (lambda t: t.update({A: t[A][:, 1:]}), ("found [[4, 63], [64, 4]], expected [[4, 64], [64, 4]]",)),
    "B transposed": (lambda t: t.update({B: t[B].T}), ("found [[4, 64], [4, 64]]",)),
    "A flat": (lambda t: t.update({A: t[A].reshape(-1)}), ("found [[256], [64, 4]]",)),
    "NaN": (nonsense(np.nan), (f"{A} is not finite",)),
    "infinity": (nonsense(-np.inf), (f"{A} is not finite",)),
    "integers": (lambda t: t.update({A: t[A].astype(np.int8)}), (f"tensor {A}: found type I8, expected one of F64",)),
    "another layer": (
        lambda t: t.update({A.replace("layers.2", "layers.9"): t[A], B.replace("layers.2", "layers.9"): t[B]}),
        ("layers.9.self_attn.q_proj is not a linear layer of", "Name the checkpoint that the adapter was trained on"),
    ),
    "a norm": (
        lambda t: t.update({"base_model.model.model.norm.lora_A.weight": t[A]}),
        ("model.norm is not a linear layer of",),
    ),
    "an embedding": (
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": t[A]}),
        ("embed_tokens.lora_embedding_A", "without the embedding in target_modules"),
    ),
    "an embedding as a matrix": (
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_A.weight": t[A]}),
        ("model.embed_tokens is not a linear layer of",),
    ),
    "a saved embedding": (
        lambda t: t.update({"base_model.model.model.embed_tokens.weight": t[A]}),
        ("embed_tokens.weight", "save_embedding_layers=False"),
    ),
    "magnitudes": (
        lambda t: t.update({f"{STEM}.lora_magnitude_vector": t[A][0]}),
        ("lora_magnitude_vector", "merge_and_unload"),
    ),
    "a bias": (lambda t: t.update({f"{STEM}.lora_B.bias": t[A][0]}), ("lora_B.bias", "merge_and_unload")),
    "another prefix": (lambda t: t.update({"q_proj.lora_A.weight": t.pop(A)}), ("found q_proj.lora_A.weight",)),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_are_named(
    base: Path, adapter: Path, tmp_path: Path, refused: Refused, case: str
) -> None:
    edit, says = TENSORS[case]
    edit_tensors(adapter, edit)
    refused(["export", base, tmp_path / "out", "--adapter", adapter], "adapter_model.safetensors", *says)
    assert left_behind(tmp_path) == ["adapter"]


def test_an_adapter_of_a_tied_head_is_refused(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    checkpoint = tiny_bundles.checkpoint(TIED)
    adapter = lora(tmp_path / "adapter", checkpoint, target_modules=["q_proj", "lm_head"])
    with pytest.raises(CheckpointError, match=r"lm_head is not a linear layer of .*LM head is part of the embedding"):
        AdaptedCheckpoint(open_checkpoint(str(checkpoint)), adapter)


def test_a_sum_that_is_not_finite_is_refused(base: Path, adapter: Path) -> None:
    edit_tensors(adapter, lambda t: t.update({A: t[A] * 0 + 1e30, B: t[B] * 0 + 1e30}))
    checkpoint = AdaptedCheckpoint(open_checkpoint(str(base)), adapter)
    with pytest.raises(CheckpointError, match=r"layers\.2\.self_attn\.q_proj\.weight is not finite after merging"):
        checkpoint.tensor("model.layers.2.self_attn.q_proj.weight")


class Trap:
    """Fails the test when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return pytest.fail, ("the pickle was opened",)


def test_a_pickle_is_never_opened(base: Path, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UnsupportedError, match=r"only as a pickle.*save it with save_pretrained"):
        AdaptedCheckpoint(open_checkpoint(str(base)), adapter)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_is_missing_truncated_or_outside_the_folder_is_named(
    base: Path, adapter: Path, tmp_path: Path, name: str
) -> None:
    plain = open_checkpoint(str(base))
    content = (adapter / name).read_bytes()
    (adapter / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=name):
        AdaptedCheckpoint(plain, adapter)
    (adapter / name).unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}"):
        AdaptedCheckpoint(plain, adapter)
    (tmp_path / "elsewhere").write_bytes(content)
    os.symlink(tmp_path / "elsewhere", adapter / name)
    with pytest.raises(CheckpointError, match=rf"{name} is a link that leads out of the folder"):
        AdaptedCheckpoint(plain, adapter)


def test_an_adapter_that_is_not_a_folder_is_refused(base: Path, tmp_path: Path, refused: Refused) -> None:
    refused(["export", base, tmp_path / "out", "--adapter", tmp_path / "none"], "none is not a folder")
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    "pattern", ["(.+)+x", "(.*)*", "(a|aa)(b|bb)(c|cc)(d|dd)(e|ee)(f|ff)", ".*.*.*.*.*.*x", "y" * 300]
)
def test_a_pattern_that_could_run_for_ever_is_not_tried(base: Path, adapter: Path, pattern: str) -> None:
    edit_json(adapter / "adapter_config.json", alpha_pattern={pattern: 2})
    started = time.monotonic()
    with pytest.raises(UnsupportedError, match=r"alpha_pattern: found the pattern .*write the modules' names|Write"):
        AdaptedCheckpoint(open_checkpoint(str(base)), adapter)
    assert time.monotonic() - started < 5


def test_a_huge_config_is_not_read(base: Path, adapter: Path) -> None:
    with (adapter / "adapter_config.json").open("ab") as file:
        file.truncate(1 << 30)
    with pytest.raises(CheckpointError, match=r"1073741824 bytes, expected at most"):
        AdaptedCheckpoint(open_checkpoint(str(base)), adapter)
