"""Several layers for multi-token prediction: their drafts equal transformers', the output that of plain decoding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from helpers.drafters import Recorded
from helpers.gguf_cases import CASES
from helpers.mtp import HIDDEN, LAYERS, TinyMtp, as_mimo, change, recomputed, reference, reference_rounds
from helpers.quantized import preset
from shortstack.export.arch import resolve
from shortstack.export.assemble import export_bundle
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.drafters import ModelOfDrafter
from shortstack.export.drafters.mtp import read_mtp
from shortstack.export.kept_blocks import KeptBlocks
from shortstack.export.quantized import export_quantized
from shortstack.export.spec import OWN_DRAFTER, ExportSpec
from shortstack.export.tensors import ModelTensors
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.errors import CheckpointError, UnsupportedError
from shortstack.graphs.precision import BlockFormat
from shortstack.quant.assemble import quantize_bundle
from shortstack.quant.spec import Quantization, QuantizeSpec
from shortstack.runtime import DraftPolicy, Model, Request, SamplingParams, Speculate, load
from shortstack.runtime.decode.choice import Choice
from shortstack.runtime.decode.draft_length import DraftLength
from shortstack.runtime.decode.drafters import Draft
from shortstack.runtime.decode.runs import Asking
from shortstack.runtime.decode.trained_drafter import TrainedDrafter
from shortstack.runtime.engine.decoder import State
from shortstack.runtime.inspection.report import build_report
from shortstack.runtime.inspection.words import drafter_facts

TOKENS = 60


class InTurns(TrainedDrafter):
    """Asks for one draft in most rounds, and now and then for several."""

    rounds = 0

    def draft(self, past: int, tokens: Sequence[int], most: int, least_confidence: float) -> Asking[Draft]:
        self.rounds += 1
        return super().draft(past, tokens, most if self.rounds % 30 > 26 else 1, least_confidence)


@dataclass(frozen=True)
class Mostly1(Recorded):
    def drafter(self, stack: State, choice: Choice) -> TrainedDrafter:
        inner, rounds = InTurns(stack, choice), self.rounds

        class Recording(TrainedDrafter):
            def draft(self, past: int, tokens: Sequence[int], most: int, least_confidence: float) -> Asking[Draft]:
                text = list(tokens)
                draft = yield from inner.draft(past, tokens, most, least_confidence)
                rounds.append((text, [proposal.token for proposal in draft.proposals]))
                return draft

        return Recording(stack, choice)


@dataclass(frozen=True)
class Drafted:
    checkpoint: Path
    bundle: Path
    model: PreTrainedModel


def exported(checkpoint: Path, out: Path) -> Path:
    return export_bundle(ExportSpec(str(checkpoint), out, drafter=OWN_DRAFTER)).folder


@pytest.fixture(scope="module", params=[1, 2, 3])
def drafted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drafted]:
    folder = tmp_path_factory.mktemp("mtp")
    checkpoint = TinyMtp(request.param).write(folder / "model")
    with reference(checkpoint) as model:
        yield Drafted(checkpoint, exported(checkpoint, folder / "bundle"), model)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drafted]:
    folder = tmp_path_factory.mktemp("three")
    checkpoint = TinyMtp(3).write(folder / "model")
    with reference(checkpoint) as model:
        yield Drafted(checkpoint, exported(checkpoint, folder / "bundle"), model)


def prompt(seed: int, length: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, 300, length)]


def speculate(
    model: Model, text: list[int], source: Recorded, policy: DraftPolicy, tokens: int = TOKENS
) -> tuple[list[int], int, int]:
    result = model.generate(
        text, strategy=Speculate(draft=policy, source=source), max_new_tokens=tokens, ignore_eos=True
    )
    assert result.stats.is_balanced
    return list(result.tokens), result.stats.drafted, result.stats.accepted


def plainly(model: Model, text: list[int], tokens: int = TOKENS) -> list[int]:
    return list(model.generate(text, max_new_tokens=tokens, ignore_eos=True).tokens)


def assert_recomputed(reference_model: PreTrainedModel, source: Recorded) -> None:
    for text, drafts in source.rounds:
        assert drafts == recomputed(reference_model, text)[: len(drafts)]


def test_drafts_are_those_of_transformers_after_accepts_and_rejections(drafted: Drafted) -> None:
    count, compared, made, taken = drafted.model.config.num_mtp_layers, 0, 0, 0
    with load(drafted.bundle) as model:
        for seed in range(12):
            text = prompt(seed, 5 + 4 * seed)
            emitted, rounds = reference_rounds(drafted.model, text, TOKENS)
            source = Recorded()
            tokens, some, accepted = speculate(model, text, source, DraftPolicy(count))
            assert tokens == plainly(model, text) == emitted
            for before, drafts in source.rounds:
                if tuple(before) in rounds:  # at the end of a text, we draft fewer
                    assert drafts == rounds[tuple(before)][: len(drafts)]
                    compared += 1
            made, taken = made + some, taken + accepted
    assert compared >= 300
    assert 0.1 * made < taken < 0.9 * made


def test_short_texts_draft_what_they_should(three: Drafted) -> None:
    source = Recorded()
    with load(three.bundle) as model:
        for seed in range(12):
            text = prompt(seed, 1 + seed % 4)
            assert speculate(model, text, source, DraftPolicy(3), 12)[0] == plainly(model, text, 12)
    assert_recomputed(three.model, source)


def test_layers_that_a_round_does_not_ask_for_catch_up(three: Drafted) -> None:
    source, lengths = Recorded(), set[int]()
    with load(three.bundle) as model:
        sizes = [DraftPolicy(3, confidence=least) for least in (0.2, 0.4, 0.7)]
        for seed, policy in enumerate(sizes):
            text = prompt(seed, 9)
            assert speculate(model, text, source, policy, 150)[0] == plainly(model, text, 150)
        lengths = {len(drafts) for _, drafts in source.rounds}
        for policy in (DraftPolicy(1), DraftPolicy(4, is_adaptive=True)):
            text = prompt(7, 400)  # longer than a chunk
            assert speculate(model, text, source, policy)[0] == plainly(model, text)
    assert lengths == {1, 2, 3}
    assert_recomputed(three.model, source)


def test_layers_that_many_rounds_did_not_ask_for_catch_up(three: Drafted) -> None:
    source = Mostly1()
    with load(three.bundle) as model:
        for seed in range(3):
            text = prompt(seed, 9)
            assert speculate(model, text, source, DraftPolicy(3), 150)[0] == plainly(model, text, 150)
    assert sum(len(drafts) == 3 for _, drafts in source.rounds) > 20
    for text, drafts in source.rounds:
        if len(drafts) == 3:
            assert drafts == recomputed(three.model, text)


def test_a_text_that_turns_elsewhere_keeps_only_what_is_true(three: Drafted) -> None:
    source = Recorded()
    strategy = Speculate(draft=DraftPolicy(3), source=source)
    options = {"max_new_tokens": 6, "ignore_eos": True, "reuse_cache": True}
    with load(three.bundle) as model:
        for seed in range(20):
            text = prompt(seed, 8)
            for turned in (text, [*text[:5], *prompt(seed + 100, 1)]):
                model.generate(turned, strategy=strategy, **options)
    assert_recomputed(three.model, source)


def test_a_text_that_goes_on_reuses_what_the_layers_have_seen(three: Drafted) -> None:
    source, rng = Recorded(), np.random.default_rng(3)
    text, options = prompt(5, 20), {"max_new_tokens": 12, "ignore_eos": True, "reuse_cache": True}
    with load(three.bundle) as model:
        for turn in range(6):
            strategy = Speculate(draft=DraftPolicy(1 + turn % 4), source=source)
            if turn % 3 == 2:  # decoded plainly, so the layers miss it
                result = model.generate(text, **options)
            else:
                result = model.generate(text, strategy=strategy, **options)
                assert turn == 0 or result.stats.reused > 0
            assert list(result.tokens) == plainly(model, text, 12)
            text = [*text[: len(text) - turn], *result.tokens, *rng.integers(3, 300, 2 * turn).tolist()]
    assert len(source.rounds) > 20
    assert_recomputed(three.model, source)


def test_sequences_side_by_side_draft_what_they_should(three: Drafted) -> None:
    source, texts = Recorded(), [prompt(seed, 3 + 7 * seed) for seed in range(6)]
    strategy = Speculate(draft=DraftPolicy(3), source=source)
    with load(three.bundle, slots=3) as model:
        requests = [Request(text, strategy=strategy, max_new_tokens=30, ignore_eos=True) for text in texts]
        together = model.generate_batch(requests)
        assert [list(result.tokens) for result in together] == [plainly(model, text, 30) for text in texts]
    assert len(source.rounds) > 50
    assert_recomputed(three.model, source)


@pytest.mark.parametrize(("bits", "cache"), [(4, "int8"), (8, "int8"), (4, "float")])
def test_quantized_layers_change_no_token(three: Drafted, tmp_path: Path, bits: int, cache: str) -> None:
    small = quantize_bundle(QuantizeSpec(three.bundle, tmp_path / "small", preset(BlockFormat(bits), cache)))
    stored = {name for name in small.manifest.precision.weights if name.startswith("drafter.")}
    assert {"drafter.input.weight", "drafter.stages.2.input.weight", "drafter.layers.1.attn.o_proj.weight"} <= stored
    texts, accepted = [prompt(seed, 2 + 11 * seed) for seed in range(4)], 0
    with load(small.folder) as one, load(small.folder, slots=3) as several:
        plain = [plainly(one, text) for text in texts]
        for text, wanted in zip(texts, plain, strict=True):
            tokens, _, taken = speculate(one, text, Recorded(), DraftPolicy(3))
            assert tokens == wanted
            accepted += taken
        strategy = Speculate(draft=DraftPolicy(3))
        requests = [Request(text, strategy=strategy, max_new_tokens=TOKENS, ignore_eos=True) for text in texts]
        assert [list(result.tokens) for result in several.generate_batch(requests)] == plain
    assert accepted > 0


def test_export_with_a_preset_gives_what_quantize_gives(three: Drafted, tmp_path: Path) -> None:
    small = preset(BlockFormat(4), "float")
    quantized = quantize_bundle(QuantizeSpec(three.bundle, tmp_path / "quantized", small))
    spec = ExportSpec(str(three.checkpoint), tmp_path / "straight", drafter=OWN_DRAFTER)
    straight = export_quantized(spec, Quantization(small))
    assert straight.manifest.weights_sha256 == quantized.manifest.weights_sha256
    assert straight.manifest.plan.drafter == quantized.manifest.plan.drafter


def test_a_round_drafts_no_more_than_there_are_layers(three: Drafted, monkeypatch: pytest.MonkeyPatch) -> None:
    source, wanted, choose = Recorded(), list[int](), DraftLength.choose

    def chosen(self: DraftLength, max_rows: int, tokens: Sequence[int]) -> int:
        wanted.append(choose(self, max_rows, tokens))
        return wanted[-1]

    monkeypatch.setattr(DraftLength, "choose", chosen)
    with load(three.bundle) as model:
        for adaptive in (False, True):
            speculate(model, prompt(1, 9), source, DraftPolicy(7, is_adaptive=adaptive))
    assert max(len(drafts) for _, drafts in source.rounds) == max(wanted) == 3


def test_sampled_drafts_are_repeatable(three: Drafted) -> None:
    sampling = SamplingParams(temperature=1.0, seed=5)
    with load(three.bundle) as model:
        results = [
            model.generate(prompt(1, 9), strategy=Speculate(), sampling=sampling, max_new_tokens=40, ignore_eos=True)
            for _ in range(2)
        ]
    assert results[0].tokens == results[1].tokens
    assert results[0].stats.drafted > 0


def test_the_names_of_mimo_mean_the_same(three: Drafted, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(three.checkpoint, tmp_path / "mimo"))
    as_mimo(checkpoint)
    source = Recorded()
    with load(exported(checkpoint, tmp_path / "b")) as model:
        for seed in range(2):
            speculate(model, prompt(seed, 9), source, DraftPolicy(3))
    assert_recomputed(three.model, source)


def test_copies_of_the_embedding_and_head_are_stored_only_where_they_differ(tmp_path: Path) -> None:
    checkpoint = TinyMtp(2, is_tied=True).write(tmp_path / "model")
    found = load_file(checkpoint / "model.safetensors")
    table = found["model.embed_tokens.weight"]
    own = {"embed_tokens": table.clone(), "shared_head.head": table.clone()}
    copies = {f"model.layers.{LAYERS + i}.{name}.weight": value for i in range(2) for name, value in own.items()}
    without = export_bundle(ExportSpec(str(checkpoint), tmp_path / "without", drafter=OWN_DRAFTER))
    change(checkpoint, copies)
    same = export_bundle(ExportSpec(str(checkpoint), tmp_path / "same", drafter=OWN_DRAFTER))
    assert same.manifest.weights_sha256 == without.manifest.weights_sha256
    shifted = {"embed_tokens": table.roll(1, 0), "shared_head.head": table.flip(0)}
    change(checkpoint, {f"model.layers.{LAYERS + i}.{name}.weight": v for i in range(2) for name, v in shifted.items()})
    source = Recorded()
    with reference(checkpoint) as model, load(exported(checkpoint, tmp_path / "other")) as loaded:
        for seed in range(2):
            text = prompt(seed, 9)
            assert speculate(loaded, text, source, DraftPolicy(2))[0] == plainly(loaded, text)
        for before, drafts in source.rounds:
            own_drafts = recomputed(model, before, shifted["embed_tokens"], shifted["shared_head.head"])
            assert drafts == own_drafts[: len(drafts)]


def test_all_tensors_that_are_missing_are_named_at_once(three: Drafted, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(three.checkpoint, tmp_path / "model"))
    missing = [f"model.layers.{LAYERS}.enorm.weight", f"model.layers.{LAYERS + 1}.eh_proj.weight"]
    missing.append(f"model.layers.{LAYERS + 1}.self_attn.q_proj.bias")
    missing += [n for n in load_file(checkpoint / "model.safetensors") if n.startswith(f"model.layers.{LAYERS + 2}.")]
    change(checkpoint, dict.fromkeys(missing))
    with pytest.raises(CheckpointError) as error:
        exported(checkpoint, tmp_path / "b")
    assert [name for name in missing if name not in str(error.value)] == []
    assert not (tmp_path / "b").exists()


def test_layers_of_other_kinds_and_numbers_are_refused(three: Drafted, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(three.checkpoint, tmp_path / "model"))
    config = checkpoint / "config.json"
    config.write_text(config.read_text().replace('"num_mtp_layers": 3', '"num_mtp_layers": 2000000000'))
    with pytest.raises(UnsupportedError, match=r"found 2000000000, expected at most 15"):
        exported(checkpoint, tmp_path / "b")
    narrow = {f"model.layers.{LAYERS}.eh_proj.weight": torch.zeros(HIDDEN, HIDDEN)}
    config.write_text(config.read_text().replace("2000000000", "1"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.eh_proj\.weight is \[32, 32\], not \[32, 64\]"):
        exported(change(checkpoint, narrow), tmp_path / "b")


def test_layers_of_hybrid_models_are_refused_with_the_reason(three: Drafted, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(three.checkpoint, tmp_path / "model"))
    config = checkpoint / "config.json"
    config.write_text(config.read_text().replace('"model_type": "qwen2"', '"model_type": "qwen3_5_text"'))
    with pytest.raises(UnsupportedError, match="recurrent layers"):
        exported(checkpoint, tmp_path / "b")


def test_inspect_says_how_many_layers_draft(three: Drafted) -> None:
    said = dict(drafter_facts(build_report(open_bundle(three.bundle))))["drafter"]
    assert "3 layers for multi-token prediction, one for each draft" in said


@pytest.mark.parametrize("name", ["glm4", "ernie4_5", "qwen3"])
def test_such_a_layer_is_read_as_its_family_reads_the_models_own(tmp_path: Path, name: str) -> None:
    folder = next(case for case in CASES if case.name == name).save(tmp_path / "model")
    found, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    last, hidden = config["num_hidden_layers"] - 1, config["hidden_size"]
    copied = {n.replace(f".{last}.", f".{last + 1}."): v for n, v in found.items() if f"layers.{last}." in n}
    norms = dict.fromkeys(("enorm", "hnorm", "shared_head.norm"), torch.ones(hidden))
    own = {**norms, "eh_proj": torch.ones(hidden, 2 * hidden)}
    change(folder, {**copied, **{f"model.layers.{last + 1}.{n}.weight": v for n, v in own.items()}})
    checkpoint = open_checkpoint(str(folder))
    arch, spec = resolve(checkpoint)
    drafter = read_mtp(ModelOfDrafter(checkpoint, spec, arch))
    for role, value in ModelTensors(checkpoint, arch, spec, KeptBlocks()).layer_roles(last).items():
        assert np.array_equal(drafter.role(0, role), value)
