"""Assistants of Gemma 4 that do not fit their model, lack something or are no assistants: refused with all reasons."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.assistants import CENTROIDS, Gemma4Pair, MadePair, edited
from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec
from shortstack.graphs.errors import CheckpointError, ShortstackError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadePair:
    return MadePair(Gemma4Pair(seed=1), tmp_path_factory.mktemp("assistant"))


@pytest.fixture(scope="module")
def with_centroids(tmp_path_factory: pytest.TempPathFactory) -> MadePair:
    return MadePair(Gemma4Pair(head=CENTROIDS, seed=2), tmp_path_factory.mktemp("centroids"))


def refused(made: MadePair, folder: Path, **changes: torch.Tensor | None) -> str:
    """Return why a changed copy of the assistant is refused; nothing may be written."""
    out = folder.parent / "out"
    if not folder.exists():
        shutil.copytree(made.assistant, folder)
    edited(folder, **changes)
    with pytest.raises(ShortstackError) as error:
        export_bundle(ExportSpec(str(made.model), out, drafter=str(folder)))
    assert not out.exists()
    return str(error.value)


def configured(made: MadePair, folder: Path, change: dict[str, Any], text: dict[str, Any]) -> Path:
    shutil.copytree(made.assistant, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= change
    config["text_config"] |= text
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_all_that_does_not_fit_the_model_is_said_at_once(made: MadePair, tmp_path: Path) -> None:
    other = Gemma4Pair(vocab=10, assistant={"num_key_value_heads": 1, "sliding_window": 32, "global_head_dim": 64})
    folders = other.write(tmp_path / "other")
    ropes = json.loads((folders[1] / "config.json").read_text())["text_config"]["rope_parameters"]
    ropes["full_attention"]["rope_theta"] = 5e5
    config = json.loads((folders[1] / "config.json").read_text())
    config["backbone_hidden_size"] = 48
    config["text_config"]["rope_parameters"] = ropes
    (folders[1] / "config.json").write_text(json.dumps(config))
    said = refused(made, folders[1])
    for part in (
        "its vocab_size is 10, and the model's 8",
        "state_size is 48, and the state that it reads has 32",
        "layer 0 has kv_heads 1, and layer 4 of the model 2",
        "layer 3 has head_dim 64, and layer 5 of the model 32",
        "layer 0 has a window of 32, and layer 4 of the model one of 64",
        "layer 3 rotates by theta 500000",
        "tensor pre_projection.weight is [16, 64], not [16, 96]",
    ):
        assert part in said
    assert "Take the drafter that was trained for this model" in said


def test_tensors_that_are_missing_or_no_order_of_tokens_are_refused(
    made: MadePair, with_centroids: MadePair, tmp_path: Path
) -> None:
    said = refused(made, tmp_path / "missing", post_projection__weight=None, model__layers__2__layer_scalar=None)
    assert "post_projection.weight" in said
    assert "model.layers.2.layer_scalar" in said
    name = "masked_embedding__token_ordering"
    order = load_file(str(with_centroids.assistant / "model.safetensors"))[name.replace("__", ".")]
    twice = order.clone()
    twice[0] = twice[1]
    assert "token_ordering names token id" in refused(with_centroids, tmp_path / "twice", **{name: twice})
    assert "and the model has 0..7" in refused(with_centroids, tmp_path / "beyond", **{name: order + 1})
    assert "whole numbers" in refused(with_centroids, tmp_path / "floats", **{name: order.float()})
    assert "token_ordering" in refused(with_centroids, tmp_path / "short", **{name: order[:-1].clone()})


@pytest.mark.parametrize(
    ("change", "text", "says"),
    [
        ({"num_centroids": 3}, {}, "does not divide 8 token ids"),
        ({"centroid_intermediate_top_k": 5}, {}, "at most num_centroids = 4"),
        ({"text_config": None}, None, "text_config is missing"),
        ({}, {"model_type": "llama"}, "expected one of gemma4_text, gemma4_unified_text"),
        ({}, {"enable_moe_block": True}, "enable_moe_block"),
        ({}, {"hidden_size_per_layer_input": 8}, "hidden_size_per_layer_input"),
        ({}, {"layer_types": ["full_attention"] * 4}, "layers with different heads"),
        ({}, {"num_hidden_layers": 3, "layer_types": ["sliding_attention"] * 3}, "layer 2 has head_dim 16"),
    ],
)
def test_a_config_that_no_assistant_has_is_refused(
    with_centroids: MadePair, tmp_path: Path, change: dict[str, Any], text: dict[str, Any] | None, says: str
) -> None:
    folder = configured(with_centroids, tmp_path / "assistant", {} if text is None else change, text or {})
    if text is None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
    assert says in refused(with_centroids, folder)


def test_a_pickle_is_refused(made: MadePair, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(made.assistant, folder)
    torch.save(load_file(str(folder / "model.safetensors")), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="pickle"):
        export_bundle(ExportSpec(str(made.model), tmp_path / "out", drafter=str(folder)))
