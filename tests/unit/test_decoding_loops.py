"""The decoding loops over scripted models: the tokens of plain decoding, and a cache that is right at every moment.

The scripted decoder (tests/helpers/scripted.py) fails on any read of a row that is missing or belongs to another text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helpers.scripted import Call, ScriptedCache, ScriptedDecoder, ScriptedError, ScriptedModel, scripted_time
from helpers.scripted_texts import GREEDY, SAMPLINGS, VOCAB, examples, models, prompts
from shortstack.runtime.choice import make_choice
from shortstack.runtime.draft_length import DraftLength, DraftPolicy
from shortstack.runtime.plain import plain
from shortstack.runtime.sampling import SamplingParams
from shortstack.runtime.sequence import TokenSequence
from shortstack.runtime.speculative import speculative
from shortstack.runtime.step import Stats, Step


class ScriptedLength(DraftLength):
    """Drafts as many tokens as a list says, over and over: whatever an adaptive rule could come up with."""

    def __init__(self, wanted: Sequence[int], has_bonus: bool) -> None:
        super().__init__(DraftPolicy(has_bonus=has_bonus))
        self._wanted = wanted
        self._round = -1

    def choose(self, max_rows: int) -> int:
        self._round += 1
        return min(self._wanted[self._round % len(self._wanted)], max_rows)


@dataclass(frozen=True)
class Wanted:
    """How to decode: None plainly, a policy, or a scripted list of draft lengths."""

    length: DraftPolicy | tuple[int, ...] | None
    has_bonus: bool = False
    sampling: SamplingParams = GREEDY

    def start(self, decoder: ScriptedDecoder, sequence: TokenSequence, stats: Stats, count: int) -> Iterator[Step]:
        choice = make_choice(self.sampling)
        if self.length is None:
            return plain(decoder, sequence, choice, stats, count)
        scripted = isinstance(self.length, tuple)
        length = ScriptedLength(self.length, self.has_bonus) if scripted else DraftLength(self.length)
        return speculative(decoder, sequence, choice, stats, count, length)


def fixed(k: int, *, bonus: bool = False, confidence: float = 0.0) -> Wanted:
    return Wanted(DraftPolicy(k, confidence, has_bonus=bonus))


PLAIN = Wanted(None)

policies = st.builds(
    DraftPolicy,
    max_draft_tokens=st.integers(1, 6),
    confidence=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    is_adaptive=st.booleans(),
    has_bonus=st.booleans(),
)
drafting = st.builds(Wanted, policies) | st.builds(
    Wanted, st.lists(st.integers(0, 15), min_size=1, max_size=6).map(tuple), st.booleans()
)


def assert_consistent(decoder: ScriptedDecoder, sequence: TokenSequence, stats: Stats) -> None:
    assert sequence.cached == len(sequence) - 1
    decoder.cache.assert_holds(decoder.model, sequence.tokens[: sequence.cached])
    assert stats.is_balanced


def run(
    model: ScriptedModel, prompt: Sequence[int], wanted: Wanted, count: int, *, window: int = 16, max_length: int = 64
) -> tuple[list[Step], Stats, ScriptedDecoder]:
    """Decodes to the end, checking after every step."""
    # Judging four rows costs more than judging two, so an adaptive length has something to weigh.
    decoder = ScriptedDecoder(model, window=window, max_length=max_length, verify_s=(0.7, 0.8, 1.3, 1.8))
    sequence = TokenSequence(prompt)
    stats = Stats(prompt=len(prompt))
    steps = []
    with scripted_time(decoder):
        for step in wanted.start(decoder, sequence, stats, count):
            steps.append(step)
            assert sequence.tokens == [*prompt, *(s.token for s in steps)]
            assert stats.emitted == len(steps)
            assert_consistent(decoder, sequence, stats)
    assert stats.is_balanced
    assert stats.discarded == 0
    return steps, stats, decoder


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
def test_a_repetition_penalty_judged_on_logits_changes_both_strategies_alike(
    model: ScriptedModel, prompt: list[int], wanted: Wanted, count: int
) -> None:
    penalty = SamplingParams(repetition_penalty=1.7)
    judged, _, _ = run(model, prompt, Wanted(wanted.length, wanted.has_bonus, penalty), count)
    alone, _, _ = run(model, prompt, Wanted(None, sampling=penalty), count)
    assert [step.token for step in judged] == [step.token for step in alone]


@pytest.mark.parametrize("bonus", [False, True])
def test_an_exit_that_says_what_the_model_says_is_always_accepted_under_a_penalty(bonus: bool) -> None:
    """The penalty of a drafted row sees the drafts before it, as that of the judged row will."""
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
    # One token a round; the last rounds draft what is left at most.
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


def test_a_plain_step_is_one_headless_row_below_and_one_row_above() -> None:
    _, _, decoder = run(ScriptedModel(), [1, 2, 3], PLAIN, 2)
    assert decoder.calls == [Call("prefill", 0, 3), Call("draft", 3, 1, with_head=False), Call("verify", 3, 1)]


@pytest.mark.parametrize("pattern", [(True, False), (True, True, False), (False, True, True, True)])
def test_the_first_token_the_model_disagrees_with_ends_the_accepted_part(pattern: tuple[bool, ...]) -> None:
    # The pattern goes by the number of tokens before the predicted one, and the prompt has as many as the pattern.
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


def test_a_draft_stops_after_a_token_the_exit_is_unsure_of() -> None:
    _, stats, decoder = run(ScriptedModel(agreement=1.0), [1], fixed(6, confidence=1.0), 11)
    assert (stats.rounds, stats.drafted, stats.draft_runs) == (10, 10, 10)  # no exit is certain: one token a round
    _, stats, decoder = run(ScriptedModel(agreement=1.0), [1], fixed(6, confidence=1.0, bonus=True), 11)
    assert (stats.rounds, stats.drafted, stats.bonus) == (5, 5, 5)
    assert all(call.rows == 2 for call in decoder.calls if call.kind == "verify")


@pytest.mark.parametrize("bonus", [False, True])
def test_capacity_reached_in_the_middle_of_a_draft_cuts_the_draft(bonus: bool) -> None:
    model = ScriptedModel(seed=5, agreement=1.0)
    steps, stats, decoder = run(model, [1, 2], fixed(6, bonus=bonus), 50, max_length=12)
    assert len(steps) == 10  # 12 positions in all
    assert [step.token for step in steps] == model.continuation([1, 2], 10, 99)
    assert max(call.start + call.rows for call in decoder.calls) == 11  # the last token is not run any more
    assert stats.discarded == 0


@pytest.mark.parametrize("wanted", [PLAIN, fixed(3)])
def test_a_prompt_that_fills_the_context_gives_one_token(wanted: Wanted) -> None:
    steps, _, decoder = run(ScriptedModel(), [1] * 9, wanted, 5, max_length=9)
    assert len(steps) == 1
    assert decoder.calls == [Call("prefill", 0, 9)]


@pytest.mark.parametrize("wanted", [PLAIN, fixed(3)])
def test_no_tokens_wanted_runs_nothing(wanted: Wanted) -> None:
    steps, _, decoder = run(ScriptedModel(), [1], wanted, 0)
    assert not steps
    assert not decoder.calls


@pytest.mark.parametrize("bonus", [False, True])
def test_seconds_are_split_between_prefill_drafting_and_judging(bonus: bool) -> None:
    _, stats, decoder = run(ScriptedModel(agreement=0.5), [1, 2], fixed(3, bonus=bonus), 20)
    assert stats.prefill_s == 1.0
    assert stats.draft_s == pytest.approx(0.25 * stats.draft_runs)
    assert stats.prefill_s + stats.draft_s + stats.verify_s == pytest.approx(decoder.clock.now_s)


@examples(150)
@given(
    models,
    prompts,
    drafting,
    st.sampled_from(SAMPLINGS),
    st.integers(0, 20),
    st.integers(0, 30),
    st.lists(st.integers(0, VOCAB - 1), max_size=4),
    st.booleans(),
)
def test_closing_after_any_step_leaves_a_cache_that_can_be_continued(
    model: ScriptedModel,
    prompt: list[int],
    wanted: Wanted,
    sampling: SamplingParams,
    taken: int,
    kept: int,
    extension: list[int],
    continue_plainly: bool,
) -> None:
    decoder = ScriptedDecoder(model)
    sequence = TokenSequence(prompt)
    stats = Stats()
    steps = Wanted(wanted.length, wanted.has_bonus, sampling).start(decoder, sequence, stats, 25)
    emitted = [step.token for _, step in zip(range(taken), steps, strict=False)]
    steps.close()
    assert sequence.tokens == prompt + emitted
    assert stats.emitted == len(emitted)
    assert stats.is_balanced
    if emitted:
        assert_consistent(decoder, sequence, stats)

    text = sequence.tokens[: max(1, kept)] + extension
    cached = sequence.cached
    reused = sequence.restart(text)
    assert reused >= min(kept, cached, len(text) - 1)  # the common part that was cached is not run again
    decoder.calls.clear()
    again = [step.token for step in (PLAIN if continue_plainly else wanted).start(decoder, sequence, Stats(), 12)]
    assert again == model.continuation(text, 12, decoder.max_length)
    assert decoder.calls[0] == Call("prefill", reused, len(text) - reused)


@examples(150)
@given(models, prompts, drafting, st.sampled_from(SAMPLINGS), st.integers(0, 25))
def test_a_run_that_fails_in_the_middle_of_a_round_leaves_what_was_there(
    model: ScriptedModel, prompt: list[int], wanted: Wanted, sampling: SamplingParams, fails_at: int
) -> None:
    decoder = ScriptedDecoder(model)
    decoder.fails_at = fails_at
    sequence = TokenSequence(prompt)
    stats = Stats()
    emitted: list[int] = []
    steps = Wanted(wanted.length, wanted.has_bonus, sampling).start(decoder, sequence, stats, 60)
    with pytest.raises(ScriptedError):
        emitted.extend(step.token for step in steps)
    assert sequence.tokens == prompt + emitted
    assert stats.is_balanced
    assert stats.emitted == len(emitted)
    if emitted:
        assert_consistent(decoder, sequence, stats)
    text = sequence.tokens[: decoder.max_length]
    sequence.restart(text)
    again = [step.token for step in wanted.start(decoder, sequence, Stats(), 9)]
    assert again == model.continuation(text, 9, decoder.max_length)


@pytest.mark.parametrize("wanted", [PLAIN, fixed(2)])
@pytest.mark.parametrize("taken", [0, 1])
def test_a_choice_that_fails_leaves_the_newest_token_uncached(wanted: Wanted, taken: int) -> None:
    """As on NaN logits: the sequence is as before the step, so that it can be continued without a restart."""
    model = ScriptedModel(agreement=1.0)
    decoder = ScriptedDecoder(model)
    sequence = TokenSequence([1, 2])
    stats = Stats()
    sampled = Wanted(wanted.length, sampling=SamplingParams(temperature=1.0, seed=0))
    steps = sampled.start(decoder, sequence, stats, 9)
    for _ in range(taken):
        next(steps)
    before = (list(sequence.tokens), sequence.cached)
    # The text whose prediction comes next turns out to be broken.
    model.prefix(sequence.tokens).final_logits = model.final(model.prefix(sequence.tokens)) * float("nan")
    with pytest.raises(Exception, match="largest logit"):
        next(steps)
    assert (sequence.tokens, sequence.cached) == before
    assert stats.is_balanced


class CacheMachine(RuleBasedStateMachine):
    """One cache, one sequence, two decoders over them as in a loaded model, and everything a caller may do."""

    @initialize(model=models, prompt=prompts)
    def load(self, model: ScriptedModel, prompt: list[int]) -> None:
        self.model = model
        cache = ScriptedCache()
        self.cut = ScriptedDecoder(model, cache=cache, max_length=40)
        self.uncut = ScriptedDecoder(model, cache=cache, max_length=40, is_cut=False)
        self.sequence = TokenSequence(prompt)
        self.text = list(prompt)

    def has_room(self) -> bool:
        return len(self.text) < 36

    @precondition(has_room)
    @rule(token=st.integers(0, VOCAB - 1))
    def append(self, token: int) -> None:
        self.sequence.append(token)
        self.text.append(token)

    @rule(fraction=st.floats(0, 1))
    def rewind(self, fraction: float) -> None:
        length = round(fraction * len(self.text))
        cached = self.sequence.cached
        self.sequence.rewind(length)
        del self.text[length:]
        assert self.sequence.cached == min(cached, length)

    @rule(fraction=st.floats(0, 1), more=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5))
    def restart(self, fraction: float, more: list[int]) -> None:
        self.text = (self.text[: round(fraction * len(self.text))] + more)[:36]
        kept = self.sequence.restart(self.text)
        assert kept == self.sequence.cached < len(self.text)

    @precondition(lambda self: self.sequence.cached < len(self.text) < 40)
    @rule(
        wanted=drafting | st.just(PLAIN),
        is_cut=st.booleans(),
        count=st.integers(1, 20),
        taken=st.integers(0, 20),
        fails_after=st.none() | st.integers(0, 12),
        sampling=st.sampled_from(SAMPLINGS),
    )
    def generate(
        self, wanted: Wanted, is_cut: bool, count: int, taken: int, fails_after: int | None, sampling: SamplingParams
    ) -> None:
        decoder = self.cut if is_cut or wanted.length is not None else self.uncut
        decoder.fails_at = None if fails_after is None else len(decoder.calls) + fails_after
        expected = self.model.continuation(self.text, count, 40)
        emitted: list[int] = []
        stats = Stats()
        steps = Wanted(wanted.length, wanted.has_bonus, sampling).start(decoder, self.sequence, stats, count)
        has_failed = False
        with scripted_time(decoder):
            try:
                for _, step in zip(range(taken), steps, strict=False):
                    emitted.append(step.token)
                    assert_consistent(decoder, self.sequence, stats)
            except ScriptedError:
                has_failed = True
        steps.close()
        decoder.fails_at = None
        self.text += emitted
        assert stats.is_balanced
        if sampling == GREEDY:
            assert emitted == expected[: len(emitted)]
        if not has_failed:
            assert len(emitted) == min(taken, len(expected))

    @invariant()
    def the_sequence_holds_the_text(self) -> None:
        assert self.sequence.tokens == self.text

    @invariant()
    def what_is_called_cached_is_in_the_cache(self) -> None:
        assert self.sequence.cached <= len(self.text)
        self.cut.cache.assert_holds(self.model, self.text[: self.sequence.cached])


CacheMachine.TestCase.settings = settings(deadline=None, derandomize=True, max_examples=60, stateful_step_count=25)
test_the_cache_is_right_after_any_sequence_of_operations = CacheMachine.TestCase
