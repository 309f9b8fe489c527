"""The decoding loops over scripted models: they give the tokens of plain decoding, with the expected runs and counts.

The scripted decoder (tests/helpers/scripted.py) fails on any read of a row that is missing or belongs to another text.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.scripted import Call, ScriptedModel
from helpers.scripted_runs import PLAIN, Wanted, drafting, fixed, run
from helpers.scripted_texts import examples, models, prompts
from shortstack.runtime.decode.draft_length import DraftPolicy
from shortstack.runtime.decode.sampling import SamplingParams


@examples(200)
@given(models, prompts, drafting, st.integers(0, 30), st.integers(1, 16), st.integers(9, 40))
def test_speculative_output_equals_plain_output_token_for_token(
    model: ScriptedModel, prompt: list[int], wanted: Wanted, count: int, window: int, max_length: int
) -> None:
    expected = model.continuation(prompt, count, max_length)
    judged, stats, _ = run(model, prompt, wanted, count, window=window, max_length=max_length)
    assert [step.token for step in judged] == expected
    assert sum(step.from_draft for step in judged) == stats.accepted
    alone, _, _ = run(model, prompt, PLAIN, count, max_length=max_length)
    assert [step.token for step in alone] == expected
    assert not any(step.from_draft for step in alone)


@examples(80)
@given(models, prompts, drafting, st.integers(1, 20))
def test_a_repetition_penalty_changes_both_strategies_alike(
    model: ScriptedModel, prompt: list[int], wanted: Wanted, count: int
) -> None:
    penalty = SamplingParams(repetition_penalty=1.7)
    judged, _, _ = run(model, prompt, Wanted(wanted.length, wanted.has_bonus, penalty), count)
    alone, _, _ = run(model, prompt, Wanted(None, sampling=penalty), count)
    assert [step.token for step in judged] == [step.token for step in alone]


@pytest.mark.parametrize("bonus", [False, True])
def test_an_exit_that_predicts_what_the_model_predicts_is_always_accepted_under_a_penalty(bonus: bool) -> None:
    """The penalty for a drafted row counts the drafts before it, as the penalty for the judged row does later."""
    model = ScriptedModel(seed=4)
    model.exit = model.final  # type: ignore[method-assign]
    wanted = Wanted(DraftPolicy(4, has_bonus=bonus), sampling=SamplingParams(repetition_penalty=1.7))
    _, stats, _ = run(model, [1, 2], wanted, 41)
    assert stats.acceptance == 1.0


@pytest.mark.parametrize("k", range(1, 7))
@pytest.mark.parametrize("bonus", [False, True])
def test_a_draft_that_is_always_wrong_is_corrected_in_every_round(k: int, bonus: bool) -> None:
    model = ScriptedModel(seed=k, agreement=0.0)
    steps, stats, decoder = run(model, [1, 2, 3], fixed(k, bonus=bonus), 41)
    # One token per round; the last rounds draft at most the tokens that are left.
    drafted = [min(k, left) for left in range(40, 0, -1)]
    assert not any(step.from_draft for step in steps)
    assert (stats.rounds, stats.corrected, stats.verify_runs) == (40, 40, 40)
    assert (stats.drafted, stats.rejected) == (sum(drafted), sum(drafted))
    assert (stats.prefilled, stats.plain, stats.accepted, stats.bonus, stats.acceptance) == (1, 0, 0, 0, 0.0)
    assert stats.drafted_at == [sum(n > i for n in drafted) for i in range(k)]
    assert stats.accepted_at == [0] * k
    assert stats.draft_runs == sum(min(n + bonus, left) for n, left in zip(drafted, range(40, 0, -1), strict=True))
    assert stats.draft_runs == sum(call.kind == "draft" for call in decoder.calls)


@pytest.mark.parametrize("k", range(1, 7))
@pytest.mark.parametrize("bonus", [False, True])
def test_a_draft_that_is_always_right_emits_every_row(k: int, bonus: bool) -> None:
    model = ScriptedModel(seed=k, agreement=1.0)
    rows = k + bonus
    steps, stats, decoder = run(model, [1, 2, 3], fixed(k, bonus=bonus), 1 + 6 * rows)
    assert [step.from_draft for step in steps] == [False, *([True] * k + [False] * bonus) * 6]
    assert (stats.rounds, stats.verify_runs, stats.draft_runs) == (6, 6, 6 * rows)
    assert (stats.drafted, stats.accepted, stats.bonus) == (6 * k, 6 * k, 6 * bonus)
    assert (stats.rejected, stats.corrected, stats.plain) == (0, 0, 0)
    assert (stats.acceptance, stats.alpha, stats.tokens_per_round) == (1.0, 1.0, rows)
    assert stats.drafted_at == stats.accepted_at == [6] * k
    headless = [call for call in decoder.calls if call.kind == "draft" and not call.with_head]
    assert len(headless) == 6 * bonus


def test_a_round_drafts_row_by_row_and_judges_in_one_run() -> None:
    _, _, decoder = run(ScriptedModel(agreement=1.0), [1, 2, 3], fixed(2, bonus=True), 4)
    assert decoder.calls == [
        Call("prefill", 0, 3),
        Call("draft", 3, 1),
        Call("draft", 4, 1),
        Call("draft", 5, 1, with_head=False),
        Call("verify", 3, 3),
    ]


def test_a_plain_step_runs_one_row_without_a_head_below_and_one_row_above() -> None:
    _, _, decoder = run(ScriptedModel(), [1, 2, 3], PLAIN, 2)
    assert decoder.calls == [Call("prefill", 0, 3), Call("draft", 3, 1, with_head=False), Call("verify", 3, 1)]


@pytest.mark.parametrize("pattern", [(True, False), (True, True, False), (False, True, True, True)])
def test_the_first_token_that_the_model_rejects_ends_the_accepted_part(pattern: tuple[bool, ...]) -> None:
    # The pattern is indexed by the number of tokens before the predicted one. The prompt is as long as the pattern.
    steps, stats, _ = run(ScriptedModel(seed=3, agreement=pattern), [0] * len(pattern), fixed(4), 40)
    left, index, expected = 39, 1, [False]
    while left:
        drafted = min(4, left)
        accepted = next((i for i in range(drafted) if not pattern[(index + i) % len(pattern)]), drafted)
        emitted = min(accepted + 1, drafted)
        expected += ([True] * accepted + [False])[:emitted]
        left, index = left - emitted, index + emitted
    assert [step.from_draft for step in steps] == expected
    assert stats.accepted == sum(expected)


def test_a_draft_stops_after_a_token_that_the_exit_is_unsure_of() -> None:
    _, stats, decoder = run(ScriptedModel(agreement=1.0), [1], fixed(6, confidence=1.0), 11)
    assert (stats.rounds, stats.drafted, stats.draft_runs) == (10, 10, 10)  # no exit is certain: one token per round
    _, stats, decoder = run(ScriptedModel(agreement=1.0), [1], fixed(6, confidence=1.0, bonus=True), 11)
    assert (stats.rounds, stats.drafted, stats.bonus) == (5, 5, 5)
    assert all(call.rows == 2 for call in decoder.calls if call.kind == "verify")


@pytest.mark.parametrize("bonus", [False, True])
def test_a_draft_is_cut_where_the_context_ends(bonus: bool) -> None:
    model = ScriptedModel(seed=5, agreement=1.0)
    steps, stats, decoder = run(model, [1, 2], fixed(6, bonus=bonus), 50, max_length=12)
    assert len(steps) == 10  # 12 positions in total
    assert [step.token for step in steps] == model.continuation([1, 2], 10, 99)
    assert max(call.start + call.rows for call in decoder.calls) == 11  # the last token is never run
    assert stats.discarded == 0


@pytest.mark.parametrize("wanted", [PLAIN, fixed(3)])
def test_a_prompt_that_fills_the_context_gives_one_token(wanted: Wanted) -> None:
    steps, _, decoder = run(ScriptedModel(), [1] * 9, wanted, 5, max_length=9)
    assert len(steps) == 1
    assert decoder.calls == [Call("prefill", 0, 9)]


@pytest.mark.parametrize("wanted", [PLAIN, fixed(3)])
def test_a_request_for_no_tokens_runs_nothing(wanted: Wanted) -> None:
    steps, _, decoder = run(ScriptedModel(), [1], wanted, 0)
    assert not steps
    assert not decoder.calls


@pytest.mark.parametrize("bonus", [False, True])
def test_seconds_are_split_between_prefill_drafting_and_judging(bonus: bool) -> None:
    _, stats, decoder = run(ScriptedModel(agreement=0.5), [1, 2], fixed(3, bonus=bonus), 20)
    assert stats.prefill_s == 1.0
    assert stats.draft_s == pytest.approx(0.25 * stats.draft_runs)
    assert stats.prefill_s + stats.draft_s + stats.verify_s == pytest.approx(decoder.clock.now_s)
