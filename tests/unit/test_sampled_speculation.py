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

import pytest

from helpers.chi_square import p_value, power, samples_for, survival
from helpers.scripted import ScriptedDecoder, ScriptedModel
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
    scripted: ScriptedModel, choice: Choice, policy: DraftPolicy | None, count: int, samples: int
) -> Counter[tuple[int, ...]]:
    """Count how often each text of ``count`` tokens after the first one was drawn; plainly without a policy."""
    decoder = ScriptedDecoder(scripted)
    sequence = TokenSequence()
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(samples):
        sequence.restart(PROMPT)
        stats = Stats()
        if policy is None:
            steps = solo(plain(decoder, sequence, choice, stats, count + 1), decoder)
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
) -> float:
    """Return the p-value of the drawn texts against the distribution of plain sampling."""
    expected = enumerated(scripted, params, count)
    assert sum(expected.values()) == pytest.approx(1.0)
    counts = drawn(scripted, choice, policy, count, needed(len(expected), effect))
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


@pytest.mark.parametrize(
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
def test_speculative_sampling_draws_from_the_distribution_of_plain_sampling(
    params: SamplingParams, policy: DraftPolicy, draft_ids: Sequence[int] | None, count: int
) -> None:
    assert p_value_of(model(draft_ids), SampledChoice(params), params, policy, count) > LEVEL


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
