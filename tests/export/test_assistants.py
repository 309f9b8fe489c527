"""Assistants of Gemma 4: their drafts equal those of transformers, the output equals plain decoding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.assistants import CENTROIDS, KEYS, Gemma4Pair, MadePair, rounds_of, shared_keys_and_values
from helpers.chi_square import p_value
from helpers.drafters import Recorded
from helpers.quantized import preset
from shortstack.export.assemble import export_bundle
from shortstack.export.quantized import Quantization, export_quantized
from shortstack.export.spec import ExportSpec
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.precision import BlockFormat
from shortstack.quant.assemble import quantize_bundle
from shortstack.quant.presets import PRESETS
from shortstack.quant.spec import QuantizeSpec
from shortstack.runtime import DraftPolicy, Model, Request, SamplingParams, Speculate, load
from shortstack.runtime.engine.taps import RoundTaps
from shortstack.runtime.inspection.report import build_report
from shortstack.runtime.inspection.words import drafter_facts

PAIRS = {
    "dense": Gemma4Pair(),
    "an untied head": Gemma4Pair(head={"tie_word_embeddings": False}, seed=1),
    "centroids": Gemma4Pair(head=CENTROIDS, seed=2),
    "shared keys and values, centroids": Gemma4Pair(model=shared_keys_and_values(8), head=CENTROIDS, seed=3),
    "values from keys": Gemma4Pair(model=KEYS, assistant=KEYS, seed=4),
    "unified": Gemma4Pair(is_unified=True, seed=5),
}
TOKENS = 40


def prompts(vocab: int = 8) -> list[list[int]]:
    return [np.random.default_rng(seed).integers(0, vocab, 1 + 4 * seed).tolist() for seed in range(4)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadePair:
    """A pair of which some drafts are accepted."""
    return MadePair(Gemma4Pair(seed=1), tmp_path_factory.mktemp("assistant"))


@pytest.fixture(scope="module")
def with_centroids(tmp_path_factory: pytest.TempPathFactory) -> MadePair:
    return MadePair(PAIRS["centroids"], tmp_path_factory.mktemp("centroids"))


@pytest.fixture(scope="module")
def drafted(made: MadePair) -> Iterator[Model]:
    with load(made.bundle) as model:
        yield model


def agree(bundle: Path, pair: Gemma4Pair, most: int = 3) -> tuple[int, int]:
    """Compare all rounds of some prompts with transformers'; return how many there were, and accepted drafts."""
    rounds = accepted = 0
    reference, assistant = pair.made()
    with load(bundle) as model:
        for prompt in prompts(pair.vocab):
            text, wanted = rounds_of(reference, assistant, prompt, TOKENS)
            plain = model.generate(prompt, max_new_tokens=TOKENS, ignore_eos=True)
            source = Recorded()
            strategy = Speculate(draft=DraftPolicy(most), source=source)
            result = model.generate(prompt, strategy=strategy, max_new_tokens=TOKENS, ignore_eos=True)
            assert list(result.tokens) == list(plain.tokens) == text
            assert (
                len(wanted) <= len(source.rounds) <= len(wanted) + 1
            )  # transformers does not draft for one last token
            for (ours, drafts), (theirs, expected) in zip(source.rounds, wanted, strict=False):
                assert ours == theirs
                assert drafts[: len(expected)] == expected
            rounds, accepted = rounds + len(wanted), accepted + result.stats.accepted
    return rounds, accepted


@pytest.mark.parametrize("name", PAIRS)
def test_drafts_are_those_of_transformers_and_change_no_token(tmp_path: Path, name: str) -> None:
    rounds, accepted = agree(MadePair(PAIRS[name], tmp_path).bundle, PAIRS[name])
    assert rounds > 60
    assert 0 < accepted < 2 * rounds


def test_within_a_window_drafts_are_those_of_transformers_where_it_sees_as_many_positions(tmp_path: Path) -> None:
    pair = Gemma4Pair(seed=1, window=8)
    made, (reference, assistant) = MadePair(pair, tmp_path), pair.made()
    compared = 0
    with load(made.bundle) as model:
        for prompt in prompts():
            text, wanted = rounds_of(reference, assistant, prompt, TOKENS)
            source = Recorded()
            strategy = Speculate(draft=DraftPolicy(3), source=source)
            result = model.generate(prompt, strategy=strategy, max_new_tokens=TOKENS, ignore_eos=True)
            assert list(result.tokens) == text
            before = 0
            for (ours, drafts), (_, expected) in zip(source.rounds, wanted, strict=False):
                # After an accepted draft transformers sees one position more.
                if before and len(ours) == before + 1:
                    assert drafts[: len(expected)] == expected
                    compared += 1
                before = len(ours)
    assert compared > 60


def test_a_cut_above_which_nothing_owns_a_cache_still_runs_prompts_below_it_alone(tmp_path: Path) -> None:
    pair = PAIRS["shared keys and values, centroids"]
    folders = pair.write(tmp_path)
    spec = ExportSpec(str(folders[0]), tmp_path / "bundle", (4,), drafter=str(folders[1]))
    bundle = export_bundle(spec).folder
    assert agree(bundle, pair)[0] > 60
    with load(bundle) as model:
        ran = rows_of_prompts(model)
        model.generate([1] * 50, strategy=Speculate(), max_new_tokens=4, ignore_eos=True)
        assert ran == [50, 1]


def rows_of_prompts(model: Model) -> list[int]:
    """Return a list that gets the rows of each segment's run over a prompt."""
    stack, ran = model.exclusive_stack(), list[int]()
    usual = stack._buffers.prompt_rows

    def counted(segment: int, ids: np.ndarray, *given: Any, **named: Any) -> Any:
        ran.append(ids.shape[1])
        return usual(segment, ids, *given, **named)

    stack._buffers.prompt_rows = counted  # type: ignore[method-assign]
    return ran


@pytest.mark.parametrize(("bits", "cache"), [(4, "int8"), (8, "int8"), (4, "float"), (8, "float")])
@pytest.mark.parametrize("kind", ["made", "with_centroids"])
def test_a_quantized_assistant_changes_no_token(
    request: pytest.FixtureRequest, tmp_path: Path, bits: int, cache: str, kind: str
) -> None:
    pair = request.getfixturevalue(kind)
    mix = preset(BlockFormat(bits), cache)  # type: ignore[arg-type]
    small = quantize_bundle(QuantizeSpec(pair.bundle, tmp_path / "small", mix))
    stored = {name for name in small.manifest.precision.weights if name.startswith("drafter.")}
    assert {"drafter.head.weight", "drafter.input.weight", "drafter.output.weight"} <= stored
    drafts = 0
    with load(small.folder) as one, load(small.folder, slots=3) as several:
        plain = [one.generate(prompt, max_new_tokens=TOKENS, ignore_eos=True).tokens for prompt in prompts()]
        for number, prompt in enumerate(prompts()):
            strategy = Speculate(draft=DraftPolicy(1 + number))
            result = one.generate(prompt, strategy=strategy, max_new_tokens=TOKENS, ignore_eos=True)
            assert result.tokens == plain[number]
            drafts += result.stats.drafted
        strategy = Speculate(draft=DraftPolicy(3))
        requests = [Request(p, strategy=strategy, max_new_tokens=TOKENS, ignore_eos=True) for p in prompts()]
        together = several.generate_batch(requests)
        assert [result.tokens for result in together] == plain
        drafts += sum(result.stats.drafted for result in together)
    assert drafts > 300


def test_sequences_side_by_side_draft_as_each_would_alone(made: MadePair, drafted: Model) -> None:
    alone, together = Recorded(), Recorded()
    for prompt in prompts() * 2:
        strategy = Speculate(draft=DraftPolicy(3), source=alone)
        drafted.generate(prompt, strategy=strategy, max_new_tokens=TOKENS, ignore_eos=True)
    with load(made.bundle, slots=3) as model:
        strategy = Speculate(draft=DraftPolicy(3), source=together)
        requests = [Request(p, strategy=strategy, max_new_tokens=TOKENS, ignore_eos=True) for p in prompts() * 2]
        model.generate_batch(requests)
    assert len(alone.rounds) > 200
    assert sorted(together.rounds) == sorted(alone.rounds)


def test_a_text_beyond_the_first_buffers_and_one_that_goes_on_are_drafted_for_as_if_new(drafted: Model) -> None:
    text = np.random.default_rng(5).integers(0, 8, 240).tolist()
    kept, anew = Recorded(), Recorded()
    for source in (kept, anew):
        grown = list(text)
        for turn in range(3):
            strategy = Speculate(draft=DraftPolicy(3), source=source)
            result = drafted.generate(
                grown, strategy=strategy, max_new_tokens=30, ignore_eos=True, reuse_cache=source is kept
            )
            assert (result.stats.reused > 200) == (source is kept and turn > 0)
            assert result.tokens == drafted.generate(grown, max_new_tokens=30, ignore_eos=True, reuse_cache=True).tokens
            grown += [*result.tokens, turn]
    assert len(kept.rounds) > 60
    assert kept.rounds == anew.rounds


def test_drafting_goes_on_after_plain_steps(drafted: Model) -> None:
    fixed, adaptive = Recorded(), Recorded()
    prompt, options = prompts()[1], {"max_new_tokens": 200, "ignore_eos": True}
    wanted = Speculate(draft=DraftPolicy(4, is_adaptive=True), source=adaptive)
    result = drafted.generate(prompt, strategy=wanted, **options)
    assert result.stats.plain > 0  # an adaptive length begins with a plain step
    assert adaptive.rounds
    for text, drafts in adaptive.rounds:
        strategy = Speculate(draft=DraftPolicy(len(drafts)), source=fixed)
        drafted.generate(text[:-1], strategy=strategy, max_new_tokens=8, ignore_eos=True)
        assert (text, drafts) in fixed.rounds


def test_sampled_tokens_have_the_distribution_of_the_model(with_centroids: MadePair) -> None:
    """A head with centroids never drafts some tokens: these must come from the model alone."""
    reference = with_centroids.pair.made()[0]
    prompt, counts, runs = [3, 5], np.zeros((8, 8, 8), int), 1500
    expected = np.zeros((8, 8, 8))

    def after(*text: int) -> np.ndarray:
        with torch.no_grad():
            logits = reference(torch.tensor([[*prompt, *text]]), use_cache=False).logits[0, -1]
        found: np.ndarray = (logits.double() / 1.5).softmax(0).numpy()
        return found

    first = after()
    for a in range(8):
        second = after(a)
        for b in range(8):
            expected[a, b] = first[a] * second[b] * after(a, b)
    with load(with_centroids.bundle) as model:
        strategy, accepted, rejected = Speculate(draft=DraftPolicy(2)), 0, 0
        for seed in range(runs):
            sampling = SamplingParams(temperature=1.5, seed=seed)
            result = model.generate(prompt, strategy=strategy, sampling=sampling, max_new_tokens=3, ignore_eos=True)
            counts[result.tokens] += 1
            accepted, rejected = accepted + result.stats.accepted, rejected + result.stats.rejected
    assert accepted > 200
    assert rejected > 200
    assert p_value(counts.reshape(-1).tolist(), expected.reshape(-1).tolist()) > 1e-3


def test_drafts_that_are_sampled_when_cold_are_the_greedy_ones(with_centroids: MadePair) -> None:
    greedy, cold = Recorded(), Recorded()
    with load(with_centroids.bundle) as model:
        for source, temperature in ((greedy, 0.0), (cold, 1e-3)):
            for prompt in prompts():
                sampling = SamplingParams(temperature=temperature, seed=1 if temperature else None)
                strategy = Speculate(draft=DraftPolicy(3), source=source)
                model.generate(prompt, strategy=strategy, sampling=sampling, max_new_tokens=TOKENS, ignore_eos=True)
    assert len({token for _, drafts in greedy.rounds for token in drafts}) > 4
    assert cold.rounds == greedy.rounds


def test_of_a_long_prompt_the_end_alone_is_kept(drafted: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, take_prompt = list[list[int]](), RoundTaps.take_prompt

    def counted(self: RoundTaps) -> list[tuple[int, dict[str, np.ndarray]]]:
        found = take_prompt(self)
        kept.append([past for past, _ in found])
        return found

    monkeypatch.setattr(RoundTaps, "take_prompt", counted)
    drafted.generate([1, 2] * 300, strategy=Speculate(draft=DraftPolicy(2)), max_new_tokens=4, ignore_eos=True)
    assert [512] in kept
    assert max(map(len, kept)) == 1


def test_export_with_a_preset_gives_what_quantize_gives(with_centroids: MadePair, tmp_path: Path) -> None:
    small = preset(BlockFormat(4), "float")
    spec = ExportSpec(str(with_centroids.model), tmp_path / "straight", drafter=str(with_centroids.assistant))
    quantized = quantize_bundle(QuantizeSpec(with_centroids.bundle, tmp_path / "quantized", small))
    straight = export_quantized(spec, Quantization(small))
    assert straight.manifest.weights_sha256 == quantized.manifest.weights_sha256
    assert straight.manifest.plan.drafter == quantized.manifest.plan.drafter


def test_the_preset_int4_whose_blocks_have_offsets_drafts_with_centroids(tmp_path: Path) -> None:
    wide = Gemma4Pair(assistant={"hidden_size": 32}, head=CENTROIDS)  # a block wide: fewer columns have no offsets
    model_folder, assistant = wide.write(tmp_path)
    spec = ExportSpec(str(model_folder), tmp_path / "small", drafter=str(assistant))
    small = export_quantized(spec, Quantization(replace(PRESETS["int4"], method="rtn", kv_cache="float")))
    stored = small.manifest.precision.weights["drafter.centroids.weight"]
    assert stored.has_offsets
    with load(small.folder) as model:
        plain = model.generate([1, 2, 3], max_new_tokens=TOKENS, ignore_eos=True).tokens
        strategy = Speculate(draft=DraftPolicy(3))
        result = model.generate([1, 2, 3], strategy=strategy, max_new_tokens=TOKENS, ignore_eos=True)
    assert result.tokens == plain
    assert result.stats.drafted > 0


def test_inspect_says_what_it_reads_and_computes(with_centroids: MadePair) -> None:
    ((_, words),) = drafter_facts(build_report(open_bundle(with_centroids.bundle)))
    assert "assistant · 4 layers, hidden 16" in words
    assert "keys and values of layers 4, 5" in words
    assert "drafts 4 of 8 tokens" in words
    assert "no cache of its own" in words
