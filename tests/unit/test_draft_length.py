"""How many tokens to draft: the formula worked out by hand, and the adaptive rule with scripted costs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from helpers.scripted import ScriptedDecoder, ScriptedModel, scripted_time
from helpers.scripted_runs import self_speculative
from shortstack.graphs.errors import RequestError
from shortstack.runtime.decode.choice import GreedyChoice
from shortstack.runtime.decode.draft_length import DraftLength, DraftPolicy
from shortstack.runtime.decode.sequence import TokenSequence
from shortstack.runtime.decode.step import Stats

MANY_ROWS = 16
ADAPTIVE = DraftPolicy(4, is_adaptive=True)
# Seconds of judging 1, 2, 3, ... rows; with 0.25 for the row below the exit, a plain step takes 0.95.
CHEAP_ROWS = (0.70, 0.72, 0.74, 0.76, 0.78)
DEAR_ROWS = (0.70, 1.40, 2.10, 2.80, 3.50)
PLAIN_S = 1.0 + 499 * 0.95  # 500 tokens, the first from a prefill of one second


def measured(
    *, bonus: bool = False, alpha: float = 0.8, plain_s: float = 1.0, max_draft_tokens: int = 4
) -> DraftLength:
    """An adaptive length that knows d = 0.3, v(1) = 0.7, v(2) = 0.8, v(4) = 1.2."""
    length = DraftLength(DraftPolicy(max_draft_tokens, is_adaptive=True, has_bonus=bonus))
    length.observe_plain(plain_s)
    for rows, verify_s in ((1, 0.7), (2, 0.8), (4, 1.2)):
        length.observe_round(1, 1, rows, 0.3 * rows, verify_s)
    length.alpha = alpha
    return length


def decode(
    model: ScriptedModel, verify_s: Sequence[float], policy: DraftPolicy = ADAPTIVE, *, slow_run: int | None = None
) -> tuple[Stats, float, list[int]]:
    """Decode 500 tokens with d = 0.25.

    Returns:
        The counts, the seconds it took, and the rows of each judging run.
    """
    decoder = ScriptedDecoder(model, max_length=600, draft_s=0.25, verify_s=verify_s)
    if slow_run is not None:
        decoder.delays_s[slow_run] = 5.0
    stats = Stats()
    with scripted_time(decoder):
        for _ in self_speculative(decoder, TokenSequence([1]), GreedyChoice(), stats, 500, DraftLength(policy)):
            pass
    rows = [call.rows for call in decoder.calls if call.kind == "verify"]
    return stats, decoder.clock.now_s, rows


def test_the_predicted_gain_without_bonus_follows_the_formula() -> None:
    length = measured()
    # (1 - 0.8^2) / (1 - 0.8) = 1.8 tokens in 2 * 0.3 + 0.8 = 1.4 s, over 1 token a second
    assert length.predicted_gain(2) == pytest.approx(1.8 / 1.4)
    # 1 + 0.8 + 0.64 + 0.512 = 2.952 tokens in 4 * 0.3 + 1.2 = 2.4 s
    assert length.predicted_gain(4) == pytest.approx(2.952 / 2.4)
    # three rows were not measured; two and four are equally near, and the smaller is used
    assert length.predicted_gain(3) == pytest.approx(2.44 / (0.9 + 0.8))


def test_the_predicted_gain_with_bonus_counts_one_row_and_one_token_more() -> None:
    length = measured(bonus=True, plain_s=0.9)
    assert length.predicted_gain(1) == pytest.approx(1.8 * 0.9 / 1.4)
    assert length.predicted_gain(3) == pytest.approx(2.952 * 0.9 / 2.4)


def test_a_certain_draft_is_predicted_to_emit_every_row() -> None:
    assert measured(alpha=1.0).predicted_gain(4) == pytest.approx(4 / 2.4)


def test_the_length_with_the_largest_predicted_gain_is_chosen() -> None:
    assert measured(alpha=0.8).choose(MANY_ROWS) == 3  # 1.29, 1.44, 1.23 for 2, 3, 4
    assert measured(alpha=0.2).choose(MANY_ROWS) == 0  # 0.86 at best
    assert measured(alpha=0.8).choose(2) == 2


def test_a_round_of_one_row_is_a_plain_step_since_it_emits_no_more() -> None:
    assert measured(alpha=1.0).choose(1) == 0
    assert measured(alpha=1.0, bonus=True).choose(1) == 0
    assert measured(alpha=1.0, max_draft_tokens=1).choose(MANY_ROWS) == 0
    assert measured(alpha=1.0, bonus=True, max_draft_tokens=1).choose(MANY_ROWS) == 1


def test_a_round_never_has_more_rows_than_are_left() -> None:
    for bonus in (False, True):
        for max_rows in range(1, 6):
            chosen = measured(alpha=1.0, bonus=bonus).choose(max_rows)
            assert chosen + (bonus and chosen > 0) <= max_rows


def test_alpha_follows_judged_tokens_only() -> None:
    length = DraftLength(DraftPolicy(4))
    assert length.alpha == 0.7
    length.observe_round(4, 2, 4, 1.0, 1.0)  # two accepted, one rejected, the fourth was never judged
    assert length.alpha == pytest.approx((1 - 0.3 * 0.9**2) * 0.9)
    length.alpha = 0.5
    length.observe_round(2, 2, 2, 1.0, 1.0)
    assert length.alpha == pytest.approx(1 - 0.5 * 0.9**2)


def test_a_lower_cost_counts_at_once_and_a_higher_one_gradually() -> None:
    length = measured(alpha=0.8)
    length.observe_plain(0.5)
    assert length.predicted_gain(2) == pytest.approx(0.5 * 1.8 / 1.4)
    length.observe_plain(1.0)
    assert length.predicted_gain(2) == pytest.approx(0.6 * 1.8 / 1.4)


def test_a_fixed_length_drafts_the_maximum_whatever_was_measured() -> None:
    length = DraftLength(DraftPolicy(3))
    assert [length.choose(rows) for rows in (16, 3, 2, 1)] == [3, 3, 2, 1]
    for _ in range(50):
        length.observe_round(3, 0, 3, 9.0, 9.0)
    assert length.choose(MANY_ROWS) == 3


def test_an_adaptive_length_measures_a_plain_step_then_the_shortest_round() -> None:
    for bonus, shortest in ((False, 2), (True, 1)):
        length = DraftLength(DraftPolicy(4, is_adaptive=True, has_bonus=bonus))
        assert length.choose(MANY_ROWS) == 0
        length.observe_plain(1.0)
        assert length.choose(MANY_ROWS) == shortest


def test_drafting_begins_at_a_clear_gain_and_goes_on_until_it_would_lose() -> None:
    def at(gain: float) -> bool:
        """Choose where the best round is predicted at this speed; return whether it drafts."""
        length.alpha, low, high = 0.5, 0.0, 1.0
        for _ in range(50):  # the gain rises with alpha
            length.alpha = (low + high) / 2
            best = max(length.predicted_gain(drafts) for drafts in (2, 3, 4))
            low, high = (length.alpha, high) if best < gain else (low, length.alpha)
        return length.choose(MANY_ROWS) > 0

    length = measured()
    assert [at(gain) for gain in (1.01, 1.0, 1.015, 1.01)] == [False] * 4
    assert [at(gain) for gain in (1.03, 1.01, 1.015, 0.995)] == [True] * 4
    assert [at(gain) for gain in (0.98, 1.01, 1.015)] == [False] * 3


def test_a_losing_draft_is_tried_again_after_8_16_32_steps_and_so_on_up_to_256() -> None:
    length = measured(alpha=0.0)
    waits, wait = [], 0
    while len(waits) < 8:
        if length.choose(MANY_ROWS):
            waits.append(wait)
            wait = 0
        else:
            wait += 1
    assert waits == [8, 16, 32, 64, 128, 256, 256, 256]


def test_a_winning_draft_lets_a_plain_step_be_measured_again_as_rarely() -> None:
    length = measured(alpha=0.9)
    chosen = [length.choose(MANY_ROWS) for _ in range(60)]
    assert [index for index, k in enumerate(chosen) if not k] == [8, 8 + 1 + 16, 8 + 1 + 16 + 1 + 32]


def test_the_waits_start_over_when_the_other_way_is_faster() -> None:
    length = measured(alpha=0.0)
    for _ in range(100):
        length.choose(MANY_ROWS)
    length.alpha = 0.9
    assert length.choose(MANY_ROWS) == 3
    length.alpha = 0.0
    assert [bool(length.choose(MANY_ROWS)) for _ in range(9)] == [False] * 8 + [True]


def test_the_least_confidence_of_a_draft_is_the_policys() -> None:
    length = DraftLength(DraftPolicy(4, confidence=0.5))
    assert length.least_confidence == 0.5
    assert DraftLength(DraftPolicy(4)).least_confidence == 0.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_draft_tokens": 0}, "max_draft_tokens: found 0, expected 1..15"),
        ({"max_draft_tokens": 16}, "max_draft_tokens: found 16, expected 1..15"),
        ({"confidence": -0.1}, "confidence: found -0.1, expected 0..1"),
        ({"confidence": 1.5}, "confidence: found 1.5, expected 0..1"),
        ({"confidence": float("nan")}, "confidence: found nan, expected 0..1"),
    ],
)
def test_a_policy_out_of_range_is_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        DraftPolicy(**values)


def test_cheap_rows_and_a_good_exit_are_drafted_to_the_maximum() -> None:
    stats, elapsed_s, _ = decode(ScriptedModel(agreement=0.95), CHEAP_ROWS)
    assert stats.plain < 0.05 * stats.emitted
    assert stats.drafted > 3.5 * stats.rounds
    assert elapsed_s < 0.6 * PLAIN_S


@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize(("agreement", "verify_s"), [(0.0, CHEAP_ROWS), (0.9, DEAR_ROWS)])
def test_speculation_that_cannot_win_is_turned_off(agreement: float, verify_s: tuple[float, ...], bonus: bool) -> None:
    policy = DraftPolicy(4, is_adaptive=True, has_bonus=bonus)
    stats, elapsed_s, _ = decode(ScriptedModel(agreement=agreement), verify_s, policy)
    assert elapsed_s < 1.03 * PLAIN_S
    assert stats.plain > 450


def test_an_exit_that_becomes_good_is_used_again() -> None:
    _, _, rows = decode(ScriptedModel(agreement=[False] * 150 + [True] * 450), CHEAP_ROWS)
    assert rows[-20:].count(4) > 15


@pytest.mark.parametrize("slow_run", [1, 2])  # the lower and the upper layers of the first plain step
def test_one_slow_plain_step_does_not_keep_a_losing_draft_alive(slow_run: int) -> None:
    stats, _, _ = decode(ScriptedModel(agreement=0.3), DEAR_ROWS, slow_run=slow_run)
    assert stats.plain > 400


def test_one_slow_round_does_not_turn_a_winning_draft_off_for_long() -> None:
    # prefill, a plain step in two runs, two drafted rows, their judging: the sixth run
    stats, _, rows = decode(ScriptedModel(agreement=0.95), CHEAP_ROWS, slow_run=5)
    assert rows[1] == 2
    assert stats.plain < 0.1 * stats.emitted


def test_a_first_draft_with_a_cost_of_its_own_is_counted_once() -> None:
    length = DraftLength(DraftPolicy(4, is_adaptive=True, has_bonus=True))
    length.observe_plain(1.0)
    for rows, verify_s in ((2, 0.8), (3, 0.9), (4, 1.0), (5, 1.1)):
        length.observe_round(rows - 1, rows - 1, rows, 0.4 + 0.1 * (rows - 2), verify_s, first_s=0.4)
    length.alpha = 0.8
    # 1 + 0.8 = 1.8 tokens in 0.4 + 0.8 = 1.2 s; 1 + 0.8 + 0.64 + 0.512 = 2.952 in 0.4 + 2 * 0.1 + 1.0 = 1.6 s
    assert length.predicted_gain(1) == pytest.approx(1.8 / 1.2)
    assert length.predicted_gain(3) == pytest.approx(2.952 / 1.6)
