"""Costs of rounds from few measurements, and rates of acceptance, worked out by hand."""

from __future__ import annotations

import pytest

from shortstack.runtime.decode.acceptance import LookupRates, Rate
from shortstack.runtime.decode.round_costs import RoundCosts


def measured(*whole: tuple[int, float]) -> RoundCosts:
    costs = RoundCosts()
    costs.observe_plain(1.0)
    for rows, seconds in whole:
        costs.observe_whole(rows, 0.25 * seconds, 0.75 * seconds)
    return costs


def test_a_row_more_is_guessed_at_a_quarter_of_a_plain_step() -> None:
    costs = measured()
    assert [costs.whole(rows) for rows in (1, 2, 5)] == pytest.approx([1.0, 1.25, 2.0])
    assert costs.guessed_whole(5) == pytest.approx(2.0)


def test_rows_that_were_not_measured_lie_between_or_beyond_those_that_were() -> None:
    costs = measured((3, 1.2), (5, 1.8))
    assert [costs.whole(rows) for rows in (2, 3, 4, 5)] == pytest.approx([1.1, 1.2, 1.5, 1.8])
    assert costs.whole(7) == pytest.approx(1.8 + 2 * 0.8 / 4)  # as from one row to five
    assert costs.most_measured == 5


def test_no_rows_cost_more_than_their_halves() -> None:
    costs = measured((2, 1.1), (4, 30.0))
    assert costs.whole(4) == pytest.approx(2.2)
    assert costs.whole(8) == pytest.approx(4.4)


def test_judging_is_known_apart_from_the_whole_round() -> None:
    costs = measured((2, 1.2))
    assert costs.judging(2) == pytest.approx(0.9)
    assert costs.judging(3) == pytest.approx(1.0)  # a tenth of a plain step more
    costs.observe_judging(4, 1.5)
    assert costs.judging(3) == pytest.approx(1.2)
    assert costs.whole(2) == pytest.approx(1.2)


def test_a_lower_cost_counts_at_once_and_a_higher_one_gradually() -> None:
    costs = measured()
    costs.observe_plain(0.5)
    assert costs.plain_s == costs.whole(1) == 0.5
    costs.observe_plain(1.0)
    assert costs.plain_s == pytest.approx(0.6)


def test_a_first_draft_may_cost_another_time_than_further_ones() -> None:
    costs = RoundCosts()
    costs.observe_drafts(4, 4, 1.0, None)
    assert (costs.draft_s, costs.first_s) == (0.25, None)
    costs = RoundCosts()
    costs.observe_drafts(1, 2, 0.4, 0.4)
    assert (costs.draft_s, costs.first_s) == (0.4, 0.4)
    costs.observe_drafts(3, 4, 0.6, 0.4)
    assert costs.draft_s == pytest.approx(0.1)


def test_a_rate_begins_as_a_guess_that_weighs_two_tokens() -> None:
    rate = Rate(0.6)
    for accepted in (True, False):
        rate.observe(accepted=accepted)
    assert rate.value == pytest.approx((2 * 0.6 + 1) / 4)
    for _ in range(200):
        rate.observe(accepted=True)
    rate.observe(accepted=False)
    assert rate.value == pytest.approx(0.9)


def test_later_drafts_of_a_lookup_count_as_longer_matches() -> None:
    rates = LookupRates()
    assert rates.values(2, 15) == sorted(rates.values(2, 15))
    rates.at(4).observe(accepted=True)
    assert rates.values(2, 15)[2] == pytest.approx((2 * 0.55 + 1) / 3)
    assert rates.at(40) is rates.at(16)
