"""``shortstack doctor`` opens and runs a bundle's trained drafter."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.assistants import Gemma4Pair, edited
from helpers.bad_input import Refused
from helpers.drafter_cases import KINDS, written
from helpers.drafters import Eagle3
from helpers.mtp import TinyMtp
from helpers.own_assistants import LlamaAssistant
from helpers.quantized import preset
from helpers.tiny_models import TinyBundles, TinyModel
from shortstack.__main__ import run
from shortstack.export.assemble import export_bundle
from shortstack.export.spec import OWN_DRAFTER, ExportSpec
from shortstack.graphs import names
from shortstack.graphs.bundle import describe_files, write_manifest
from shortstack.graphs.manifest import read_manifest
from shortstack.graphs.precision import BlockFormat
from shortstack.quant.assemble import quantize_bundle
from shortstack.quant.spec import QuantizeSpec

TARGET = TinyModel("whose drafter is checked")


@pytest.fixture(scope="module")
def bundle(tiny_bundles: TinyBundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checked")
    drafter = str(Eagle3().write(folder / "d"))
    return export_bundle(ExportSpec(str(tiny_bundles.checkpoint(TARGET)), folder / "b", drafter=drafter)).folder


def test_a_sound_drafter_is_run(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", str(bundle)]) == 0
    assert "drafter     drafter-fuse.onnx, drafter.onnx run here; a text with its drafts is" in capsys.readouterr().out
    assert run(["doctor", str(bundle), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["drafter"]
    assert found["is_finite"]
    assert found["same_tokens"]
    assert found["drafted"] > 0


def test_so_is_one_that_reads_the_final_state(
    tiny_bundles: TinyBundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = export_bundle(written(tiny_bundles.checkpoint(TARGET), KINDS["DeepSeek's layer"], tmp_path / "d"))
    assert run(["doctor", str(made.folder)]) == 0
    assert "drafter     drafter.onnx run here" in capsys.readouterr().out


@pytest.mark.parametrize("is_small", [False, True])
@pytest.mark.parametrize("kind", ["an assistant", "one with centroids", "stages"])
def test_so_are_assistants_and_layers_that_draft_one_token_each(
    tiny_bundles: TinyBundles, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, is_small: bool
) -> None:
    if kind == "stages":
        checkpoint, drafter, files = TinyMtp(3).write(tmp_path / "m"), OWN_DRAFTER, "drafter-1.onnx, drafter-2.onnx, "
    elif kind == "an assistant":
        checkpoint, files = tiny_bundles.checkpoint(TARGET), ""
        drafter = str(LlamaAssistant().write(tmp_path / "d"))
    else:
        head = {"use_ordered_embeddings": True, "num_centroids": 4, "centroid_intermediate_top_k": 2}
        pair, files = Gemma4Pair(vocab=64, head=head).write(tmp_path), ""
        checkpoint, drafter = pair[0], str(pair[1])
    made = export_bundle(ExportSpec(str(checkpoint), tmp_path / "b", drafter=drafter)).folder
    if is_small:
        made = quantize_bundle(QuantizeSpec(made, tmp_path / "small", preset(BlockFormat(4), "int8"))).folder
    assert run(["doctor", str(made), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["drafter"]
    assert found["graphs"] == [*files.split(", ")[:-1], "drafter.onnx"]
    assert found["is_finite"]
    assert found["has_valid_tokens"]
    assert found["same_tokens"]
    assert found["drafted"] > 0


def test_an_assistant_that_overflows_is_said(
    tiny_bundles: TinyBundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drafter = LlamaAssistant().write(tmp_path / "d")
    edited(drafter, model__layers__0__mlp__down_proj__weight=torch.full((32, 48), 3e38))
    made = export_bundle(ExportSpec(str(tiny_bundles.checkpoint(TARGET)), tmp_path / "b", drafter=str(drafter)))
    assert run(["doctor", str(made.folder)]) == 1
    assert "its numbers overflow" in capsys.readouterr().out


def test_one_that_overflows_is_said(
    tiny_bundles: TinyBundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = Eagle3()
    weights = {**head.tensors(), "midlayer.mlp.down_proj.weight": torch.full((64, 96), 3e38)}
    drafter = str(head.write(tmp_path / "d", weights))
    made = export_bundle(ExportSpec(str(tiny_bundles.checkpoint(TARGET)), tmp_path / "b", drafter=drafter))
    assert run(["doctor", str(made.folder)]) == 1
    assert "its numbers overflow, so texts are decoded plainly" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["doctor", "inspect"])
def test_a_missing_graph_is_refused(bundle: Path, tmp_path: Path, refused: Refused, command: str) -> None:
    for file in ("drafter.onnx", "drafter-fuse.onnx"):
        folder = Path(shutil.copytree(bundle, tmp_path / file))
        (folder / file).unlink()
        refused([command, folder], file)


def test_the_graph_of_another_drafter_and_a_damaged_one_are_refused(
    bundle: Path, tiny_bundles: TinyBundles, tmp_path: Path, refused: Refused
) -> None:
    head = str(Eagle3(hidden=48, has_embedding=True).write(tmp_path / "d"))
    other = export_bundle(ExportSpec(str(tiny_bundles.checkpoint(TARGET)), tmp_path / "o", drafter=head)).folder
    contents = {"drafter.onnx": (other / "drafter.onnx").read_bytes(), "drafter.onnx cannot be loaded": b"\xff" * 500}
    for number, (said, content) in enumerate(contents.items()):
        folder = Path(shutil.copytree(bundle, tmp_path / f"b{number}"))
        (folder / "drafter.onnx").write_bytes(content)
        write_manifest(folder, replace(read_manifest(folder / names.MANIFEST_FILE), files=describe_files(folder)))
        refused(["doctor", folder], said)
