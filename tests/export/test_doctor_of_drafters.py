"""``shortstack doctor`` opens and runs a bundle's trained drafter."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.bad_input import Refused
from helpers.drafter_cases import KINDS, written
from helpers.drafters import Eagle3
from helpers.tiny_models import TinyBundles, TinyModel
from shortstack.__main__ import run
from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec
from shortstack.graphs import names
from shortstack.graphs.bundle import describe_files, write_manifest
from shortstack.graphs.manifest import read_manifest

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
