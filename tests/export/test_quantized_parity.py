"""``shortstack parity`` on quantized bundles: PyTorch computes with the weights that the blocks stand for.

So the graphs must be near it, and each of these weights must be near the checkpoint's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from helpers.bad_input import Refused
from helpers.exit_nodes import write_random_exits
from helpers.kv_bundles import KVBundles
from helpers.quantized import (
    INT4,
    INT4_OFFSETS,
    INT8,
    QuantizedBundles,
    preset,
    read_matrix,
    stored_tensors,
)
from helpers.tiny_models import BASE, LAYER_MATRICES, SPECULATOR, SWITCHES, TinyBundles, TinyModel
from shortstack.__main__ import run
from shortstack.export.assemble import export_bundle
from shortstack.export.parity.bundle_weights import BundleWeights
from shortstack.export.parity.compare import QUANTIZED, ParityReport, compare
from shortstack.export.parity.reference import Reference
from shortstack.export.spec import ExportSpec
from shortstack.graphs import names
from shortstack.graphs.bundle import describe_files, open_bundle, write_manifest
from shortstack.graphs.ir.read_matrix import StoredMatrices
from shortstack.graphs.kv_map import placement
from shortstack.graphs.manifest import read_manifest
from shortstack.graphs.plan import ExitSpec
from shortstack.graphs.precision import BlockFormat
from shortstack.graphs.texts.prompts import prompts
from shortstack.quant.preset import Preset
from shortstack.runtime import load

TINY = {tiny.name: tiny for tiny in SWITCHES}
QUICK = ["--prompts", "2", "--greedy-tokens", "8"]
PRESETS: dict[str, tuple[Preset, dict[str, Any]]] = {
    "int4": (preset(INT4), {}),
    "symmetric int4, int8 cache": (preset(replace(INT4, is_symmetric=True), "int8"), {}),
    "offsets": (preset(INT4_OFFSETS), {}),
    "blocks of 128": (preset(BlockFormat(4, 128)), {}),
    "int8": (preset(INT8), {}),
    "int8, draft heads of their own": (preset(INT8, draft_head=INT4, method="k-quant"), {}),
    "floats, int8 cache": (preset(None, "int8"), {}),
    "first rows": (preset(INT4, first_rows=100, first_rows_format=INT8), {}),
    "gptq": (preset(INT4, method="gptq"), {}),
    "awq": (preset(INT4, method="awq"), {}),
    "float16": (preset(INT4), {"dtype": "float16"}),
}

Check = Callable[..., ParityReport]


@pytest.fixture
def check(tiny_bundles: TinyBundles, one_torch_thread: Callable[[], None]) -> Check:
    def check(tiny: TinyModel, folder: Path, greedy_tokens: int = 0) -> ParityReport:
        model = load(folder)
        reference = Reference(str(tiny_bundles.checkpoint(tiny)), weights=BundleWeights(model.bundle))
        one_torch_thread()
        texts = [model.encode([{"role": "user", "content": line}]) for line in prompts(3)]
        return compare(model, reference, texts, greedy_tokens=greedy_tokens)

    return check


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("base", {"draft_vocab": 64}),
        ("all-biases-tied", {"draft_vocab": 64}),
        ("head-dim-20-biased", {}),
        ("odd-sizes", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", PRESETS)
def test_a_quantized_bundle_computes_what_pytorch_computes_with_its_weights(
    tiny_bundles: TinyBundles, quantized: QuantizedBundles, check: Check, case: str, name: str, options: dict[str, Any]
) -> None:
    mix, changes = PRESETS[case]
    small = quantized(tiny_bundles.bundle(TINY[name], 1, 3, **options), mix, **changes)
    report = check(TINY[name], small, greedy_tokens=8)
    assert report.problems() == []
    assert report.tolerance == QUANTIZED
    compared = {weight.what for weight in report.weights}
    projections = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    assert {f"layer {i} {p}.weight" for i in range(BASE.layers) for p in projections} <= compared
    assert {"embed_tokens.weight", "final_norm.weight"} <= compared
    for head in report.heads:
        assert head.mean_abs < QUANTIZED.mean_abs * head.deviation


def rewired(source: Path, out: Path, weight: str, other: str) -> Path:
    """Copy a bundle and let the product with one matrix take the blocks of another one."""
    shutil.copytree(source, out)
    graphs = {path: onnx.load(path, load_external_data=False) for path in sorted(out.glob("*.onnx"))}
    known = {tensor.name: tensor for graph in graphs.values() for tensor in graph.graph.initializer}
    for path, graph in graphs.items():
        here = {tensor.name for tensor in graph.graph.initializer}
        for node in graph.graph.node:
            for i, name in enumerate(node.input):
                if name.startswith(f"{weight}."):
                    node.input[i] = name.replace(weight, other)
                    if node.input[i] not in here:
                        here.add(node.input[i])
                        graph.graph.initializer.append(known[node.input[i]])
        path.write_bytes(graph.SerializeToString())
    manifest = read_manifest(out / names.MANIFEST_FILE)
    write_manifest(out, replace(manifest, files=describe_files(out)))
    return out


@pytest.mark.parametrize("part", LAYER_MATRICES)
@pytest.mark.parametrize("layer", range(BASE.layers))
def test_one_product_with_the_wrong_matrix_is_found(
    tiny_bundles: TinyBundles, quantized: QuantizedBundles, check: Check, tmp_path: Path, layer: int, part: str
) -> None:
    """Both matrices are the checkpoint's, so the weights are right; the upper layers add a third of what others do."""
    small = quantized(tiny_bundles.bundle(BASE, 1, 3), preset(INT4))
    wrong, right = names.layer_weight((layer + 1) % BASE.layers, part), names.layer_weight(layer, part)
    report = check(BASE, rewired(small, tmp_path / "wrong", right, wrong))
    assert max(weight.relative for weight in report.weights) < QUANTIZED.weights
    says = "; ".join(report.problems())
    assert f"head after {BASE.layers} layers" in says
    assert ("head after 1 layers" in says) == (layer == 0)


WRONG_VALUES = {
    "another matrix": lambda values: np.roll(values, 1, axis=0),
    "zeros": lambda values: np.zeros_like(values),
    "half": lambda values: values // 2,
}


@pytest.mark.parametrize(("mix", "damage"), [*(("awq", damage) for damage in WRONG_VALUES), ("int8", "another matrix")])
@pytest.mark.parametrize("part", LAYER_MATRICES)
def test_one_matrix_that_is_not_the_checkpoints_is_named(
    tiny_bundles: TinyBundles,
    quantized: QuantizedBundles,
    check: Check,
    tmp_path: Path,
    part: str,
    mix: str,
    damage: str,
) -> None:
    """The graphs and PyTorch agree then: both compute with it."""
    small = quantized(tiny_bundles.bundle(BASE, 1, 3), PRESETS[mix][0])
    broken = Path(shutil.copytree(small, tmp_path / "broken"))
    codes = stored_tensors(broken)[names.block_codes(names.layer_weight(2, part))]
    codes.write(broken, WRONG_VALUES[damage](codes.read(broken)))
    (problem, *_) = check(BASE, broken).problems()
    module = "q_proj" if part == names.QKV_PROJ else part.split(".")[1]
    assert f"layer 2 {module}.weight is not the checkpoint's" in problem


# Exits, the twin, the command line


EXITS = {
    "linear, mlp": (
        ExitSpec(1, 64, branch="linear", linear_mlp=40, sees_token=True, sees_state=True, has_gate=True),
        ExitSpec(3, branch="mlp", norm="own", head="low_rank", head_rank=16),
    ),
    "block, own": (ExitSpec(1, branch="block"), ExitSpec(3, 64, head="own", norm="none")),
    "shared heads": (ExitSpec(1, branch="mlp"), ExitSpec(3, 64, branch="linear")),
}


@pytest.mark.parametrize("mix", ["int4", "awq", "symmetric int4, int8 cache", "int8, draft heads of their own"])
@pytest.mark.parametrize("exits", EXITS)
@pytest.mark.parametrize("tiny", [SPECULATOR, TINY["head-dim-20-biased"]], ids=lambda tiny: tiny.name)
def test_trained_exits_are_compared_with_their_own_weights_in_blocks(
    tiny_bundles: TinyBundles,
    quantized: QuantizedBundles,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tiny: TinyModel,
    exits: str,
    mix: str,
) -> None:
    checkpoint = tiny_bundles.checkpoint(tiny)
    write_random_exits(checkpoint, tmp_path / "exits", *EXITS[exits])
    source = tmp_path / "bundle"
    export_bundle(ExportSpec(str(checkpoint), source, (2,), exits=tmp_path / "exits", draft_vocab=50))
    small = quantized(source, PRESETS[mix][0])
    command = ["parity", str(checkpoint), str(small), *QUICK]
    assert run([*command, "--exits", str(tmp_path / "exits")]) == 0, capsys.readouterr().err
    write_random_exits(checkpoint, tmp_path / "others", *(replace(e, has_gate=e.has_gate) for e in EXITS[exits]))
    assert run([*command, "--exits", str(tmp_path / "others")]) == 1
    assert "exits.1." in capsys.readouterr().err


@pytest.mark.parametrize("mix", ["int4", "offsets", "floats, int8 cache"])
def test_models_that_share_keys_and_values_are_compared_with_the_twin(
    kv_bundles: KVBundles, quantized: QuantizedBundles, capsys: pytest.CaptureFixture[str], mix: str
) -> None:
    kv_map, sizes = placement("pizza", "bottom", 6, 3), {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    small = quantized(kv_bundles.bundle(kv_map, 2, **sizes), PRESETS[mix][0])
    assert run(["parity", str(kv_bundles.checkpoint(kv_map, **sizes)), str(small), *QUICK]) == 0
    assert "weights: furthest from the checkpoint" in capsys.readouterr().out


def test_a_bundle_of_another_checkpoint_is_found(
    tiny_bundles: TinyBundles, quantized: QuantizedBundles, capsys: pytest.CaptureFixture[str]
) -> None:
    small = quantized(tiny_bundles.bundle(BASE, 1), preset(INT8))
    other = tiny_bundles.checkpoint(replace(BASE, name="another"))
    assert run(["parity", str(tiny_bundles.checkpoint(BASE)), str(small), *QUICK]) == 0
    assert run(["parity", str(other), str(small), *QUICK]) == 1
    assert "lm_head.weight is not the checkpoint's: off by 1.4" in capsys.readouterr().err


# Reading


@pytest.mark.parametrize("case", PRESETS)
@pytest.mark.parametrize("name", ["base", "odd-sizes-tied"])
def test_blocks_are_read_as_their_description_says(
    tiny_bundles: TinyBundles, quantized: QuantizedBundles, case: str, name: str
) -> None:
    mix, changes = PRESETS[case]
    small = quantized(tiny_bundles.bundle(TINY[name], 1), mix, **changes)
    stored = StoredMatrices(open_bundle(small))
    for matrix in open_bundle(small).manifest.precision.weights:
        if matrix.endswith(".first_rows") or names.first_rows(matrix) in stored:
            continue
        width = TINY[name].intermediate if "down_proj" in matrix else TINY[name].hidden
        if "o_proj" in matrix:
            width = TINY[name].heads * 16
        expected = read_matrix(small, matrix, width)
        np.testing.assert_allclose(stored.matrix(matrix, expected.shape), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (names.block_scales(names.layer_weight(1, "attn.o_proj.weight")), "no graph has the tensor"),
        (names.block_zero_points(names.layer_weight(1, "mlp.up_proj.weight")), "no graph has the tensor"),
        (names.layer_weight(2, "post_attention_norm.weight"), "no graph has the tensor"),
        (names.FINAL_NORM, "no graph has the tensor"),
    ],
)
def test_a_tensor_with_another_name_is_named(
    tiny_bundles: TinyBundles, quantized: QuantizedBundles, tmp_path: Path, refused: Refused, name: str, says: str
) -> None:
    """onnxruntime does not mind how a tensor is called."""
    bundle = Path(shutil.copytree(quantized(tiny_bundles.bundle(BASE, 1), preset(INT4)), tmp_path / "bundle"))
    for graph in bundle.glob("*.onnx"):
        graph.write_bytes(graph.read_bytes().replace(name.encode(), name[:-1].encode() + b"!"))
    refused(["parity", tiny_bundles.checkpoint(BASE), bundle, *QUICK], str(bundle), says, name, "Copy the bundle again")
