"""The cache of the decoding loops over scripted models: correct at every moment, however a generation ends or fails.

The scripted decoder (tests/helpers/scripted.py) fails on any read of a row that is missing or belongs to another text.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helpers.scripted import Call, ScriptedCache, ScriptedDecoder, ScriptedError, ScriptedModel, scripted_time
from helpers.scripted_runs import PLAIN, Wanted, assert_consistent, drafting, fixed
from helpers.scripted_texts import GREEDY, SAMPLINGS, VOCAB, examples, models, prompts
from shortstack.runtime.decode.sampling import SamplingParams
from shortstack.runtime.decode.sequence import TokenSequence
from shortstack.runtime.decode.step import Stats


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
    assert reused >= min(kept, cached, len(text) - 1)  # the cached part of the common prefix is not run again
    decoder.calls.clear()
    again = [step.token for step in (PLAIN if continue_plainly else wanted).start(decoder, sequence, Stats(), 12)]
    assert again == model.continuation(text, 12, decoder.max_length)
    assert decoder.calls[0] == Call("prefill", reused, len(text) - reused)


@examples(150)
@given(models, prompts, drafting, st.sampled_from(SAMPLINGS), st.integers(0, 25))
def test_after_a_run_fails_in_a_round_the_sequence_can_be_continued(
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
    """After NaN logits, for example, the sequence is as before the step and can be continued without a restart."""
    model = ScriptedModel(agreement=1.0)
    decoder = ScriptedDecoder(model)
    sequence = TokenSequence([1, 2])
    stats = Stats()
    sampled = Wanted(wanted.length, sampling=SamplingParams(temperature=1.0, seed=0))
    steps = sampled.start(decoder, sequence, stats, 9)
    for _ in range(taken):
        next(steps)
    before = (list(sequence.tokens), sequence.cached)
    # The next prediction has broken logits.
    model.prefix(sequence.tokens).final_logits = model.final(model.prefix(sequence.tokens)) * float("nan")
    with pytest.raises(Exception, match="largest logit"):
        next(steps)
    assert (sequence.tokens, sequence.cached) == before
    assert stats.is_balanced


class CacheMachine(RuleBasedStateMachine):
    """One cache and one sequence with two decoders, as in a loaded model, and every operation of a caller."""

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
    def positions_counted_as_cached_are_in_the_cache(self) -> None:
        assert self.sequence.cached <= len(self.text)
        self.cut.cache.assert_holds(self.model, self.text[: self.sequence.cached])


CacheMachine.TestCase.settings = settings(deadline=None, derandomize=True, max_examples=60, stateful_step_count=25)
test_the_cache_is_right_after_any_sequence_of_operations = CacheMachine.TestCase
