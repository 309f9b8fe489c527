"""Lengths of a trained drafter's drafts: the counts add up, and scripted costs lead to the length that is best."""

from __future__ import annotations

import pytest

from helpers.scripted import ScriptedModel
from helpers.scripted_drafter import DraftedDecoder, by_drafter
from shortstack.runtime.decode.choice import GreedyChoice
from shortstack.runtime.decode.draft_length import DraftLength, DraftPolicy
from shortstack.runtime.decode.sequence import TokenSequence
from shortstack.runtime.decode.step import Stats

PROMPT = [3, 1, 4]
NEW = 900


def decoded(costs_s: tuple[float, float], verify_s: tuple[float, ...], agreement: float, policy: DraftPolicy) -> Stats:
    model = ScriptedModel(seed=3, vocab_size=8, agreement=agreement)
    decoder = DraftedDecoder(model, costs_s, verify_s, max_length=NEW + 10)
    stats = Stats()
    steps = by_drafter(decoder, TokenSequence(PROMPT), GreedyChoice(), stats, NEW, DraftLength(policy))
    assert [step.token for step in steps] == model.continuation(PROMPT, NEW, NEW + 10)
    return stats


def best_length(costs_s: tuple[float, float], verify_s: tuple[float, ...], alpha: float, most: int) -> int:
    """Return the number of drafts, with bonus, that gives the most tokens a second; 0 for plain steps."""

    def speed(drafts: int) -> float:
        tokens = sum(alpha**place for place in range(drafts + 1))
        drafting_s = costs_s[0] + (drafts - 1) * costs_s[1] if drafts else 0.0
        return tokens / (drafting_s + verify_s[min(drafts, len(verify_s) - 1)])

    return max(range(most + 1), key=speed)


@pytest.mark.parametrize(
    ("costs_s", "verify_s", "agreement", "expected"),
    [
        ((0.05, 0.05), (1.0,), 0.9, 6),
        ((0.4, 0.05), (1.0,), 0.9, 6),
        ((0.05, 0.6), (1.0,), 0.9, 1),
        ((0.3, 0.25), (1.0, 1.0, 1.1, 1.3, 1.6, 2.0, 2.5), 0.8, 2),
        ((3.0, 0.01), (1.0,), 0.5, 0),
        ((0.5, 0.5), (1.0, 1.6, 2.2, 2.8, 3.4, 4.0, 4.6), 0.5, 0),
    ],
    ids=["cheap", "a dear first draft", "dear further drafts", "rows cost", "a first draft that never pays", "no gain"],
)
def test_the_adaptive_length_is_the_best_one(
    costs_s: tuple[float, float], verify_s: tuple[float, ...], agreement: float, expected: int
) -> None:
    policy = DraftPolicy(6, is_adaptive=True, has_bonus=True)
    stats = decoded(costs_s, verify_s, agreement, policy)
    assert best_length(costs_s, verify_s, agreement, 6) == expected
    assert stats.is_balanced
    if not expected:
        assert stats.plain > 0.8 * NEW
        return
    assert stats.plain < 0.1 * NEW
    mean = stats.drafted / stats.rounds
    assert abs(mean - expected) < 1.0
    assert stats.rounds > 100


@pytest.mark.parametrize("agreement", [0.0, 0.5, 0.95])
@pytest.mark.parametrize(
    "policy",
    [
        DraftPolicy(1),
        DraftPolicy(4),
        DraftPolicy(4, has_bonus=True),
        DraftPolicy(4, confidence=0.4),
        DraftPolicy(5, is_adaptive=True, has_bonus=True),
    ],
    ids=["one", "four", "bonus", "confidence", "adaptive"],
)
def test_counts_of_drafts_add_up(policy: DraftPolicy, agreement: float) -> None:
    stats = decoded((0.1, 0.05), (0.8,), agreement, policy)
    assert stats.is_balanced
    assert stats.emitted == NEW
    assert stats.emitted + stats.discarded == 1 + stats.plain + stats.accepted + stats.corrected + stats.bonus
    assert stats.drafted == stats.accepted + stats.rejected == sum(stats.drafted_at)
    assert stats.accepted == sum(stats.accepted_at)
    assert stats.drafted_at[0] == stats.rounds
    assert stats.drafted_at == sorted(stats.drafted_at, reverse=True)
    assert all(a <= d for a, d in zip(stats.accepted_at, stats.drafted_at, strict=True))
    assert stats.corrected + stats.bonus <= stats.rounds
    assert stats.verify_runs <= stats.rounds + stats.plain
    if agreement == 0.0:
        assert stats.accepted == 0
