"""Bundles of a model whose weights came from a quantized file and were tuned since: quantizing must keep the tuning."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from helpers.adapters import lora
from helpers.quantized import INT4, INT4_OFFSETS, preset, read_matrix, stored_tensors
from helpers.tiny_models import LAYER_MATRICES, TinyModel
from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec
from shortstack.graphs import names
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.precision import BlockFormat
from shortstack.quant.assemble import quantize_bundle
from shortstack.quant.cli import quantize
from shortstack.quant.preset import Preset
from shortstack.quant.record import read_record
from shortstack.quant.spec import QuantizeSpec
from shortstack.runtime import DraftPolicy, load
from shortstack.runtime.commands.row_check import check_rows

WIDE = TinyModel("from-a-quantized-file", layers=3, hidden=128, intermediate=256, heads=4, kv_heads=4, head_dim=32)
SYMMETRIC = BlockFormat(4, is_symmetric=True)
TEXT = np.random.default_rng(5).integers(3, WIDE.vocab, 48).tolist()
PRESET_OF = {"Q4_1": "int4", "Q4_0": "int4-fast"}
GRIDS = {"Q4_1": INT4_OFFSETS, "Q4_0": SYMMETRIC}  # the format of ours that lies on the same grid


def on_the_grid(folder: Path, kind: str) -> Path:
    """Rounds the layers' matrices of a checkpoint as a GGUF file of some type holds them."""
    file = folder / "model.safetensors"
    tensors, wanted = load_file(file), gguf.GGMLQuantizationType[kind]
    for name in tensors:
        if name.endswith("_proj.weight"):
            tensors[name] = gguf.dequantize(gguf.quantize(tensors[name], wanted), wanted).reshape(tensors[name].shape)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=list(GRIDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, kind: str) -> dict[str, Path]:
    """A bundle of the file's weights, one with an adapter merged, and one changed a little in every weight."""
    root = tmp_path_factory.mktemp(kind)
    checkpoint = on_the_grid(WIDE.write(root / "checkpoint"), kind)
    adapter = lora(root / "adapter", checkpoint, lora_alpha=0.3)
    tuned = WIDE.write(root / "tuned")
    tensors = load_file(checkpoint / "model.safetensors")
    rng = np.random.default_rng(1)
    for name, value in tensors.items():
        if name.endswith("_proj.weight"):
            value += 0.02 * value.std() * rng.standard_normal(value.shape).astype(np.float32)
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    found = {name: root / f"{name}-bundle" for name in ("base", "merged", "tuned")}
    export_bundle(ExportSpec(str(checkpoint), found["base"], (1,)))
    export_bundle(ExportSpec(str(checkpoint), found["merged"], (1,), adapter=adapter))
    export_bundle(ExportSpec(str(tuned), found["tuned"], (1,)))
    return found


def rounded(bundle: Path, out: Path, mix: Preset, **options: Any) -> Path:
    quantize_bundle(QuantizeSpec(bundle, out, mix, calibration_tokens=512, **options))
    return out


def matrices(folder: Path) -> np.ndarray:
    """All matrices of the layers, one after the other, as the runtime multiplies with them."""
    found, formats = [], open_bundle(folder).manifest.precision.weights
    for layer, part in product(range(WIDE.layers), LAYER_MATRICES):
        name = names.layer_weight(layer, part)
        width = WIDE.intermediate if part == "mlp.down_proj.weight" else WIDE.hidden
        stored = read_matrix(folder, name, width) if name in formats else stored_tensors(folder)[name].read(folder).T
        found.append(stored.ravel())
    return np.concatenate(found).astype(np.float64)


def share(folder: Path, made: dict[str, Path]) -> float:
    """How much of the adapter a quantized bundle has: 1 all of it, 0 none."""
    base, merged = matrices(made["base"]), matrices(made["merged"])
    adapter = merged - base
    return float((matrices(folder) - base) @ adapter / (adapter @ adapter))


def float_head(kind: str, method: str = "rtn") -> Preset:
    return preset(GRIDS[kind], head=None, embedding=None, method=method)


@pytest.mark.parametrize("method", ["rtn", "k-quant", "hqq", "gptq"])
def test_a_merged_adapter_survives(made: dict[str, Path], kind: str, method: str, tmp_path: Path) -> None:
    kept = rounded(made["merged"], tmp_path / "kept", float_head(kind, method))
    assert 0.95 < share(kept, made) < 1.05
    record = read_record(open_bundle(kept))
    assert record is not None
    assert record.fates() == {"kept": len(LAYER_MATRICES) * WIDE.layers}
    formats = open_bundle(kept).manifest.precision.weights
    assert {formats[name].side_columns for name in record.tuning} == {32}


def test_rounding_that_ignores_it_gives_the_file_s_weights_again(
    made: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    """What the mend is measured against: most of the adapter is lost, and nothing says so."""
    lost = rounded(made["merged"], tmp_path / "lost", float_head(kind), tuning="ignore")
    assert share(lost, made) < 0.3


def test_off_the_grid_of_the_file_it_survives_on_average(made: dict[str, Path], kind: str, tmp_path: Path) -> None:
    moved = rounded(made["merged"], tmp_path / "moved", float_head(kind), tuning="off-grid")
    # A symmetric grid cannot be shifted: the blocks that lose it get a zero point, which moves some.
    assert share(moved, made) > {"Q4_1": 0.8, "Q4_0": 0.4}[kind]


def test_the_blocks_of_the_file_stay_as_they_were(made: dict[str, Path], kind: str, tmp_path: Path) -> None:
    folders = [rounded(made[name], tmp_path / name, float_head(kind)) for name in ("base", "merged")]
    for layer, part in product(range(WIDE.layers), LAYER_MATRICES):
        name = names.layer_weight(layer, part)
        blocks = (WIDE.intermediate if part == "mlp.down_proj.weight" else WIDE.hidden) // 32
        one, other = (stored_tensors(f)[f"{name}.codes"].read(f)[:, :blocks] for f in folders)
        assert (one == other).mean() > 0.98, name


@pytest.mark.parametrize("kv_cache", ["float", "int8"])
def test_drafting_beside_a_side_product_emits_the_plain_tokens(
    made: dict[str, Path], kind: str, kv_cache: Any, tmp_path: Path
) -> None:
    mix = preset(GRIDS[kind], kv_cache, head=INT4, embedding=INT4)
    with load(rounded(made["merged"], tmp_path / "out", mix)) as model:
        assert all(check.is_exact for check in check_rows(model, TEXT))
        plain = model.generate(TEXT[:9], max_new_tokens=40, ignore_eos=True)
        for draft in (1, 3, 6):
            found = model.generate(
                TEXT[:9], max_new_tokens=40, ignore_eos=True, strategy="self-speculative", draft=DraftPolicy(draft)
            )
            assert found.tokens == plain.tokens


def test_a_model_of_the_file_itself_is_stored_as_ever(made: dict[str, Path], kind: str, tmp_path: Path) -> None:
    folder = rounded(made["base"], tmp_path / "out", float_head(kind))
    record = read_record(open_bundle(folder))
    assert record is not None
    assert not record.tuning
    assert "tuning" not in json.loads((folder / names.QUANTIZATION_FILE).read_text())
    assert all(not found.side_columns for found in open_bundle(folder).manifest.precision.weights.values())


def test_a_tuning_without_a_low_rank_is_said_to_be_at_risk(made: dict[str, Path], kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--preset", PRESET_OF[kind], "--method", "rtn", "--no-report", "--kv-cache", "float"]
    done = CliRunner().invoke(quantize, [str(made["tuned"]), str(out), *options, "--json"])
    assert done.exit_code == 0, done.output
    count = len(LAYER_MATRICES) * WIDE.layers
    assert json.loads(done.stdout)["tuning"] == {"at risk": count}
    assert f"in {count} matrices changes smaller than half a step" in done.stderr
    formats = open_bundle(out).manifest.precision.weights
    layers = [found for name, found in formats.items() if name.startswith("model.layers")]
    assert set(layers) == {INT4}


def test_a_kept_tuning_is_said_on_stderr_and_in_the_report(made: dict[str, Path], kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--preset", PRESET_OF[kind], "--method", "rtn", "--calibration-tokens", "256", "--heldout-tokens", "64"]
    done = CliRunner().invoke(quantize, [str(made["merged"]), str(out), *options, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["tuning"] == found["quality"]["tuning"] == {"kept": 15}
    assert "side products of 15 matrices keep what was changed" in done.stderr
    assert found["quality"]["is_exact"]


def test_a_searched_mix_keeps_it_too(made: dict[str, Path], kind: str, tmp_path: Path) -> None:
    out = rounded(made["merged"], tmp_path / "out", preset(GRIDS[kind], method="k-quant"), max_kl=0.5)
    assert any(found.side_columns for found in open_bundle(out).manifest.precision.weights.values())
    assert share(out, made) > 0.95
