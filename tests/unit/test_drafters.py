"""Where drafts come from: a drafter that knows nothing about the loop changes which runs are made, never the output."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.scripted import Call, ScriptedDecoder, ScriptedModel
from helpers.scripted_runs import assert_consistent
from helpers.scripted_texts import VOCAB, examples, models, prompts
from shortstack.runtime.decode.choice import GreedyChoice, Proposal
from shortstack.runtime.decode.draft_length import DraftLength, DraftPolicy
from shortstack.runtime.decode.drafters import Draft, ExitDrafter
from shortstack.runtime.decode.runs import solo
from shortstack.runtime.decode.sequence import TokenSequence
from shortstack.runtime.decode.speculative import speculative
from shortstack.runtime.decode.step import Stats, Step


class LookUp:
    """Runs no layer: proposes the same tokens in each round, or those that followed the last occurrence of the newest.

    Attributes:
        observed: For each round, the numbers of tokens emitted and of rows judged that it was notified of.
    """

    def __init__(self, tokens: Sequence[int] | None = None) -> None:
        self._tokens = tokens
        self.observed: list[tuple[int, int]] = []
        self.is_ended = False

    def start(self, tokens: Sequence[int], cached: int) -> int:
        return cached

    def end(self) -> None:
        self.is_ended = True

    def draft(self, past: int, tokens: Sequence[int], most: int, least_confidence: float) -> Draft:
        assert past == len(tokens) - 1
        found = self._tokens
        if found is None:
            before = [i for i, token in enumerate(tokens[:-1]) if token == tokens[-1]]
            found = tokens[before[-1] + 1 :] if before else ()
        return Draft([Proposal(token, 1.0, 0) for token in found[:most]])

    def observe(self, emitted: int, rows: int) -> None:
        self.observed.append((emitted, rows))


def decode(
    model: ScriptedModel, prompt: Sequence[int], drafter: LookUp, policy: DraftPolicy, count: int, *, is_cut: bool
) -> tuple[list[Step], Stats, ScriptedDecoder]:
    decoder = ScriptedDecoder(model, is_cut=is_cut)
    sequence, stats, steps = TokenSequence(prompt), Stats(prompt=len(prompt)), []
    loop = speculative(decoder, sequence, GreedyChoice(), stats, count, DraftLength(policy), drafter)
    for step in solo(loop, decoder):
        steps.append(step)
        assert_consistent(decoder, sequence, stats)
    return steps, stats, decoder


@examples(150)
@given(
    models,
    prompts,
    st.none() | st.lists(st.integers(0, VOCAB - 1), max_size=6),
    st.integers(1, 6),
    st.booleans(),
    st.booleans(),
)
def test_whatever_a_drafter_proposes_the_tokens_are_those_of_plain_decoding(
    model: ScriptedModel, prompt: list[int], tokens: list[int] | None, most: int, bonus: bool, is_cut: bool
) -> None:
    drafter = LookUp(tokens)
    steps, stats, decoder = decode(model, prompt, drafter, DraftPolicy(most, has_bonus=bonus), 30, is_cut=is_cut)
    assert [step.token for step in steps] == model.continuation(prompt, 30, decoder.max_length)
    assert sum(step.from_draft for step in steps) == stats.accepted
    assert all(step.exit_layer == (0 if step.from_draft else decoder.num_layers) for step in steps)
    assert sum(emitted for emitted, _ in drafter.observed) == stats.emitted - 1  # the first is the prompt's


def test_rows_that_the_drafter_did_not_run_are_run_before_they_are_judged() -> None:
    model = ScriptedModel(seed=1)
    right = model.continuation([1, 2, 3], 4, 99)[1:]  # after the prompt's token
    steps, _, decoder = decode(model, [1, 2, 3], LookUp(right), DraftPolicy(3, has_bonus=True), 5, is_cut=True)
    headless = Call("draft", 3, 4, with_head=False)
    assert decoder.calls == [Call("prefill", 0, 3), headless, Call("verify", 3, 4)]
    assert [step.from_draft for step in steps] == [False, True, True, True, False]


def test_a_drafter_that_finds_nothing_makes_plain_steps() -> None:
    steps, stats, decoder = decode(ScriptedModel(), [1, 2], LookUp([]), DraftPolicy(4), 6, is_cut=False)
    assert len(steps) == 6
    assert (stats.plain, stats.rounds, stats.drafted) == (5, 0, 0)
    assert [call.rows for call in decoder.calls if call.kind == "verify"] == [1] * 5


def test_a_drafter_is_notified_of_plain_steps_between_its_rounds() -> None:
    drafter = LookUp([0, 1])
    policy = DraftPolicy(4, is_adaptive=True)  # starts with a plain step, because its cost is not known yet
    decode(ScriptedModel(agreement=0.0), [1, 2], drafter, policy, 8, is_cut=True)
    assert drafter.observed[0] == (1, 1)


@pytest.mark.parametrize(("least", "drafted"), [(0.0, 3), (0.5, 3), (0.500001, 1)])
def test_the_exit_stops_after_a_token_below_the_least_confidence(least: float, drafted: int) -> None:
    decoder = ScriptedDecoder(ScriptedModel())
    decoder.prefill([1, 2], 0, False)
    decoder.put(0, 3)
    run = decoder.draft

    def draft(row: int, past: int, with_head: bool, with_logits: bool) -> None:
        run(row, past, with_head, with_logits)
        decoder.exit.top_prob[row] = 0.5

    decoder.draft = draft  # type: ignore[method-assign]
    proposing = ExitDrafter(decoder, GreedyChoice()).draft(2, [1, 2, 3], 3, least)
    found = None
    while found is None:
        try:
            next(proposing).on(decoder)  # type: ignore[arg-type]
        except StopIteration as returned:
            found = returned.value
    assert len(found.proposals) == found.rows_run == drafted
    assert {proposal.depth for proposal in found.proposals} == {decoder.exit_layer}
