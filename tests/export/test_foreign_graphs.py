"""Folders with an ONNX graph that is not read: refused by what is missing, whatever else lies there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from helpers.bad_input import Refused, left_behind
from helpers.genai_folders import CONFIG, GRAPH, GraphWriter
from helpers.tiny_models import BASE, TinyBundles


def plain_graph(path: Path) -> None:
    """A graph as optimum-onnx writes it, in short: attention by MatMul and Softmax."""
    weight = numpy_helper.from_array(np.ones((4, 4), np.float32), "onnx::MatMul_1")
    nodes = [
        helper.make_node("MatMul", ["hidden", "onnx::MatMul_1"], ["scores"], "/model/layers.0/self_attn/q_proj/MatMul"),
        helper.make_node("Softmax", ["scores"], ["logits"], "/model/layers.0/self_attn/Softmax"),
    ]
    ports = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4]) for name in ("hidden", "logits")]
    graph = helper.make_graph(nodes, "main_graph", ports[:1], ports[1:], [weight])
    path.parent.mkdir(exist_ok=True)
    onnx.save(helper.make_model(graph), path)


@pytest.mark.parametrize("place", ["model.onnx", "onnx/decoder_model_merged.onnx"])
@pytest.mark.parametrize("has_config", [True, False])
def test_a_graph_of_plain_operators_is_refused_by_what_it_lacks(
    tiny_bundles: TinyBundles, tmp_path: Path, refused: Refused, place: str, has_config: bool
) -> None:
    folder = tmp_path / "optimum"
    folder.mkdir()
    plain_graph(folder / place)
    if has_config:
        shutil.copy(tiny_bundles.checkpoint(BASE) / "config.json", folder)
    for command in (["export", folder, tmp_path / "out"], ["export", folder, tmp_path / "out", "--preset", "int4"]):
        refused(
            command,
            f"{folder} has its model as a graph of plain operators ({place}), as optimum-onnx exports it",
            "attention without the node GroupQueryAttention",
            "Export the checkpoint that the graph was made from",
        )
    assert left_behind(tmp_path) == ["optimum"]


def test_a_graph_of_the_builder_without_its_config_is_refused_by_the_config(
    tiny_bundles: TinyBundles, tmp_path: Path, refused: Refused
) -> None:
    folder = GraphWriter(tiny_bundles.checkpoint(BASE)).write(tmp_path / "built")
    (folder / CONFIG).unlink()
    refused(["export", folder, tmp_path / "out"], f"has {GRAPH} and no {CONFIG}", "Copy the folder again as a whole")


def test_a_graph_beside_weights_changes_nothing(tiny_bundles: TinyBundles, tmp_path: Path, refused: Refused) -> None:
    checkpoint = Path(shutil.copytree(tiny_bundles.checkpoint(BASE), tmp_path / "model"))
    plain_graph(checkpoint / "model.onnx")
    refused(["export", checkpoint, tmp_path / "out", "-e", "99"], "--exit-layer")
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    refused(["export", checkpoint, tmp_path / "out"], "pickle")
    (checkpoint / "pytorch_model.bin").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
    refused(["export", checkpoint, tmp_path / "out"], "b.safetensors")
