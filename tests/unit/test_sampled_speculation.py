"""Speculative sampling draws from the same distribution as plain sampling: chi-square tests with a known power.

The first token is certain. The tests draw the next two (at most 25 cells) or three (at most 125 cells) jointly, many
times, with fixed seeds, so a run repeats exactly. The expected probabilities are those of plain sampling. They are
enumerated over all continuations, not estimated.

Each test has level alpha = 1e-4. Effect sizes are Cohen's w = sqrt(sum (p1 - p0)^2 / p0) over all cells. The number of
cells sets the sample size: power 0.99 at w = 0.15 takes 2,470 draws for 9 cells, 3,270 for 25 and 5,660 for 125
(test_the_stated_sample_sizes_have_the_stated_power). The faults put in at the end have w from 0.26 to 0.55
(estimated from 3,000 draws each) and are looked for with the draws that give power 0.99 at w = 0.25.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from helpers.chi_square import p_value, power, samples_for, survival
from helpers.scripted import ScriptedDecoder, ScriptedModel
from helpers.scripted_drafter import DraftedDecoder, by_drafter
from helpers.scripted_runs import self_speculative
from shortstack.runtime.decode.choice import Choice, Proposal, SampledChoice, Verdict
from shortstack.runtime.decode.draft_length import DraftLength, DraftPolicy
from shortstack.runtime.decode.plain import plain
from shortstack.runtime.decode.runs import solo
from shortstack.runtime.decode.sampling import Distribution, SamplingParams, distribution
from shortstack.runtime.decode.sequence import TokenSequence
from shortstack.runtime.decode.step import Stats
from shortstack.runtime.engine.head import Head

VOCAB = 5
PROMPT = [3, 1, 4]
LEVEL = 1e-4
POWER = 0.99
EFFECT = 0.15
FAULT_EFFECT = 0.25
Cells = dict[tuple[int, ...], float]


def model(draft_ids: Sequence[int] | None = None) -> ScriptedModel:
    """A model that is certain of the token after the prompt, so that cells cover only the tokens that drafts decide."""
    return ScriptedModel(seed=20, vocab_size=VOCAB, agreement=0.6, draft_ids=draft_ids, sure_at=[len(PROMPT)])


def enumerated(scripted: ScriptedModel, params: SamplingParams, count: int) -> Cells:
    """Return the probability of each text of ``count`` tokens after the first one."""

    def grown(text: list[int], mass: float, left: int) -> Cells:
        if not left:
            return {tuple(text[-count:]): mass}
        found = distribution(scripted.final(scripted.prefix(text)), params, text)
        cells: Cells = {}
        for token, probability in zip(found.ids.tolist(), found.probs.tolist(), strict=True):
            cells |= grown([*text, token], mass * probability, left - 1)
        return cells

    return grown([*PROMPT, scripted.next_token(PROMPT)], 1.0, count)


def drawn(
    scripted: ScriptedModel, choice: Choice, policy: DraftPolicy | None, count: int, samples: int, by: str = "exit"
) -> Counter[tuple[int, ...]]:
    """Count how often each text of ``count`` tokens after the first one was drawn; plainly without a policy."""
    drafted, decoder = DraftedDecoder(scripted), ScriptedDecoder(scripted)
    sequence = TokenSequence()
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(samples):
        sequence.restart(PROMPT)
        stats = Stats()
        if policy is None:
            steps = solo(plain(decoder, sequence, choice, stats, count + 1), decoder)
        elif by == "drafter":
            steps = by_drafter(drafted, sequence, choice, stats, count + 1, DraftLength(policy))
        else:
            steps = self_speculative(decoder, sequence, choice, stats, count + 1, DraftLength(policy))
        counts[tuple(step.token for step in steps)[1:]] += 1
    return counts


@cache
def needed(cells: int, effect: float) -> int:
    return samples_for(POWER, effect, cells - 1, LEVEL)


def p_value_of(
    scripted: ScriptedModel,
    choice: Choice,
    params: SamplingParams,
    policy: DraftPolicy | None,
    count: int,
    effect: float = EFFECT,
    by: str = "exit",
) -> float:
    """Return the p-value of the drawn texts against the distribution of plain sampling."""
    expected = enumerated(scripted, params, count)
    assert sum(expected.values()) == pytest.approx(1.0)
    counts = drawn(scripted, choice, policy, count, needed(len(expected), effect), by)
    cells = sorted(expected | counts)
    return p_value([counts[cell] for cell in cells], [expected.get(cell, 0.0) for cell in cells])


def test_the_chi_square_distribution_agrees_with_published_tables() -> None:
    assert survival(3.841, 1) == pytest.approx(0.05, rel=1e-3)
    assert survival(18.307, 10) == pytest.approx(0.05, rel=1e-3)
    assert survival(149.449, 100) == pytest.approx(0.001, rel=1e-3)
    # Cohen, Statistical Power Analysis (1988), table 7.4.6: w = 0.1, one degree of freedom, alpha 0.05
    assert power(785, 0.1, 1, 0.05) == pytest.approx(0.80, abs=0.002)


@pytest.mark.parametrize(("cells", "stated"), [(9, 2_470), (25, 3_270), (125, 5_660)])
def test_the_stated_sample_sizes_have_the_stated_power(cells: int, stated: int) -> None:
    assert needed(cells, EFFECT) == pytest.approx(stated, rel=0.015)
    assert power(needed(cells, EFFECT), EFFECT, cells - 1, LEVEL) >= POWER


FULL, TRIMMED = None, (0, 2, 3)


CASES = pytest.mark.parametrize(
    ("params", "policy", "draft_ids", "count"),
    [
        (SamplingParams(1.0, seed=1), DraftPolicy(3), FULL, 3),
        (SamplingParams(1.0, seed=2), DraftPolicy(3), TRIMMED, 2),
        (SamplingParams(1.0, seed=3), DraftPolicy(1, has_bonus=True), FULL, 2),
        (SamplingParams(0.7, seed=4), DraftPolicy(2, confidence=0.5), FULL, 2),
        (SamplingParams(1.3, top_k=3, seed=5), DraftPolicy(2), TRIMMED, 2),
        (SamplingParams(1.0, top_p=0.8, seed=6), DraftPolicy(2, has_bonus=True), TRIMMED, 2),
        (SamplingParams(1.0, min_p=0.2, seed=7), DraftPolicy(2), FULL, 2),
        (SamplingParams(1.0, repetition_penalty=1.6, seed=8), DraftPolicy(2), FULL, 2),
        (SamplingParams(0.9, 4, 0.9, 0.05, 1.3, seed=9), DraftPolicy(2, has_bonus=True), TRIMMED, 2),
    ],
    ids=[
        "full head",
        "trimmed head",
        "bonus",
        "temperature, confidence stop",
        "top-k, trimmed head",
        "top-p, trimmed head, bonus",
        "min-p",
        "repetition penalty",
        "everything",
    ],
)


@CASES
def test_speculative_sampling_draws_from_the_distribution_of_plain_sampling(
    params: SamplingParams, policy: DraftPolicy, draft_ids: Sequence[int] | None, count: int
) -> None:
    assert p_value_of(model(draft_ids), SampledChoice(params), params, policy, count) > LEVEL


@CASES
def test_so_does_sampling_with_a_trained_drafter(
    params: SamplingParams, policy: DraftPolicy, draft_ids: Sequence[int] | None, count: int
) -> None:
    assert p_value_of(model(draft_ids), SampledChoice(params), params, policy, count, by="drafter") > LEVEL


@pytest.mark.parametrize("agreement", [0.0, 0.95], ids=["garbage", "fitted"])
@pytest.mark.parametrize("draft_ids", [None, (0, 2, 3)], ids=["full head", "trimmed head"])
def test_so_do_bad_and_good_trained_drafters(agreement: float, draft_ids: Sequence[int] | None) -> None:
    params = SamplingParams(0.9, top_p=0.95, repetition_penalty=1.2, seed=11)
    scripted = ScriptedModel(21, VOCAB, agreement, draft_ids, [len(PROMPT)])
    assert p_value_of(scripted, SampledChoice(params), params, DraftPolicy(3), 2, by="drafter") > LEVEL


def test_plain_sampling_draws_from_the_enumerated_distribution() -> None:
    params = SamplingParams(1.0, top_p=0.9, repetition_penalty=1.3, seed=1)
    assert p_value_of(model(), SampledChoice(params), params, None, 2) > LEVEL


class AcceptsTheLikeliest(SampledChoice):
    """Fault: judges sampled drafts as greedy decoding does."""

    def judge(self, head: Head, rows: int, drafts: Sequence[Proposal], context: Sequence[int]) -> Verdict:
        tokens = [draft.token for draft in drafts]
        for row in range(rows):
            probs = head.logits[row]
            if row < len(tokens) and tokens[row] == probs.argmax():
                continue
            return Verdict((*tokens[:row], self.pick(head, row, [*context, *tokens[:row]])), row)
        return Verdict(tuple(tokens), len(tokens))


class RemembersUnprocessed(SampledChoice):
    """Fault: draws from the exit's distribution after temperature and truncation, but judges by the one before."""

    def propose(self, head: Head, row: int, context: Sequence[int], depth: int) -> Proposal:
        unprocessed = distribution(head.logits[row], SamplingParams(1.0), context, ids=head.ids)
        return replace(super().propose(head, row, context, depth), drawn_from=unprocessed)


class DrawsAgainFromTheWhole(SampledChoice):
    """Fault: replaces a rejected token by a draw from p instead of max(0, p - q)."""

    def judge(self, head: Head, rows: int, drafts: Sequence[Proposal], context: Sequence[int]) -> Verdict:
        verdict = super().judge(head, rows, drafts, context)
        if verdict.accepted == len(drafts):
            return verdict
        kept = verdict.tokens[: verdict.accepted]
        return Verdict((*kept, self.pick(head, verdict.accepted, [*context, *kept])), verdict.accepted)


class ForgetsTheDraft(SampledChoice):
    """Fault: the repetition penalty of the judged rows does not see the drafted tokens before them."""

    def judge(self, head: Head, rows: int, drafts: Sequence[Proposal], context: Sequence[int]) -> Verdict:
        self._fixed = list(context)
        return super().judge(head, rows, drafts, context)

    def _distribution(self, head: Head, row: int, context: Sequence[int]) -> Distribution:
        is_judged = head.ids is None and row and len(context) > len(PROMPT) + 1
        return super()._distribution(head, row, self._fixed if is_judged and hasattr(self, "_fixed") else context)


class DraftsTheLikeliest(SampledChoice):
    """Fault: drafts the most likely token, and judges it as if it had been drawn."""

    def propose(self, head: Head, row: int, context: Sequence[int], depth: int) -> Proposal:
        return replace(super().propose(head, row, context, depth), token=int(head.token[row]))


class JudgesAsCertain(SampledChoice):
    """No fault: drafts are drawn and judged as if the drafter had been certain of them, which only accepts fewer."""

    def propose(self, head: Head, row: int, context: Sequence[int], depth: int) -> Proposal:
        return replace(super().propose(head, row, context, depth), drawn_from=None)


class SpreadsOverAllIds(SampledChoice):
    """Fault: q of a trimmed head is that of a softmax over all token ids, those outside included."""

    def propose(self, head: Head, row: int, context: Sequence[int], depth: int) -> Proposal:
        assert head.ids is not None
        logits = np.full(VOCAB, head.logits[row].max(), np.float32)
        logits[head.ids] = head.logits[row]
        whole = distribution(logits, self._params, context)
        return replace(super().propose(head, row, context, depth), drawn_from=whole)


@pytest.mark.parametrize("fault", [DraftsTheLikeliest, SpreadsOverAllIds, DrawsAgainFromTheWhole])
def test_a_faulty_q_of_a_trained_drafter_is_found(fault: type[SampledChoice]) -> None:
    params = SamplingParams(0.8, seed=5)
    scripted = model(TRIMMED)
    assert p_value_of(scripted, fault(params), params, DraftPolicy(2), 2, FAULT_EFFECT, by="drafter") < LEVEL


def test_judging_drawn_drafts_as_certain_ones_is_exact() -> None:
    params = SamplingParams(0.8, seed=5)
    choice, policy = JudgesAsCertain(params), DraftPolicy(2)
    assert p_value_of(model(TRIMMED), choice, params, policy, 2, by="drafter") > LEVEL


@pytest.mark.parametrize("fault", [AcceptsTheLikeliest, RemembersUnprocessed, DrawsAgainFromTheWhole, ForgetsTheDraft])
def test_a_faulty_acceptance_rule_is_found(fault: type[SampledChoice]) -> None:
    params = SamplingParams(0.7, top_k=4, repetition_penalty=2.5, seed=5)
    assert p_value_of(model(), fault(params), params, DraftPolicy(2), 2, FAULT_EFFECT) < LEVEL


def test_drafts_are_both_accepted_and_rejected_in_these_tests() -> None:
    """Otherwise the tests above would not cover one of the two."""
    for draft_ids in (FULL, TRIMMED):
        stats = Stats()
        choice = SampledChoice(SamplingParams(1.0, seed=0))
        steps = self_speculative(
            ScriptedDecoder(model(draft_ids), max_length=500),
            TokenSequence(PROMPT),
            choice,
            stats,
            400,
            DraftLength(DraftPolicy(2)),
        )
        assert len(list(steps)) == 400
        assert 0.25 < stats.alpha < 0.85
        assert math.isclose(stats.accepted + stats.corrected, 399)
