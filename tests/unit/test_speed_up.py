"""The formula of the speed-up, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from shortstack.runtime.decode.speed_up import expected_tokens, predicted_speed_up, round_cost


def test_a_round_emits_the_geometric_sum_of_alpha() -> None:
    assert expected_tokens(0.0, 4) == 1.0
    assert expected_tokens(1.0, 4) == 4.0
    assert expected_tokens(0.5, 3) == pytest.approx((1 - 0.5**3) / (1 - 0.5))


def test_a_bonus_row_is_paid_for_once() -> None:
    assert round_cost(3, 0.2, 1.1) == pytest.approx(1.7)
    assert round_cost(3, 0.2, 1.1, bonus=0.1) == pytest.approx(1.8)


def test_the_predicted_speed_up_is_tokens_over_cost() -> None:
    assert predicted_speed_up(0.5, 2, 0.3, 0.9) == pytest.approx(1.5 / (0.6 + 0.9))
    assert predicted_speed_up(0.5, 2, 0.3, 1.0, bonus=0.2) == pytest.approx(1.75 / (0.6 + 0.2 + 1.0))
    # Nothing is gained or lost by a draft that is always right, at the cost of the layers that run anyway.
    assert predicted_speed_up(1.0, 1, 0.2, 0.8) == pytest.approx(1.0)


def test_costs_in_seconds_give_the_same_speed_up_as_costs_in_plain_steps() -> None:
    relative = predicted_speed_up(0.7, 3, 0.2, 1.1, bonus=0.1)
    assert predicted_speed_up(0.7, 3, 0.004, 0.022, bonus=0.002, plain=0.02) == pytest.approx(relative)
