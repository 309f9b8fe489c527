"""Folders of GPTQ, AWQ, compressed-tensors, fp8 and bitsandbytes: the weights that they are, and what is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers.family_rows import FamilyRow
from helpers.quantized_cases import (
    EXITS,
    FLOATS,
    KEPT,
    LLAMA,
    QWEN2,
    SCHEMES,
    SPECULATED,
    TIED,
    Folders,
)
from helpers.quantized_folders import (
    gptq,
    write_plain,
)
from helpers.tiny_models import TinyModel
from shortstack.__main__ import run
from shortstack.export.assemble import export_bundle
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.spec import ExportSpec
from shortstack.runtime import load

UP = "model.layers.0.mlp.up_proj"


def edit_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= fields
    (folder / "config.json").write_text(json.dumps(config))


def same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        *((LLAMA, name) for name in SCHEMES),
        *((QWEN2, name) for name in (*SPECULATED, "fp8", "nf4", "int8")),
        *((TIED, name) for name in ("GPTQ", "AWQ", "fp8")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_the_weights_are_those_that_the_tool_stores_bit_for_bit(
    folders: Folders, model: TinyModel | FamilyRow, name: str
) -> None:
    folder = folders(model, SCHEMES[name], name)
    checkpoint = open_checkpoint(str(folder.path))
    assert checkpoint.names() == folder.floats.keys()
    for tensor, expected in folder.floats.items():
        assert checkpoint.shape(tensor) == expected.shape
        same_bits(checkpoint.tensor(tensor), expected)
        if (stored := checkpoint.blocks(tensor)) is not None and stored.format is not None:
            block = stored.read()
            assert block.format == stored.format
            same_bits(block.dequantize(), expected)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_bundle_of_floats_computes_what_the_folder_of_its_weights_computes(
    folders: Folders, tmp_path: Path, name: str
) -> None:
    folder = folders(LLAMA, SCHEMES[name], name)
    plain = write_plain(folder.path.parent / "floats", tmp_path / "plain", folder)
    expected = load(export_bundle(ExportSpec(str(plain), tmp_path / "expected", EXITS)).folder)
    found = load(folders.bundle(folder, keep=False))
    assert found.bundle.manifest.precision.is_float
    text = np.random.randint(3, LLAMA.vocab, 40).tolist()
    ours, theirs = found.activations(text), expected.activations(text)
    for depth, logits in theirs.heads.items():
        np.testing.assert_array_equal(ours.heads[depth], logits)


@pytest.mark.parametrize("name", ["GPTQ, act-order", "AWQ", "compressed-tensors, W8A8", "fp8", "nf4"])
def test_parity_compares_with_the_pytorch_model_of_the_dequantized_weights(
    folders: Folders, capsys: pytest.CaptureFixture[str], one_torch_thread: Callable[[], None], name: str
) -> None:
    one_torch_thread()
    folder = folders(QWEN2, SCHEMES[name], name)
    bundle = folders.bundle(folder, keep=name in KEPT)
    assert run(["parity", str(folder.path), str(bundle), "--prompts", "2", "--greedy-tokens", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert all(weight["relative"] == 0 for weight in report["weights"])
    assert bool(report["weights"]) == (name in KEPT)


@pytest.mark.parametrize("name", FLOATS)
def test_floats_of_8_and_4_bits_are_dequantized_in_one_line(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = folders(LLAMA, FLOATS[name], name)
    assert run(["export", str(folder.path), str(tmp_path / "out")]) == 0
    told = capsys.readouterr().err.splitlines()
    count = 7 * LLAMA.layers
    assert told[0].startswith(f"warning: dequantizing {count} matrices to floats, since no blocks hold such weights (")
    assert "--keep-blocks" not in "".join(told)


def test_a_plain_export_says_that_blocks_can_be_kept(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folders(LLAMA, KEPT["AWQ"], "AWQ")
    assert run(["export", str(folder.path), str(tmp_path / "out"), "--json"]) == 0
    assert capsys.readouterr().err == (
        f"warning: dequantizing {5 * LLAMA.layers} matrices to floats (AWQ int4, groups of 64); "
        "--keep-blocks keeps the blocks\n"
    )


@pytest.mark.parametrize("options", [[], ["--keep-blocks"]])
def test_that_activations_are_not_quantized_is_said(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    folder = folders(LLAMA, KEPT["compressed-tensors, W8A8"], "compressed-tensors, W8A8")
    assert run(["export", str(folder.path), str(tmp_path / "out"), *options]) == 0
    assert "compressed-tensors quantizes the inputs of matrices, too" in capsys.readouterr().err


def test_the_zero_points_of_gptqmodel_borrow_from_their_neighbours(folders: Folders, tmp_path: Path) -> None:
    folder = folders(LLAMA, gptq(4, 64, symmetric=False, version=2, meta={"quantizer": ["gptqmodel:1.4.0"]}), "v2")
    path = tmp_path / "model"
    shutil.copytree(folder.path, path)
    stored = load_file(path / "model.safetensors")
    words = stored[f"{UP}.qzeros"].view(np.uint32)
    words[:, 0] &= np.uint32(0xFFFF_FF0F)  # the second zero point of each group is 0
    zeros = np.stack([words >> np.uint32(4 * i) & np.uint32(15) for i in range(8)], axis=-1).reshape(len(words), -1)
    stored[f"{UP}.qzeros"] = (words - np.uint32(0x1111_1111)).view(np.int32)
    for name, value in stored.items():
        if name.endswith(".qzeros") and name != f"{UP}.qzeros":
            stored[name] = (value.view(np.uint32) - np.uint32(0x1111_1111)).view(np.int32)
    save_file(stored, path / "model.safetensors")
    edit_config(path, checkpoint_format="gptq")
    found = open_checkpoint(str(path)).blocks(f"{UP}.weight")
    assert found is not None
    block = found.read()
    assert block.zero_points is not None
    np.testing.assert_array_equal(block.zero_points[:, ::2], zeros.T)  # groups of 64 are two blocks
    assert (zeros[:, 1] == 0).all()


def test_biases_of_zeros_that_old_tools_stored_are_left_out(folders: Folders, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(folders(LLAMA, KEPT["GPTQ"], "GPTQ").path, path)
    stored = load_file(path / "model.safetensors")
    stored[f"{UP}.bias"] = np.zeros(256, np.float16)
    save_file(stored, path / "model.safetensors")
    assert export_bundle(ExportSpec(str(path), tmp_path / "out", (1,), keep_blocks=True)).manifest.precision.weights


def test_a_folder_without_g_idx_is_read(folders: Folders, tmp_path: Path) -> None:
    folder, path = folders(LLAMA, KEPT["GPTQ"], "GPTQ"), tmp_path / "model"
    shutil.copytree(folder.path, path)
    stored = load_file(path / "model.safetensors")
    save_file({n: v for n, v in stored.items() if not n.endswith("g_idx")}, path / "model.safetensors")
    same_bits(open_checkpoint(str(path)).tensor(f"{UP}.weight"), folder.floats[f"{UP}.weight"])


@pytest.mark.parametrize(("name", "file"), [("GPTQ", "quantize_config.json"), ("AWQ", "quant_config.json")])
def test_a_description_in_a_file_of_its_own_is_read(folders: Folders, tmp_path: Path, name: str, file: str) -> None:
    folder, path = folders(LLAMA, KEPT[name], name), tmp_path / "model"
    shutil.copytree(folder.path, path)
    config = json.loads((path / "config.json").read_text())
    described = config.pop("quantization_config")
    if name == "AWQ":
        described = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    described.pop("quant_method", None)
    (path / "config.json").write_text(json.dumps(config))
    (path / file).write_text(json.dumps(described))
    same_bits(open_checkpoint(str(path)).tensor(f"{UP}.weight"), folder.floats[f"{UP}.weight"])
