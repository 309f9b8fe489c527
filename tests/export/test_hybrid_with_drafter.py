"""A trained drafter beside lookup: it learns of the rounds that it did not draft."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from helpers.drafters import Eagle3, residual_streams
from helpers.tiny_models import TinyBundles, TinyModel
from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec
from shortstack.runtime import Speculate, TextIndex, load
from shortstack.runtime.decode.drafters import Draft
from shortstack.runtime.decode.hybrid import FromHybrid, HybridDrafter, Plan
from shortstack.runtime.decode.runs import Asking
from shortstack.runtime.decode.trained_drafter import TrainedDrafter

TARGET = TinyModel("drafted for")
TOKENS = 40


def prompts() -> list[list[int]]:
    return [np.random.default_rng(seed).integers(3, 300, 1 + 9 * seed).tolist() for seed in range(5)]


def test_the_drafter_learns_of_rounds_that_were_looked_up_and_drafts_on_as_its_formula_says(
    tiny_bundles: TinyBundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds of lookup, of the drafter, of both kinds of probe and plain steps, in any order."""
    folder, head = tiny_bundles.checkpoint(TARGET), Eagle3()
    target = AutoModelForCausalLM.from_pretrained(folder).eval()
    embedding = target.model.embed_tokens.weight.detach()
    path = head.write(tmp_path / "head")
    bundle = export_bundle(ExportSpec(str(folder), tmp_path / "bundle", drafter=str(path))).folder
    rng, rounds = random.Random(3), list[tuple[list[int], list[int]]]()

    def any_plan(drafter: HybridDrafter, max_rows: int) -> Plan:
        most = min(len(drafter._expected), max_rows - 1)
        plans = [Plan("plain"), Plan("probe", own=1)] + [Plan("own", own=rng.randint(1, 4))] * 2 * (max_rows > 5)
        plans += [Plan("lookup", looked_up=rng.randint(1, most))] * 6 if most > 0 else []
        return rng.choice(plans)

    draft = TrainedDrafter.draft

    def recorded(
        self: TrainedDrafter, past: int, tokens: Sequence[int], most: int, least_confidence: float
    ) -> Asking[Draft]:
        text = list(tokens)
        found = yield from draft(self, past, tokens, most, least_confidence)
        rounds.append((text, [proposal.token for proposal in found.proposals]))
        return found

    monkeypatch.setattr(HybridDrafter, "_planned", any_plan)
    monkeypatch.setattr(TrainedDrafter, "draft", recorded)
    counts = Counter[str]()
    with load(bundle) as model:
        for prompt in prompts():
            plain = model.generate(prompt, max_new_tokens=TOKENS, ignore_eos=True).tokens
            texts = TextIndex([[*prompt, *plain[:15], 7, *plain[16:30]]])
            strategy = Speculate(source=FromHybrid(texts=texts))
            result = model.generate(prompt, strategy=strategy, max_new_tokens=TOKENS, ignore_eos=True)
            assert result.tokens == plain
            assert result.stats.is_balanced
            counts.update(result.stats.drafted_by)
    assert counts["drafter"] > 20
    assert counts["texts"] + counts["lookup"] > 20
    assert len(rounds) > 15
    for tokens, drafts in rounds:
        states = residual_streams(target, tokens)
        assert drafts == head.drafts(head.tensors(), states, tokens, len(drafts), embedding)
