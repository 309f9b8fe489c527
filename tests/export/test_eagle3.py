"""EAGLE-3 heads: their drafts equal the paper's formula computed anew, and the output that of plain decoding."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from helpers.drafter_cases import HEADS
from helpers.drafters import Eagle3, Recorded, Rows, residual_streams
from helpers.quantized import preset
from helpers.tiny_models import TinyBundles, TinyModel
from shortstack.export.assemble import export_bundle
from shortstack.export.quantized import export_quantized
from shortstack.export.spec import ExportSpec
from shortstack.graphs.errors import BundleError, CheckpointError, RequestError, UnsupportedError
from shortstack.graphs.precision import BlockFormat
from shortstack.quant.assemble import quantize_bundle
from shortstack.quant.spec import Quantization, QuantizeSpec
from shortstack.runtime import DraftPolicy, Model, Request, SamplingParams, Speculate, load
from shortstack.runtime.decode.draft_length import DraftLength
from shortstack.runtime.decode.trained_drafter import FromDrafter
from shortstack.runtime.engine.drafter_rows import DrafterRows

TARGET = TinyModel("drafted for")
TOKENS = 40


@dataclass(frozen=True)
class Target:
    folder: Path
    model: PreTrainedModel

    def drafts(self, head: Eagle3, weights: Rows, tokens: list[int], count: int) -> list[int]:
        embedding = self.model.model.embed_tokens.weight.detach()
        return head.drafts(weights, residual_streams(self.model, tokens), tokens, count, embedding)


@pytest.fixture(scope="module")
def target(tiny_bundles: TinyBundles) -> Target:
    folder = tiny_bundles.checkpoint(TARGET)
    return Target(folder, AutoModelForCausalLM.from_pretrained(folder).eval())


@pytest.fixture(scope="module")
def fitted(target: Target, tmp_path_factory: pytest.TempPathFactory) -> tuple[Eagle3, Rows, Path]:
    """A head that was trained on the model's own answers to the tests' prompts, and its bundle."""
    head, folder = Eagle3(draft_vocab=200), tmp_path_factory.mktemp("fitted")
    plain = export_bundle(ExportSpec(str(target.folder), folder / "plain"))
    with load(plain.folder) as model:
        texts = [
            prompt + list(model.generate(prompt, max_new_tokens=TOKENS, ignore_eos=True).tokens) for prompt in prompts()
        ]
    embedding = target.model.model.embed_tokens.weight.detach()
    weights = head.fitted(texts, [residual_streams(target.model, text) for text in texts], embedding)
    drafter = head.write(folder / "head", weights)
    return head, weights, export_bundle(ExportSpec(str(target.folder), folder / "bundle", drafter=str(drafter))).folder


@pytest.fixture(scope="module")
def drafted(fitted: tuple[Eagle3, Rows, Path]) -> Iterator[Model]:
    with load(fitted[2]) as model:
        yield model


def prompts() -> list[list[int]]:
    return [np.random.default_rng(seed).integers(3, 300, 1 + 9 * seed).tolist() for seed in range(5)]


def speculate(model: Model, prompt: list[int], source: Recorded, most: int) -> tuple[tuple[int, ...], int, int]:
    strategy = Speculate(draft=DraftPolicy(most), source=source)
    result = model.generate(prompt, strategy=strategy, max_new_tokens=TOKENS, ignore_eos=True)
    assert result.stats.is_balanced
    return result.tokens, result.stats.drafted, result.stats.accepted


@pytest.mark.parametrize("name", HEADS)
def test_an_untrained_head_drafts_what_its_formula_says_and_changes_no_token(
    target: Target, tmp_path: Path, name: str
) -> None:
    head = HEADS[name]
    bundle = export_bundle(ExportSpec(str(target.folder), tmp_path / "b", drafter=str(head.write(tmp_path / "d"))))
    source, weights = Recorded(), head.tensors()
    with load(bundle.folder) as model:
        for number, prompt in enumerate(prompts()):
            plain = model.generate(prompt, max_new_tokens=TOKENS, ignore_eos=True).tokens
            assert speculate(model, prompt, source, 1 + number)[0] == plain
    assert len(source.rounds) > 100
    for tokens, drafts in source.rounds:
        assert drafts == target.drafts(head, weights, tokens, len(drafts))


def test_a_trained_head_drafts_what_its_formula_says_after_accepts_and_rejections(
    target: Target, fitted: tuple[Eagle3, Rows, Path], drafted: Model
) -> None:
    head, weights, _ = fitted
    source, drafted_count, accepted_count = Recorded(), 0, 0
    for most in (1, 2, 4, 7):
        for prompt in prompts():
            plain = drafted.generate(prompt, max_new_tokens=TOKENS, ignore_eos=True).tokens
            tokens, count, accepted = speculate(drafted, prompt, source, most)
            assert tokens == plain
            drafted_count, accepted_count = drafted_count + count, accepted_count + accepted
    assert 0.2 * drafted_count < accepted_count < 0.95 * drafted_count
    assert len(source.rounds) > 300
    for tokens, drafts in source.rounds:
        assert drafts == target.drafts(head, weights, tokens, len(drafts))


def test_a_text_that_goes_on_reuses_what_the_drafter_has_seen(
    target: Target, fitted: tuple[Eagle3, Rows, Path], drafted: Model
) -> None:
    head, weights, _ = fitted
    source, rng = Recorded(), np.random.default_rng(3)
    text = prompts()[2]
    for turn in range(6):
        strategy = Speculate(draft=DraftPolicy(3), source=source)
        own = None if turn % 3 == 2 else strategy  # every third turn is decoded plainly, so the drafter misses it
        options = {"max_new_tokens": 12, "ignore_eos": True, "reuse_cache": True}
        result = drafted.generate(text, **options) if own is None else drafted.generate(text, strategy=own, **options)
        assert own is None or turn == 0 or result.stats.reused > 0
        assert result.tokens == drafted.generate(text, max_new_tokens=12, ignore_eos=True).tokens
        text = [*text[: len(text) - turn], *result.tokens, *rng.integers(3, 300, 2 * turn).tolist()]
    for tokens, drafts in source.rounds:
        assert drafts == target.drafts(head, weights, tokens, len(drafts))


def test_a_prompt_is_no_cost_of_a_draft(drafted: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, ran, seen = np.random.default_rng(9).integers(3, 300, 600).tolist(), [0], list[tuple[float | None, float]]()
    run_pairs, observe_round = DrafterRows._run_pairs, DraftLength.observe_round

    def counted(self: DrafterRows, ids: np.ndarray, *given: Any) -> None:
        ran[0] += len(ids)  # the clock below counts the rows that the drafter runs from the model's states
        run_pairs(self, ids, *given)

    def observed(self: DraftLength, drafts: int, accepted: int, rows: int, draft_s: float, *given: Any) -> None:
        seen.append((given[-1], draft_s))
        observe_round(self, drafts, accepted, rows, draft_s, *given)

    monkeypatch.setattr(DrafterRows, "_run_pairs", counted)
    monkeypatch.setattr(DraftLength, "observe_round", observed)
    stack = drafted.exclusive_stack()
    monkeypatch.setattr(stack, "clock", lambda: float(ran[0]))
    strategy = Speculate(draft=DraftPolicy(3), source=FromDrafter())
    drafted.generate(prompt, strategy=strategy, max_new_tokens=20, ignore_eos=True)
    assert ran[0] > 600
    assert len(seen) > 3
    assert all(first_s == draft_s <= 17 for first_s, draft_s in seen)


def test_drafting_goes_on_after_plain_steps(target: Target, fitted: tuple[Eagle3, Rows, Path], drafted: Model) -> None:
    head, weights, _ = fitted
    source = Recorded()
    adaptive = Speculate(draft=DraftPolicy(4, is_adaptive=True), source=source)
    plain = drafted.generate(prompts()[1], max_new_tokens=200, ignore_eos=True).tokens
    result = drafted.generate(prompts()[1], strategy=adaptive, max_new_tokens=200, ignore_eos=True)
    assert result.tokens == plain
    assert result.stats.plain > 0  # an adaptive length begins with a plain step
    assert source.rounds
    for tokens, drafts in source.rounds:
        assert drafts == target.drafts(head, weights, tokens, len(drafts))


@pytest.mark.parametrize(("bits", "cache"), [(4, "int8"), (8, "int8"), (4, "float")])
def test_a_quantized_drafter_changes_no_token(
    fitted: tuple[Eagle3, Rows, Path], tmp_path: Path, bits: int, cache: str
) -> None:
    small = quantize_bundle(QuantizeSpec(fitted[2], tmp_path / "small", preset(BlockFormat(bits), cache)))
    assert {name for name in small.manifest.precision.weights if name.startswith("drafter.")}
    accepted = 0
    with load(small.folder) as one, load(small.folder, slots=3) as several:
        plain = [one.generate(prompt, max_new_tokens=TOKENS, ignore_eos=True).tokens for prompt in prompts()]
        for number, prompt in enumerate(prompts()):
            tokens, _, taken = speculate(one, prompt, Recorded(), 1 + number)
            assert tokens == plain[number]
            accepted += taken
        wanted = Speculate(draft=DraftPolicy(3))
        requests = [Request(p, strategy=wanted, max_new_tokens=TOKENS, ignore_eos=True) for p in prompts()]
        together = several.generate_batch(requests)
        assert [result.tokens for result in together] == plain
        assert sum(result.stats.drafted for result in together) > 0
    assert accepted > 0 or bits == 4  # of this small model, 4 bits leave other texts than those of the training


def test_export_with_a_preset_gives_what_quantize_gives(target: Target, tmp_path: Path) -> None:
    drafter = str(Eagle3(hidden=48, has_embedding=True, theta=500.0, features=(2, 4)).write(tmp_path / "d"))
    small = preset(BlockFormat(4), "float")
    whole = export_bundle(ExportSpec(str(target.folder), tmp_path / "whole", drafter=drafter))
    quantized = quantize_bundle(QuantizeSpec(whole.folder, tmp_path / "quantized", small))
    straight = export_quantized(
        ExportSpec(str(target.folder), tmp_path / "straight", drafter=drafter), Quantization(small)
    )
    assert straight.manifest.weights_sha256 == quantized.manifest.weights_sha256
    assert straight.manifest.plan.drafter == quantized.manifest.plan.drafter == whole.manifest.plan.drafter


def test_sequences_side_by_side_draft_what_their_formula_says(
    target: Target, fitted: tuple[Eagle3, Rows, Path]
) -> None:
    head, weights, folder = fitted
    source = Recorded()
    with load(folder, slots=3) as model:
        strategy = Speculate(draft=DraftPolicy(3), source=source)
        requests = [Request(p, strategy=strategy, max_new_tokens=TOKENS, ignore_eos=True) for p in prompts() * 2]
        model.generate_batch(requests)
    assert len(source.rounds) > 100
    for tokens, drafts in source.rounds:
        assert drafts == target.drafts(head, weights, tokens, len(drafts))


def test_sampled_drafts_are_repeatable(drafted: Model) -> None:
    sampling = SamplingParams(temperature=1.0, seed=5)
    results = [
        drafted.generate(prompts()[1], strategy=Speculate(), sampling=sampling, max_new_tokens=TOKENS, ignore_eos=True)
        for _ in range(2)
    ]
    assert results[0].tokens == results[1].tokens
    assert results[0].stats.accepted > 0


def test_the_bundle_with_a_drafter_and_exits_lets_either_draft(target: Target, tmp_path: Path) -> None:
    drafter = Eagle3().write(tmp_path / "d")
    spec = ExportSpec(str(target.folder), tmp_path / "b", (2,), drafter=str(drafter))
    with load(export_bundle(spec).folder) as model:
        prompt = prompts()[1]
        plain = model.generate(prompt, max_new_tokens=TOKENS, ignore_eos=True)
        fixed: dict[str, Any] = {"draft": DraftPolicy(4), "max_new_tokens": TOKENS, "ignore_eos": True}
        by_drafter, by_exit = model.generate(prompt, **fixed), model.generate(prompt, exit_layer=2, **fixed)
    assert by_drafter.tokens == by_exit.tokens == plain.tokens
    assert by_exit.stats.accepted > by_drafter.stats.accepted


def test_what_does_not_fit_is_said_at_once(target: Target, tmp_path: Path) -> None:
    def refused(head: Eagle3, name: str, weights: Rows | None = None) -> str:
        folder = head.write(tmp_path / name, weights)
        with pytest.raises(CheckpointError) as error:
            export_bundle(ExportSpec(str(target.folder), tmp_path / "out", drafter=str(folder)))
        assert not (tmp_path / "out").exists()
        return str(error.value)

    whole = Eagle3().tensors()
    missing = {name: value for name, value in whole.items() if "o_proj" not in name and name != "norm.weight"}
    said = refused(Eagle3(), "missing", missing)
    assert "midlayer.self_attn.o_proj.weight" in said
    assert "norm.weight" in said
    assert "fc.weight" in refused(Eagle3(target_hidden=48), "other model")
    assert "token id" in refused(Eagle3(vocab=400, draft_vocab=350), "other vocabulary")
    assert "does not draft for" in refused(Eagle3(hidden=48), "narrow")
    assert "depths that do not exist" in refused(Eagle3(features=(2, 9)), "deep")
    twice = {**whole, "d2t": whole["d2t"] - whole["d2t"]}
    twice["d2t"][1] -= 1
    assert "twice" in refused(Eagle3(), "twice", twice)
    fractions = {**whole, "d2t": whole["d2t"].float()}
    assert "whole numbers" in refused(Eagle3(), "fractions", fractions)
    assert "fc.weight" in refused(replace(Eagle3()), "nothing", {"x.weight": whole["norm.weight"]})
    for name in ("fc.weight", "lm_head.weight", "midlayer.self_attn.q_proj.weight"):
        assert f"{name}: found shape []" in refused(Eagle3(), f"no matrix {name}", {**whole, name: torch.tensor(1.0)})
    lonely = {**whole, "lm_head.weight": whole["lm_head.weight"][:1], "d2t": whole["d2t"][:1]}
    assert "lm_head.weight: found 1 rows" in refused(Eagle3(), "one row", lonely)


def test_a_pickle_is_read_only_where_that_is_allowed(target: Target, tmp_path: Path) -> None:
    head, folder = Eagle3(), Eagle3().write(tmp_path / "d")
    whole = export_bundle(ExportSpec(str(target.folder), tmp_path / "whole", drafter=str(folder)))
    (folder / "model.safetensors").unlink()
    torch.save(head.tensors(), folder / "pytorch_model.bin")
    spec = ExportSpec(str(target.folder), tmp_path / "out", drafter=str(folder))
    with pytest.raises(CheckpointError, match="allow-pickle"):
        export_bundle(spec)
    assert not (tmp_path / "out").exists()
    allowed = export_bundle(replace(spec, allow_pickle=True))
    assert allowed.manifest.weights_sha256 == whole.manifest.weights_sha256
    unsafe = {**head.tensors(), "fc.weight": Unpickled()}
    torch.save(unsafe, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        export_bundle(replace(spec, out=tmp_path / "unsafe", allow_pickle=True))
    assert not Unpickled.was_called


class Unpickled:
    """Runs code where a pickle is read without care."""

    was_called = False

    def __reduce__(self) -> tuple[object, tuple[()]]:
        return Unpickled.call, ()

    @staticmethod
    def call() -> None:
        Unpickled.was_called = True


def test_a_number_of_drafts_that_no_head_has_is_refused_before_anything_is_written(
    target: Target, tmp_path: Path
) -> None:
    methods = {"proposal_methods": [{"speculative_tokens": 2**31}]}
    head = Eagle3(options={"speculators_config": methods}).write(tmp_path / "d")
    with pytest.raises(UnsupportedError, match=r"config.json: speculative_tokens: found 2147483648, expected 1..1000"):
        export_bundle(ExportSpec(str(target.folder), tmp_path / "out", drafter=str(head)))


def test_asking_an_exit_to_draft_where_only_a_drafter_can_says_so(drafted: Model) -> None:
    with pytest.raises(RequestError, match="this bundle has none: found 2"):
        drafted.generate([5], exit_layer=2)


def test_a_damaged_drafter_is_said_before_the_first_token(fitted: tuple[Eagle3, Rows, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fitted[2], tmp_path / "b"))
    file = folder / "drafter.onnx"
    file.write_bytes(b"\xff" * file.stat().st_size)
    with load(folder) as model:
        assert model.generate([5], max_new_tokens=2, ignore_eos=True).tokens
        with pytest.raises(BundleError, match=r"drafter.onnx cannot be loaded"):
            next(model.stream([5], strategy="self-speculative", max_new_tokens=9))
        with pytest.raises(BundleError, match=r"drafter.onnx cannot be loaded"):
            model.generate([5], strategy="self-speculative", max_new_tokens=1)
