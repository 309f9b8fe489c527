"""The loop of early exit over scripted levels: which tokens it gives, which head decided them, and correct caches.

The scripted levels (tests/helpers/scripted_levels.py) fail on any read of a row that is missing or of another text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.exit_runs import Pattern, catch_up_of, levels_hold, run
from helpers.scripted import ScriptedError, ScriptedModel
from helpers.scripted_levels import ScriptedLevels
from helpers.scripted_texts import GREEDY, SAMPLINGS, VOCAB, examples, models, prompts
from shortstack.runtime.decode.choice import Proposal, make_choice
from shortstack.runtime.decode.plain import plain
from shortstack.runtime.decode.runs import solo
from shortstack.runtime.decode.sampling import SamplingParams
from shortstack.runtime.decode.sequence import TokenSequence
from shortstack.runtime.decode.step import Stats, Step
from shortstack.runtime.early_exit.expression import parse_criterion
from shortstack.runtime.early_exit.loop import EarlyExit, judge_likely
from shortstack.runtime.early_exit.pending import PendingCap
from shortstack.runtime.early_exit.policy import ExitPolicy, KVPolicy
from shortstack.runtime.engine.head import Head

CRITERIA = (
    "top_prob >= 0.3",
    "top_prob >= 0.5 [2: 0.6, 4: 0.3] ~ 4",
    "margin >= 0.2",
    "entropy <= 1.3",
    "similarity >= 0.9",
    "gate >= 0.3",
    "patience >= 2",
    "votes >= 2",
    "mean_prob >= 0.3",
    "max_depth = 6..2",
    "margin >= 0.1 and patience >= 2",
    "gate >= 0.9 or (entropy <= 1.2 and votes >= 1)",
    "always",
)
NEVER = ("never", "margin >= 0.1 and never", "votes >= 9", "entropy <= 0")


def plain_tokens(model: ScriptedModel, prompt: Sequence[int], count: int = 20, max_length: int = 64) -> list[int]:
    text = list(prompt)
    while len(text) < min(len(prompt) + count, max_length):
        text.append(model.next_token(text))
    return text[len(prompt) :]


patterns = st.lists(st.booleans(), min_size=1, max_size=12)
criteria = st.sampled_from(CRITERIA).map(parse_criterion) | st.builds(Pattern, patterns)
exits = st.integers(1, 3)
caps = st.none() | st.integers(1, 8)
kv_policies = st.sampled_from(["flush", "pipeline", "auto", "recompute"])


@examples(400)
@given(
    models,
    exits,
    prompts,
    st.builds(
        ExitPolicy,
        criteria,
        max_pending=caps,
        kv_policy=st.sampled_from(["flush", "recompute"]),
        prefill_exit=st.booleans(),
    ),
    st.none() | st.integers(1, 20),
)
def test_every_cache_holds_the_text_whatever_leaves_and_whenever_the_caller_stops(
    model: ScriptedModel, exits: int, prompt: list[int], policy: ExitPolicy, stop_after: int | None
) -> None:
    levels = ScriptedLevels(model, exits, has_gate=True)
    found = run(levels, prompt, policy, stop_after=stop_after)
    first = found.steps[0]
    if first.exit_layer == levels.num_layers:  # a prompt that left early has caught up
        assert first.token == model.next_token(prompt)
    assert len(found.steps) == (stop_after or 20)
    assert found.stats.exited == sum(step.exit_layer < levels.num_layers for step in found.steps)


@examples(100)
@given(models, exits, prompts, criteria, caps, kv_policies, st.integers(0, 2**16))
def test_no_token_depends_on_when_the_levels_above_catch_up(
    model: ScriptedModel,
    exits: int,
    prompt: list[int],
    criterion: Pattern,
    cap: int | None,
    kv_policy: KVPolicy,
    naps: int,
) -> None:
    at_once = run(ScriptedLevels(model, exits, has_gate=True), prompt, ExitPolicy(criterion, max_pending=1))
    levels = ScriptedLevels(model, exits, has_gate=True, naps=naps)
    later = run(levels, prompt, ExitPolicy(criterion, max_pending=cap, kv_policy=kv_policy))
    assert later.tokens == at_once.tokens
    assert [s.exit_layer for s in later.steps] == [s.exit_layer for s in at_once.steps]
    assert [s.confidence for s in later.steps] == [s.confidence for s in at_once.steps]


@examples(200)
@given(models, exits, prompts, criteria, caps, st.sampled_from(["flush", "recompute"]), st.sampled_from(SAMPLINGS[:2]))
def test_exact_verification_gives_the_plain_tokens_for_every_criterion(
    model: ScriptedModel,
    exits: int,
    prompt: list[int],
    criterion: Pattern,
    cap: int | None,
    kv_policy: KVPolicy,
    sampling: SamplingParams,
) -> None:
    policy = ExitPolicy(criterion, verify="exact", max_pending=cap, kv_policy=kv_policy)
    found = run(ScriptedLevels(model, exits, has_gate=True), prompt, policy, sampling=sampling)
    reference = ScriptedLevels(model, exits)
    choice, stats = make_choice(sampling), Stats()
    expected = [step.token for step in full_depth(reference, prompt, choice, stats)]
    assert found.tokens == expected


def full_depth(levels: ScriptedLevels, prompt: Sequence[int], choice: object, stats: Stats) -> list[Step]:
    """Decode through every level, row by row, with the plain loop."""

    class Uncut:
        """All levels as one level."""

        def __getattr__(self, name: str) -> object:
            return getattr(levels, name)

        def draft(self, row: int, past: int, with_head: bool, with_logits: bool) -> None:
            levels.reserve(past + 1, past)

        def verify(self, rows: int, past: int, with_logits: bool) -> None:
            for level in range(len(levels.heads)):
                levels.run(level, 0, rows, past, rows, with_logits)

    uncut: Any = Uncut()
    return list(solo(plain(uncut, TokenSequence(prompt), choice, stats, 20), uncut))


@pytest.mark.parametrize("kv_policy", ["flush", "pipeline", "auto", "recompute"])
@pytest.mark.parametrize("expression", NEVER)
def test_a_threshold_out_of_reach_is_plain_decoding(expression: str, kv_policy: KVPolicy) -> None:
    for seed in range(10):
        model = ScriptedModel(seed)
        policy = ExitPolicy(parse_criterion(expression), kv_policy=kv_policy)
        found = run(ScriptedLevels(model, 2), [seed % VOCAB, 1], policy)
        assert found.tokens == plain_tokens(model, [seed % VOCAB, 1])
        assert found.stats.exits == {6: 20}


def test_the_prompt_runs_through_all_layers_unless_it_may_leave() -> None:
    model = ScriptedModel(3)
    always = parse_criterion("always")
    whole = run(ScriptedLevels(model, 2), [1, 2, 3], ExitPolicy(always))
    assert [step.exit_layer for step in whole.steps] == [6] + [2] * 19
    levels = ScriptedLevels(model, 2)
    short = run(levels, [1, 2, 3], ExitPolicy(always, prefill_exit=True))
    assert {step.exit_layer for step in short.steps} == {2}
    assert short.steps[0].pending == 3
    assert short.stats.prefilled == 0


def test_each_level_runs_on_each_row_once_and_on_pending_rows_in_one_run() -> None:
    levels = ScriptedLevels(ScriptedModel(5), 1)
    pattern = Pattern([True, True, True, False])  # by 3 * position + 1
    found = run(levels, [1], ExitPolicy(pattern), 9)
    assert found.stats.exited >= 4
    upper = [(start, end) for level, start, end, _ in levels.runs if level == 1]
    lower = [(start, end) for level, start, end, _ in levels.runs if level == 0]
    assert sum(end - start for start, end in upper) == sum(end - start for start, end in lower) == 8
    assert len(upper) < 5


def test_recompute_runs_pending_rows_through_the_lower_level_again() -> None:
    rows = {}
    for kv_policy in ("flush", "recompute"):
        levels = ScriptedLevels(ScriptedModel(5), 1)
        run(levels, [1], ExitPolicy(Pattern([True, True, True, False]), kv_policy=kv_policy), 9)
        rows[kv_policy] = sum(end - start for level, start, end, _ in levels.runs if level == 0)
    assert rows["recompute"] > rows["flush"] == 8


def test_the_context_ends_the_text() -> None:
    levels = ScriptedLevels(ScriptedModel(1), 2, max_length=16)
    found = run(levels, [1, 2, 3], ExitPolicy(parse_criterion("always")), 40)
    assert len(found.sequence) == 16
    exact = run(
        ScriptedLevels(ScriptedModel(1), 2, max_length=16),
        [1, 2, 3],
        ExitPolicy(parse_criterion("always"), verify="exact"),
        40,
    )
    assert exact.tokens == plain_tokens(ScriptedModel(1), [1, 2, 3], 40, 16)


def test_rollback_discards_tokens_that_the_whole_model_finds_unlikely() -> None:
    model = ScriptedModel(11, agreement=0.5)
    always = parse_criterion("always")
    tokens, rejected = {}, {}
    for least in (0.0, 0.05, 1.0):
        policy = ExitPolicy(always, verify="rollback", rollback_below=least)
        found = run(ScriptedLevels(model), [1, 2], policy, 40)
        tokens[least], rejected[least] = found.tokens, found.stats.rejected
    unverified = run(ScriptedLevels(model), [1, 2], ExitPolicy(always), 40)
    assert rejected[0.0] == 0 < rejected[0.05] <= rejected[1.0]
    assert tokens[0.0] == unverified.tokens
    assert tokens[1.0] == plain_tokens(model, [1, 2], 40)


@pytest.mark.parametrize(("least", "accepted"), [(0.0, 3), (0.02, 2), (0.3, 0)])
def test_the_first_unlikely_draft_ends_the_round(least: float, accepted: int) -> None:
    head = Head(4, 4, np.dtype(np.float32), None)
    head.outputs(0, 4, True)
    head.logits[:] = np.log([[0.5, 0.2, 0.2, 0.1]] * 2 + [[0.9, 0.08, 0.015, 0.005]] * 2)
    head.token[:] = 0
    drafts = [Proposal(token, 1.0, 2) for token in (1, 0, 2)]
    verdict = judge_likely(head, 4, drafts, least)
    assert verdict.accepted == accepted
    assert verdict.tokens == (*(1, 0, 2)[:accepted], 0)
    assert judge_likely(head, 3, drafts, 0.0).tokens == (1, 0, 2)


@pytest.mark.parametrize("cap", [None, 2])
def test_the_observer_sees_every_token_that_left_and_changes_none(cap: int | None) -> None:
    model = ScriptedModel(9, agreement=0.6)
    heard: list[tuple[int, bool]] = []
    policy = ExitPolicy(parse_criterion("top_prob >= 0.3"), max_pending=cap)
    with_observer = run(
        ScriptedLevels(model, 2),
        [1, 2],
        policy,
        40,
        observe=lambda reading, agrees: heard.append((reading.token, agrees)),
    )
    without = run(ScriptedLevels(model, 2), [1, 2], policy, 40)
    assert with_observer.tokens == without.tokens
    left = [i for i, step in enumerate(with_observer.steps) if step.exit_layer < 6]
    text = [1, 2, *with_observer.tokens]
    assert heard == [(text[2 + i], text[2 + i] == model.next_token(text[: 2 + i])) for i in left]
    assert {agrees for _, agrees in heard} == {False, True}


@pytest.mark.parametrize("kv_policy", ["flush", "pipeline", "auto"])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_failing_run_reaches_the_caller_and_the_sequence_can_be_continued(level: int, kv_policy: KVPolicy) -> None:
    levels = ScriptedLevels(ScriptedModel(2), 2, naps=1)
    counts = dict.fromkeys(range(3), 0)

    def fails(found: int, start: int, end: int) -> bool:
        counts[found] += 1
        return found == level and counts[found] == 3

    levels.fails = fails
    stats, sequence = Stats(), TokenSequence([1, 2])
    policy = ExitPolicy(Pattern([True, False, True, True, False]), kv_policy=kv_policy)
    cap = PendingCap(levels.window)
    catch_up = catch_up_of(kv_policy, levels, stats, cap)
    loop = EarlyExit(levels, sequence, make_choice(GREEDY), stats, 30, policy, catch_up, cap).steps()
    with pytest.raises(ScriptedError):
        list(solo(loop, levels))
    levels_hold(levels, sequence)
    levels.fails = lambda *_: False
    text = list(sequence.tokens)
    again = TokenSequence(text)
    again.commit(sequence.cached)
    catch_up = catch_up_of(kv_policy, levels, stats, cap)
    list(solo(EarlyExit(levels, again, make_choice(GREEDY), Stats(), 10, policy, catch_up, cap).steps(), levels))
    assert again.cached == len(again) - 1
    levels_hold(levels, again)


def test_sampling_under_exact_verification_is_repeatable_whatever_the_machine_does() -> None:
    sampling = replace(SAMPLINGS[2])
    policy = ExitPolicy(parse_criterion("top_prob >= 0.3"), verify="exact", max_pending=4)
    texts = {tuple(run(ScriptedLevels(ScriptedModel(4), 2), [3], policy, sampling=sampling).tokens) for _ in range(3)}
    assert len(texts) == 1
