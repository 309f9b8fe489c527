"""The counts of a generation, and the figures derived from them."""

from __future__ import annotations

import json

import pytest

from shortstack.runtime.decode.step import Stats


def test_rounds_are_counted_by_the_position_of_their_tokens() -> None:
    stats = Stats()
    for drafted, accepted, decided in ((3, 3, 4), (1, 0, 1), (4, 2, 3)):
        stats.count_round(drafted, accepted, decided)
    assert (stats.bonus, stats.corrected, stats.plain) == (1, 2, 0)
    assert (stats.rounds, stats.drafted, stats.accepted, stats.rejected) == (3, 8, 5, 3)
    assert stats.drafted_at == [3, 2, 2, 1]
    assert stats.accepted_at == [2, 2, 1, 0]


def test_the_counts_balance_only_if_every_decided_token_is_emitted_or_discarded() -> None:
    assert Stats().is_balanced
    stats = Stats(emitted=6, discarded=2, prefilled=1, plain=2, bonus=1)
    stats.count_round(4, 3, 4)
    assert stats.is_balanced
    stats.emitted += 1
    assert not stats.is_balanced
    stats.discarded -= 1
    assert stats.is_balanced
    stats.rejected -= 1
    assert not stats.is_balanced


def test_acceptance_counts_all_drafted_tokens_and_alpha_the_judged_ones() -> None:
    stats = Stats()
    stats.count_round(4, 1, 2)  # the third and fourth were never judged
    assert stats.acceptance == 0.25
    assert stats.alpha == 0.5


def test_tokens_per_round_do_not_count_the_prefill() -> None:
    stats = Stats(prefilled=1, verify_runs=3)
    stats.count_round(3, 3, 4)
    stats.count_round(3, 1, 2)
    stats.count_round(0, 0, 1)  # a round without a draft is a plain step
    assert stats.tokens_per_round == pytest.approx((1 + 4 + 2) / 3)


def test_tokens_per_second_are_those_after_the_first() -> None:
    assert Stats(emitted=11, first_token_s=2.0, elapsed_s=4.0).tokens_per_s == 5.0


def test_figures_of_an_empty_generation_are_zero() -> None:
    for emitted in (0, 1):
        stats = Stats(emitted=emitted, first_token_s=1.0, elapsed_s=1.0)
        assert (stats.acceptance, stats.alpha, stats.tokens_per_round, stats.tokens_per_s) == (0, 0, 0, 0)


def test_counts_and_figures_survive_json() -> None:
    stats = Stats(prompt=3, emitted=2)
    stats.count_round(2, 1, 2)
    data = json.loads(json.dumps(stats.to_json()))
    assert (data["prompt"], data["accepted_at"], data["alpha"]) == (3, [1, 0], 0.5)
