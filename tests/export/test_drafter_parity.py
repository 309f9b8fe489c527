"""``shortstack parity --drafter``: the bundle's drafter against a PyTorch twin made from the published tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from transformers import AutoModelForCausalLM

from helpers.bad_input import Refused
from helpers.drafter_cases import HEADS, KINDS, written
from helpers.drafter_parity import LARGEST_LOGIT, LARGEST_STATE, compared, damaged, swapped, texts
from helpers.drafters import Eagle3, Rows, residual_streams
from helpers.quantized import preset
from helpers.tiny_models import TinyBundles, TinyModel
from shortstack.__main__ import run
from shortstack.export.assemble import export_bundle
from shortstack.export.parity.compare import QUANTIZED, TOLERANCES
from shortstack.export.parity.drafter_report import DrafterParity, DraftFork
from shortstack.export.spec import ExportSpec
from shortstack.graphs.precision import BlockFormat
from shortstack.quant.assemble import quantize_bundle
from shortstack.quant.spec import QuantizeSpec
from shortstack.runtime import load
from shortstack.runtime.engine.drafter_rows import DrafterRows

TARGET = TinyModel("whose drafter has a twin")


@pytest.fixture(autouse=True)
def _quiet(one_torch_thread: Callable[[], None]) -> None:
    """Give torch its threads back afterwards."""


@pytest.fixture(scope="module")
def checkpoint(tiny_bundles: TinyBundles) -> str:
    return str(tiny_bundles.checkpoint(TARGET))


@pytest.mark.parametrize("name", HEADS)
def test_an_eagle3_head_computes_what_its_twin_computes(checkpoint: str, tmp_path: Path, name: str) -> None:
    head = str(HEADS[name].write(tmp_path / "d"))
    bundle = export_bundle(ExportSpec(checkpoint, tmp_path / "b", drafter=head))
    report = compared(checkpoint, bundle.folder, head)
    assert report.problems() == []
    assert not report.forks
    assert report.compared > 100
    assert [draft.depth for draft in report.drafts] == [1, 2, 3, 4]
    assert all(draft.max_abs < LARGEST_LOGIT * draft.deviation for draft in report.drafts)
    assert all(tensor.relative < LARGEST_STATE for tensor in report.tensors)
    found = {tensor.what for tensor in report.tensors}
    features = {f"feature.{depth} of the model" for depth in HEADS[name].features}
    assert features | {"fused states", "states of first drafts", "states of draft 2", "states of draft 4"} <= found


@pytest.mark.parametrize("name", KINDS)
def test_a_projected_drafter_computes_what_its_twin_computes(
    tiny_bundles: TinyBundles, tmp_path: Path, name: str
) -> None:
    spec = written(tiny_bundles.checkpoint(TARGET), KINDS[name], tmp_path / "d")
    assert spec.drafter is not None
    bundle = export_bundle(spec)
    report = compared(spec.checkpoint, bundle.folder, spec.drafter)
    assert report.problems() == []
    assert not report.forks
    assert all(draft.max_abs < LARGEST_LOGIT * draft.deviation for draft in report.drafts)
    assert all(tensor.relative < LARGEST_STATE for tensor in report.tensors)
    assert "draft_state of the model" in {tensor.what for tensor in report.tensors}


@pytest.fixture(scope="module")
def fitted(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, list[list[int]]]:
    """A head that was trained on the model's own answers, its bundle, and the prompts."""
    head, folder, model = Eagle3(draft_vocab=200), tmp_path_factory.mktemp("fitted"), None
    plain = export_bundle(ExportSpec(checkpoint, folder / "plain"))
    with load(plain.folder) as loaded:
        answers = [t + list(loaded.generate(t, max_new_tokens=32, ignore_eos=True).tokens) for t in texts()]
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    embedding = model.model.embed_tokens.weight.detach()
    weights: Rows = head.fitted(answers, [residual_streams(model, text) for text in answers], embedding)
    drafter = str(head.write(folder / "head", weights))
    return drafter, export_bundle(ExportSpec(checkpoint, folder / "bundle", drafter=drafter)).folder, texts()


def test_its_acceptance_is_measured(checkpoint: str, fitted: tuple[str, Path, list[list[int]]], tmp_path: Path) -> None:
    drafter, bundle, given = fitted
    report = compared(checkpoint, bundle, drafter, given, greedy_tokens=32)
    assert report.problems() == []
    assert report.first_acceptance > 0.3
    assert not report.is_suspicious
    assert not any(line.startswith("note:") for line in report.lines())
    untrained = str(Eagle3().write(tmp_path / "d"))
    other = export_bundle(ExportSpec(checkpoint, tmp_path / "b", drafter=untrained))
    bad = compared(checkpoint, other.folder, untrained, given, greedy_tokens=32)
    assert bad.problems() == []
    assert bad.first_acceptance < 0.1
    assert [line for line in bad.lines() if line.startswith("note:") and "depths 2, 3, 4" in line]
    short = compared(checkpoint, other.folder, untrained, given[:1], greedy_tokens=0)
    assert not short.is_suspicious
    assert short.acceptance == 0.0


@pytest.mark.parametrize("cache", ["float", "int8"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_drafter_computes_what_its_blocks_say(
    checkpoint: str, fitted: tuple[str, Path, list[list[int]]], tmp_path: Path, bits: int, cache: Any
) -> None:
    drafter, bundle, given = fitted
    small = quantize_bundle(QuantizeSpec(bundle, tmp_path / "small", preset(BlockFormat(bits), cache)))
    report = compared(checkpoint, small.folder, drafter, given)
    assert report.tolerance == QUANTIZED
    assert report.problems() == []
    parts = {weight.what: weight.relative for weight in report.weights}
    assert parts["drafter norm.weight"] == parts["drafter head.ids"] == 0
    assert 0 < parts["drafter fuse.weight"] < QUANTIZED.weights
    assert 0 < parts["drafter layer 0 q_proj.weight"] < QUANTIZED.weights
    assert all(draft.mean_abs < QUANTIZED.mean_abs * draft.deviation for draft in report.drafts)


@pytest.mark.parametrize("kind", ["EAGLE", "MiMo's layer"])
def test_so_does_a_quantized_projected_one(tiny_bundles: TinyBundles, tmp_path: Path, kind: str) -> None:
    spec = written(tiny_bundles.checkpoint(TARGET), KINDS[kind], tmp_path / "d")
    assert spec.drafter is not None
    small = quantize_bundle(QuantizeSpec(export_bundle(spec).folder, tmp_path / "s", preset(BlockFormat(8), "float")))
    report = compared(spec.checkpoint, small.folder, spec.drafter)
    assert report.problems() == []
    assert {weight.what: weight.relative for weight in report.weights}["drafter model_norm.weight"] == 0


def test_a_drafter_in_float16_is_near_its_twin(
    checkpoint: str, fitted: tuple[str, Path, list[list[int]]], tmp_path: Path
) -> None:
    bundle = export_bundle(ExportSpec(checkpoint, tmp_path / "b", drafter=fitted[0], dtype="float16"))
    assert compared(checkpoint, bundle.folder, fitted[0], fitted[2]).problems() == []


# What is wrong is found


def renamed_outputs(first: str, second: str) -> Callable[[onnx.ModelProto], None]:
    other = {first: second, second: first}

    def change(graph: onnx.ModelProto) -> None:
        for node in graph.graph.node:
            for names_ in (node.input, node.output):
                for i, name in enumerate(names_):
                    names_[i] = other.get(name, name)

    return change


def test_features_of_the_wrong_depth_are_named(
    checkpoint: str, fitted: tuple[str, Path, list[list[int]]], tmp_path: Path
) -> None:
    bad = damaged(fitted[1], tmp_path / "b", renamed_outputs("feature.2", "feature.3"), "layers-00-04.onnx")
    said = "; ".join(compared(checkpoint, bad, fitted[0], fitted[2]).problems())
    assert "feature.2 of the model is off" in said
    assert "feature.3 of the model is off" in said
    assert "feature.4" not in said


@pytest.mark.parametrize(
    ("file", "first", "second", "said"),
    [
        ("drafter-fuse.onnx", "feature.2", "feature.3", "fused states is off"),
        ("drafter.onnx", "drafter.token_norm.weight", "drafter.norm.weight", "states of first drafts is off"),
        ("drafter.onnx", "drafter.state_norm.weight", "drafter.norm.weight", "draft 1 of the drafter: logits"),
    ],
)
def test_a_wrong_product_or_norm_is_found(
    checkpoint: str,
    fitted: tuple[str, Path, list[list[int]]],
    tmp_path: Path,
    file: str,
    first: str,
    second: str,
    said: str,
) -> None:
    bad = damaged(fitted[1], tmp_path / "b", swapped(first, second), file)
    report = compared(checkpoint, bad, fitted[0], fitted[2])
    assert said in "; ".join(report.problems())
    assert report.forks


def test_other_weights_of_the_same_form_are_found(
    checkpoint: str, fitted: tuple[str, Path, list[list[int]]], tmp_path: Path
) -> None:
    other = str(Eagle3(draft_vocab=200, seed=4).write(tmp_path / "d"))
    assert "fused states is off" in "; ".join(compared(checkpoint, fitted[1], other).problems())
    small = quantize_bundle(QuantizeSpec(fitted[1], tmp_path / "small", preset(BlockFormat(8), "float")))
    said = "; ".join(compared(checkpoint, small.folder, other).problems())
    assert "drafter fuse.weight is not the published one" in said
    assert "drafter layer 0 o_proj.weight is not the published one" in said


def test_rounds_with_a_wrong_cache_are_found(
    checkpoint: str, fitted: tuple[str, Path, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of a draft then stand one position too far, and only a generation shows it."""
    right = DrafterRows._set_lengths
    monkeypatch.setattr(DrafterRows, "_set_lengths", lambda self, past, rows: right(self, past + (past > 20), rows))
    report = compared(checkpoint, fitted[1], fitted[0], fitted[2])
    assert not [fork for fork in report.forks if not fork.where.startswith("a round")]
    assert "a round after" in "; ".join(report.problems())
    assert all(math.isfinite(fork.gap) for fork in report.forks)


# The command


def test_the_command_prints_errors_and_acceptance(
    checkpoint: str,
    fitted: tuple[str, Path, list[list[int]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["parity", checkpoint, str(fitted[1]), "--prompts", "2", "--greedy-tokens", "24"]
    assert run([*command, "--drafter", fitted[0]]) == 0
    out = capsys.readouterr().out
    for words in (
        "drafter (eagle3, reads depths 2, 3, 4): ",
        "draft 1        logits: max",
        "draft 4        logits: max",
        "worst of the drafter's states: ",
        "drafts: identical",
        "acceptance: ",
    ):
        assert words in out
    assert run([*command, "--drafter", fitted[0], "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == report["drafter"]["problems"] == []
    assert report["drafter"]["drafted_at"][0] > 20
    assert 0 <= report["drafter"]["acceptance"] <= 1
    assert run(command) == 0
    assert "drafter: not compared" in capsys.readouterr().out


def test_a_difference_of_the_drafter_is_a_failure(
    checkpoint: str, fitted: tuple[str, Path, list[list[int]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(Eagle3(draft_vocab=200, seed=4).write(tmp_path / "d"))
    assert run(["parity", checkpoint, str(fitted[1]), "--prompts", "1", "--drafter", other]) == 1
    assert "fused states is off" in capsys.readouterr().err


def test_a_drafter_that_is_not_the_bundles_is_refused(
    checkpoint: str,
    fitted: tuple[str, Path, list[list[int]]],
    tiny_bundles: TinyBundles,
    tmp_path: Path,
    refused: Refused,
) -> None:
    without = str(tiny_bundles.bundle(TARGET))
    for arguments, words in (
        ([without, "--drafter", fitted[0]], ["no trained drafter to compare", "Leave --drafter out"]),
        ([str(fitted[1]), "--drafter", "mtp"], ["of another kind", "--drafter mtp", "eagle3"]),
        (
            [str(fitted[1]), "--drafter", str(Eagle3(features=(2, 4)).write(tmp_path / "other"))],
            [
                "made with another drafter",
                "the length of features is 3 in the bundle and 2",
                "draft_vocab is 200 in the bundle and 60",
            ],
        ),
        ([str(fitted[1]), "--drafter", str(tmp_path / "nothing")], ["nothing"]),
    ):
        refused(["parity", checkpoint, *arguments, "--prompts", "1"], *words)
    spec = written(Path(checkpoint), KINDS["DeepSeek's layer"], tmp_path / "mtp")
    bundle = str(export_bundle(spec).folder)
    refused(["parity", spec.checkpoint, bundle, "--drafter", fitted[0], "--prompts", "1"], "of another kind", "mtp")


def test_a_draft_for_which_the_twin_has_no_row_is_no_near_tie() -> None:
    report = DrafterParity("eagle3", (2,), TOLERANCES["float32"], compared=99)
    report.forks.append(DraftFork(0, "all rows at once", 3, 1, 7, 8, float("inf")))
    report.forks.append(DraftFork(0, "all rows at once", 4, 1, 7, 8, float("nan")))
    assert len(report.problems()) == 2
