"""Which judged row's state a round keeps for the next one: that of the position before the newest token.

The scripted decoder checks the content of the state on each draft. These tests check the row itself, for every way in
which a round can end.
"""

from __future__ import annotations

import pytest

from helpers.scripted import ScriptedDecoder, ScriptedModel
from helpers.scripted_runs import self_speculative
from shortstack.runtime.decode.choice import make_choice
from shortstack.runtime.decode.draft_length import DraftLength, DraftPolicy
from shortstack.runtime.decode.plain import plain
from shortstack.runtime.decode.runs import solo
from shortstack.runtime.decode.sampling import SamplingParams
from shortstack.runtime.decode.sequence import TokenSequence
from shortstack.runtime.decode.step import Stats

PROMPT = [1, 2, 3]
GREEDY = SamplingParams()
ENDS = [(k, accepted) for k in range(1, 7) for accepted in range(k + 1)]


def decoder_after_prompt(agreements: list[bool]) -> ScriptedDecoder:
    """A decoder whose exit agrees as listed at the positions that the first round drafts, and at none after them."""
    pattern = [False] * 64
    pattern[len(PROMPT) + 1 : len(PROMPT) + 1 + len(agreements)] = agreements
    return ScriptedDecoder(ScriptedModel(seed=5, agreement=pattern))


@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize(("k", "accepted"), ENDS)
def test_the_next_round_begins_after_the_row_that_predicted_the_newest_token(
    k: int, accepted: int, bonus: bool
) -> None:
    decoder = decoder_after_prompt([True] * accepted + [False] * (k - accepted))
    stats = Stats()
    length = DraftLength(DraftPolicy(k, has_bonus=bonus))
    list(self_speculative(decoder, TokenSequence(PROMPT), make_choice(GREEDY), stats, 40, length))
    emitted = accepted + 1 if accepted < k or bonus else k  # a full accept without bonus ends in its last draft
    assert stats.accepted == accepted
    assert decoder.kept_rows[0] == emitted - 1


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=0.9, seed=3)])
@pytest.mark.parametrize("bonus", [False, True])
def test_sampled_drafts_keep_the_row_before_the_newest_token_too(bonus: bool, sampling: SamplingParams) -> None:
    decoder = ScriptedDecoder(ScriptedModel(seed=2, agreement=0.8))
    stats = Stats()
    length = DraftLength(DraftPolicy(4, has_bonus=bonus))
    list(self_speculative(decoder, TokenSequence(PROMPT), make_choice(sampling), stats, 50, length))
    assert stats.emitted == 1 + sum(row + 1 for row in decoder.kept_rows)
    assert len(set(decoder.kept_rows)) > 2


def test_a_generation_stopped_anywhere_drafts_from_the_right_state_in_its_next_turn() -> None:
    """The prefill of a turn sets the state, no matter what the round before it left."""
    for taken in range(1, 20):
        decoder = ScriptedDecoder(ScriptedModel(seed=2, agreement=0.8))
        sequence = TokenSequence(PROMPT)
        length = DraftLength(DraftPolicy(4, has_bonus=taken % 2 > 0))
        steps = self_speculative(decoder, sequence, make_choice(GREEDY), Stats(), 30, length)
        for _ in range(taken):
            next(steps)
        steps.close()
        text = [*sequence.tokens, 6, 7]
        sequence.restart(text)
        again = self_speculative(decoder, sequence, make_choice(GREEDY), Stats(), 9, length)
        assert [step.token for step in again] == decoder.model.continuation(text, 9, 99)


def test_plain_steps_leave_the_state_for_a_draft_after_them() -> None:
    decoder = ScriptedDecoder(ScriptedModel(seed=2, agreement=0.8))
    list(solo(plain(decoder, TokenSequence(PROMPT), make_choice(GREEDY), Stats(), 5), decoder))
    assert not decoder.kept_rows  # one judged row is row 0 already
    past = len(PROMPT) + 4
    newest = decoder.model.continuation(PROMPT, 5, 99)[-1]
    decoder.put(0, newest)
    decoder.draft(0, past, with_head=True, with_logits=False)
