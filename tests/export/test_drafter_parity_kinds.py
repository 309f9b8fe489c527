"""``shortstack parity --drafter`` of assistants, and of layers that draft one token each; its errors are found."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from helpers.assistants import CENTROIDS, KEYS, Gemma4Pair, edited, shared_keys_and_values
from helpers.drafter_parity import LARGEST_LOGIT, LARGEST_STATE, compared, damaged, swapped
from helpers.drafters import Eagle3
from helpers.gguf_drafters import eagle3_gguf, with_mtp_gguf
from helpers.mtp import TinyMtp
from helpers.own_assistants import LlamaAssistant
from helpers.quantized import preset
from helpers.tiny_models import TinyBundles, TinyModel
from shortstack.__main__ import run
from shortstack.export.assemble import export_bundle
from shortstack.export.parity.bundle_weights import BundleWeights
from shortstack.export.parity.compare import QUANTIZED, compare
from shortstack.export.parity.drafter_report import DrafterParity
from shortstack.export.parity.reference import Reference
from shortstack.export.spec import OWN_DRAFTER, ExportSpec
from shortstack.graphs import names
from shortstack.graphs.precision import BlockFormat
from shortstack.quant.assemble import quantize_bundle
from shortstack.quant.spec import QuantizeSpec
from shortstack.runtime import load
from shortstack.runtime.engine.assistant_rows import AssistantRows
from shortstack.runtime.engine.drafter_stages import StagedRows

GEMMAS = {
    "a dense head": Gemma4Pair(vocab=64, seed=1),
    "windows": Gemma4Pair(vocab=64, window=8, seed=1),
    "centroids": Gemma4Pair(vocab=64, head=CENTROIDS, seed=2),
    "shared keys and values, centroids": Gemma4Pair(
        vocab=64,
        model=shared_keys_and_values(64),
        head=CENTROIDS,
        seed=3,
    ),
    "values from keys": Gemma4Pair(vocab=64, model=KEYS, assistant=KEYS, seed=4),
}
LLAMAS = {
    "its embedding as head": LlamaAssistant(),
    "a trimmed head, norms": LlamaAssistant(head="trimmed", has_norms=True),
    "the model's head": LlamaAssistant(head="model", kv_layers=None),
    "layers of the same keys and values": LlamaAssistant(kv_layers=(2, 2), hidden=64),
}
TARGET = TinyModel("drafted for by an assistant that has a twin")


@pytest.fixture(autouse=True)
def _quiet(one_torch_thread: Callable[[], None]) -> None:
    """Give torch its threads back afterwards."""


@dataclass(frozen=True)
class Case:
    """A drafter that was exported.

    Attributes:
        checkpoint: The model's.
        drafter: What ``--drafter`` says.
        bundle: The bundle.
        vocab: Token ids.
    """

    checkpoint: str
    drafter: str
    bundle: Path
    vocab: int = 300

    def report(self, bundle: Path | None = None, greedy_tokens: int = 24) -> DrafterParity:
        texts = [np.random.default_rng(n).integers(0, self.vocab, 2 + 13 * n).tolist() for n in range(3)]
        return compared(self.checkpoint, bundle or self.bundle, self.drafter, texts, greedy_tokens)

    def quantized(self, out: Path, bits: int, cache: Any) -> Path:
        return quantize_bundle(QuantizeSpec(self.bundle, out, preset(BlockFormat(bits), cache))).folder


def exported(checkpoint: Path, drafter: Path | str, out: Path, vocab: int = 300) -> Case:
    spec = ExportSpec(str(checkpoint), out, drafter=str(drafter))
    return Case(str(checkpoint), str(drafter), export_bundle(spec).folder, vocab)


def of_gemma(pair: Gemma4Pair, folder: Path) -> Case:
    return exported(*pair.write(folder), folder / "bundle", pair.vocab)


@pytest.fixture(scope="module")
def assistant(tiny_bundles: TinyBundles, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("assistant")
    drafter = LlamaAssistant().write(folder / "drafter")
    return exported(tiny_bundles.checkpoint(TARGET), drafter, folder / "bundle")


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("stages")
    return exported(TinyMtp(3).write(folder / "model"), OWN_DRAFTER, folder / "bundle")


def assert_same(report: DrafterParity, drafts: Sequence[int]) -> None:
    assert report.problems() == []
    assert not report.forks
    assert report.compared > 100
    assert [draft.depth for draft in report.drafts] == list(drafts)
    assert all(draft.max_abs < LARGEST_LOGIT * max(1.0, draft.deviation) for draft in report.drafts)
    assert all(tensor.relative < LARGEST_STATE for tensor in report.tensors)
    found = {tensor.what for tensor in report.tensors}
    assert {"draft_state of the model", "states of first drafts", "states of draft 2"} <= found


@pytest.mark.parametrize("name", GEMMAS)
def test_an_assistant_of_gemma_computes_what_its_twin_computes(tmp_path: Path, name: str) -> None:
    report = of_gemma(GEMMAS[name], tmp_path).report()
    assert_same(report, [1, 2, 3, 4])
    groups = {tensor.what for tensor in report.tensors if tensor.what.startswith("groups")}
    assert bool(groups) == ("centroids" in name)


@pytest.mark.parametrize("name", LLAMAS)
def test_an_assistant_of_our_own_format_computes_what_its_twin_computes(
    tiny_bundles: TinyBundles, tmp_path: Path, name: str
) -> None:
    drafter = LLAMAS[name].write(tmp_path / "drafter")
    assert_same(exported(tiny_bundles.checkpoint(TARGET), drafter, tmp_path / "bundle").report(), [1, 2, 3, 4])


@pytest.mark.parametrize("count", [2, 3])
def test_layers_that_draft_one_token_each_compute_what_their_twin_computes(tmp_path: Path, count: int) -> None:
    case = exported(TinyMtp(count).write(tmp_path / "model"), OWN_DRAFTER, tmp_path / "bundle")
    report = case.report()
    assert_same(report, range(1, count + 1))
    assert report.accepted_at[0] > 0


def test_drafters_in_gguf_files_compute_what_their_twins_compute(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    head = eagle3_gguf(
        Eagle3().write(tmp_path / "d"),
        tmp_path / "d.gguf",
        changed={"rope_freqs.weight": np.linspace(1.0, 4.0, 8, dtype=np.float32)},
    )
    report = exported(tiny_bundles.checkpoint(TARGET), head, tmp_path / "a").report()
    assert report.problems() == []
    assert not report.forks
    model = with_mtp_gguf(TinyMtp(2).write(tmp_path / "model"), tmp_path / "model.gguf", "qwen2")
    assert_same(exported(model, OWN_DRAFTER, tmp_path / "b").report(), [1, 2])


@pytest.mark.parametrize(("bits", "cache"), [(4, "int8"), (4, "float"), (8, "float")])
@pytest.mark.parametrize("kind", ["assistant", "stages"])
def test_quantized_ones_compute_what_their_blocks_say(
    request: pytest.FixtureRequest, tmp_path: Path, bits: int, cache: str, kind: str
) -> None:
    case: Case = request.getfixturevalue(kind)
    report = case.report(case.quantized(tmp_path / "small", bits, cache))
    assert report.tolerance == QUANTIZED
    assert report.problems() == []
    off = {weight.what: weight.relative for weight in report.weights}
    assert off["drafter norm.weight"] == 0
    assert 0 < off["drafter input.weight"] < QUANTIZED.weights
    other = "drafter output.weight" if kind == "assistant" else "drafter stages.2.input.weight"
    assert 0 < off[other] < QUANTIZED.weights


def test_a_quantized_head_with_centroids_chooses_the_groups_of_its_twin(
    tiny_bundles: TinyBundles, tmp_path: Path
) -> None:
    drafter, random = LlamaAssistant().write(tmp_path / "drafter"), torch.Generator().manual_seed(1)
    config = json.loads((drafter / "config.json").read_text())
    fields = {"use_ordered_embeddings": True, "num_centroids": 20, "centroid_intermediate_top_k": 8}
    (drafter / "config.json").write_text(json.dumps({**config, **fields}))
    edited(
        drafter,
        masked_embedding__centroids__weight=torch.randn(20, 32, generator=random),
        masked_embedding__token_ordering=torch.randperm(300, generator=random),
    )
    case = exported(tiny_bundles.checkpoint(TARGET), drafter, tmp_path / "bundle")
    assert_same(case.report(), [1, 2, 3, 4])
    report = case.report(case.quantized(tmp_path / "small", 4, "int8"))
    assert report.problems() == []
    assert {weight.what: weight.relative for weight in report.weights}["drafter head.ids"] == 0
    assert any(tensor.what.startswith("groups") for tensor in report.tensors)


def test_the_model_of_a_quantized_gemma_is_compared_with_its_scalars(tmp_path: Path) -> None:
    """transformers keeps the scalar of a layer in a buffer."""
    case = of_gemma(GEMMAS["a dense head"], tmp_path)
    small = case.quantized(tmp_path / "small", 8, "float")
    with load(small) as model:
        reference = Reference(case.checkpoint, weights=BundleWeights(model.bundle))
        torch.set_num_threads(1)
        report = compare(model, reference, [list(range(20))], greedy_tokens=0)
    assert report.heads[-1].mean_abs < 0.2 * report.heads[-1].deviation


# What is wrong is found


@pytest.mark.parametrize("part", names.KV_PARTS)
def test_keys_or_values_of_another_layer_are_found(assistant: Case, tmp_path: Path, part: str) -> None:
    change = swapped(names.shared(1, part), names.shared(3, part))
    report = assistant.report(damaged(assistant.bundle, tmp_path / "b", change, names.DRAFTER_FILE))
    said = "; ".join(report.problems())
    assert "states of first drafts is off" in said
    assert "draft 1 of the drafter: logits" in said
    assert report.forks


def test_they_are_found_in_int4_too(assistant: Case, tmp_path: Path) -> None:
    small, owners = (
        assistant.quantized(tmp_path / "small", 4, "int8"),
        (names.shared(1, "value"), names.shared(3, "value")),
    )
    report = assistant.report(damaged(small, tmp_path / "b", swapped(*owners), names.DRAFTER_FILE))
    assert "draft 1 of the drafter: logits" in "; ".join(report.problems())


def test_rounds_at_a_wrong_position_are_found(assistant: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a generation shows what the decoding loop tells the graph."""
    right = AssistantRows.step

    def early(self: AssistantRows, row: int, with_logits: bool) -> None:
        if row == 0:
            self._position[0], self._total[...] = self._position[0] - 1, self._total - 1
        right(self, row, with_logits)

    monkeypatch.setattr(AssistantRows, "step", early)
    report = assistant.report()
    assert report.forks
    assert all(fork.where.startswith("a round after") for fork in report.forks)
    assert "a round after" in "; ".join(report.problems())


def test_other_groups_than_the_likeliest_are_found(tmp_path: Path) -> None:
    case = of_gemma(GEMMAS["centroids"], tmp_path)

    def change(graph: onnx.ModelProto) -> None:
        node = next(node for node in graph.graph.node if node.op_type == "TopK")
        node.attribute.append(onnx.helper.make_attribute("largest", 0))

    report = case.report(damaged(case.bundle, tmp_path / "b", change, names.DRAFTER_FILE))
    assert "groups of first drafts is off" in "; ".join(report.problems())


def exchanged(source: Path, out: Path) -> Path:
    """Copy a bundle and exchange the weights of its first two stages."""
    files = [onnx.load(source / names.drafter_file(n), load_external_data=False) for n in (0, 1)]
    stored = [{t.name: t for t in file.graph.initializer if t.external_data} for file in files]
    places = [{name: list(t.external_data) for name, t in own.items()} for own in stored]

    def change(number: int) -> Callable[[onnx.ModelProto], None]:
        def of(name: str) -> str:
            pairs = [("drafter.layers.0.", "drafter.layers.1."), ("drafter.", "drafter.stages.1.")]
            for pair in pairs:
                mine, other = pair[number], pair[1 - number]
                if name.startswith(mine):
                    return name.replace(mine, other, 1)
            return name

        def apply(graph: onnx.ModelProto) -> None:
            count = 0
            for tensor in graph.graph.initializer:
                other = places[1 - number].get(of(tensor.name))
                if tensor.external_data and other is not None and of(tensor.name) != tensor.name:
                    del tensor.external_data[:]
                    tensor.external_data.extend(other)
                    count += 1
            assert count >= 8

        return apply

    damaged(source, out.with_name("half"), change(0), names.drafter_file(0))
    return damaged(out.with_name("half"), out, change(1), names.drafter_file(1))


def test_exchanged_stages_are_found(stages: Case, tmp_path: Path) -> None:
    report = stages.report(exchanged(stages.bundle, tmp_path / "b"))
    said = "; ".join(report.problems())
    assert "states of first drafts is off" in said
    assert "states of draft 2 is off" in said
    assert "draft 1 of the drafter: logits" in said


def test_a_stage_that_reads_the_wrong_tokens_in_rounds_is_found(stages: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    right = StagedRows.put
    monkeypatch.setattr(StagedRows, "put", lambda self, row, token: right(self, row, (token + 1) % 300))
    report = stages.report()
    assert report.forks
    assert all(fork.where.startswith("a round after") and fork.draft > 1 for fork in report.forks)
    assert report.problems()


# The command


@pytest.mark.parametrize("kind", ["assistant", "stages"])
def test_the_command_says_what_it_compared(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    case: Case = request.getfixturevalue(kind)
    named = (
        "assistant, reads the final state and keys and values of layers 1, 3" if kind == "assistant" else "mtp, reads"
    )
    command = ["parity", case.checkpoint, str(case.bundle), "--drafter", case.drafter, "--prompts", "2"]
    assert run([*command, "--greedy-tokens", "24"]) == 0
    out = capsys.readouterr().out
    assert f"drafter ({named}" in out
    assert "drafts: identical" in out
    assert "acceptance: " in out
