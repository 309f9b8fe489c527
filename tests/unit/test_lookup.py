"""Drafts that are looked up: the output of plain decoding, and of plain sampling, from scripted models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.chi_square import p_value, samples_for
from helpers.scripted import ScriptedDecoder, ScriptedModel
from helpers.scripted_runs import assert_consistent
from helpers.scripted_texts import GREEDY, examples, models, prompts
from shortstack.runtime.decode.choice import SampledChoice, make_choice
from shortstack.runtime.decode.draft_length import DraftLength, DraftPolicy
from shortstack.runtime.decode.lookup import LookupDrafter
from shortstack.runtime.decode.runs import solo
from shortstack.runtime.decode.sampling import SamplingParams, distribution
from shortstack.runtime.decode.sequence import TokenSequence
from shortstack.runtime.decode.speculative import speculative
from shortstack.runtime.decode.step import Stats, Step
from shortstack.runtime.decode.text_index import TextIndex


def decode(
    model: ScriptedModel,
    prompt: Sequence[int],
    policy: DraftPolicy,
    count: int,
    *,
    is_cut: bool = False,
    texts: TextIndex | None = None,
    sampling: SamplingParams = GREEDY,
) -> tuple[list[Step], Stats, ScriptedDecoder]:
    decoder = ScriptedDecoder(model, is_cut=is_cut)
    sequence, stats, steps = TokenSequence(prompt), Stats(prompt=len(prompt)), []
    loop = speculative(
        decoder, sequence, make_choice(sampling), stats, count, DraftLength(policy), LookupDrafter(texts)
    )
    for step in solo(loop, decoder):
        steps.append(step)
        assert_consistent(decoder, sequence, stats)
    return steps, stats, decoder


class Repeats(ScriptedModel):
    """A model whose greedy text repeats with a period."""

    def __init__(self, period: int) -> None:
        super().__init__(vocab_size=20)
        self._period = period

    def next_token(self, tokens: Sequence[int]) -> int:  # type: ignore[override]
        return len(list(tokens)) % self._period

    def final(self, text):  # type: ignore[no-untyped-def]
        logits = super().final(text).copy()
        logits[text.length % self._period] = 9.0
        return logits


@examples(150)
@given(
    models,
    prompts,
    st.none() | st.lists(prompts, min_size=1, max_size=3).map(TextIndex),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_drafts_that_are_looked_up_change_no_token(
    model: ScriptedModel,
    prompt: list[int],
    texts: TextIndex | None,
    most: int,
    bonus: bool,
    adaptive: bool,
    is_cut: bool,
) -> None:
    policy = DraftPolicy(most, is_adaptive=adaptive, has_bonus=bonus)
    steps, stats, decoder = decode(model, prompt, policy, 40, is_cut=is_cut, texts=texts)
    assert [step.token for step in steps] == model.continuation(prompt, 40, decoder.max_length)
    assert set(stats.drafted_by) <= {"lookup", "texts"}


def test_a_text_that_repeats_itself_takes_few_rounds_without_any_exit() -> None:
    steps, stats, _ = decode(Repeats(5), [0, 1, 2, 3, 4, 0, 1], DraftPolicy(7, has_bonus=True), 40)
    assert [step.token for step in steps] == [(7 + i) % 5 for i in range(40)]
    assert (stats.verify_runs, stats.rejected) == (5, 0)
    assert stats.drafted_by == stats.accepted_by == {"lookup": stats.accepted}


def test_other_texts_draft_where_the_own_text_has_nothing() -> None:
    texts = TextIndex([[*range(5, 20), 3], [8, 9]])
    found = LookupDrafter(texts).draft(2, [1, 8, 9], 4, 0.0)
    assert [proposal.token for proposal in found.proposals] == [10, 11, 12, 13]
    assert {proposal.origin for proposal in found.proposals} == {"texts"}


def test_the_longer_match_wins_and_the_own_text_among_equals() -> None:
    drafter = LookupDrafter(TextIndex([[1, 2, 3, 50]]))
    assert drafter.find([2, 3, 60, 7, 2, 3]).name == "lookup"  # type: ignore[union-attr]
    drafter = LookupDrafter(TextIndex([[7, 2, 3, 50]]))
    found = drafter.find([2, 3, 60, 7, 2, 3])
    assert found is not None
    assert (found.name, found.length, found.tokens(1)) == ("texts", 3, [50])


def test_a_text_without_a_repetition_is_decoded_plainly() -> None:
    drafter = LookupDrafter()
    drafter.start([1, 2, 3, 4], 0)
    assert not drafter.draft(3, [1, 2, 3, 4], 5, 0.0).proposals


# Chi-square as in test_sampled_speculation: level 1e-4, power 0.99 at an effect of w = 0.15. Three tokens of four are
# drawn after a prompt in which every pair of them occurs, so that lookup always drafts.
ONE_HOT_VOCAB = 4
PAIRS = [0, 0, 1, 1, 0, 2, 2, 1, 2, 0, 3, 3, 0, 1, 3, 1, 2, 3, 2, 0, 0]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(1.0, seed=1),
        SamplingParams(0.7, top_k=3, seed=2),
        SamplingParams(1.2, top_p=0.9, repetition_penalty=1.2, seed=3),
    ],
)
def test_sampling_with_certain_drafts_draws_from_the_distribution_of_plain_sampling(params: SamplingParams) -> None:
    model = ScriptedModel(seed=5, vocab_size=ONE_HOT_VOCAB, sure_at=[len(PAIRS)])
    first = model.next_token(PAIRS)

    def grown(text: list[int], mass: float, left: int) -> dict[tuple[int, ...], float]:
        if not left:
            return {tuple(text[len(PAIRS) :]): mass}
        found = distribution(model.final(model.prefix(text)), params, text)
        cells: dict[tuple[int, ...], float] = {}
        for token, probability in zip(found.ids.tolist(), found.probs.tolist(), strict=True):
            cells |= grown([*text, token], mass * probability, left - 1)
        return cells

    expected = grown([*PAIRS, first], 1.0, 3)
    choice, counts, drafts = SampledChoice(params), Counter[tuple[int, ...]](), Stats()
    decoder, sequence = ScriptedDecoder(model, is_cut=False), TokenSequence()
    for _ in range(samples_for(0.99, 0.15, len(expected) - 1, 1e-4)):
        sequence.restart(PAIRS)
        stats = Stats()
        loop = speculative(
            decoder, sequence, choice, stats, 4, DraftLength(DraftPolicy(3, has_bonus=True)), LookupDrafter()
        )
        counts[tuple(step.token for step in solo(loop, decoder))] += 1
        drafts.accepted += stats.accepted
        drafts.rejected += stats.rejected
    cells = sorted(expected | counts)
    assert p_value([counts[cell] for cell in cells], [expected.get(cell, 0.0) for cell in cells]) > 1e-4
    assert drafts.accepted > 500
    assert drafts.rejected > 500
