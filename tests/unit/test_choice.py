"""Choosing and judging tokens on scripted heads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from shortstack.runtime.decode.choice import Choice, GreedyChoice, Proposal, SampledChoice, Verdict, make_choice
from shortstack.runtime.decode.sampling import SamplingParams
from shortstack.runtime.engine.head import Head

VOCAB = 4
DEPTH = 2


def head(tokens: Sequence[int], *, ids: Sequence[int] | None = None, sharpness: float = 50.0) -> Head:
    """Return a head that predicts these tokens, one per row, with certainty unless the sharpness is small."""
    columns = list(range(VOCAB)) if ids is None else list(ids)
    made = Head(len(tokens), len(columns), np.dtype(np.float32), None if ids is None else np.array(ids, np.int64))
    made.token[:] = tokens
    made.outputs(0, len(tokens), with_logits=True)
    for row, token in enumerate(tokens):
        made.logits[row, columns.index(token)] = sharpness
    return made


CERTAIN = SamplingParams(temperature=1.0, seed=0)  # on heads this sharp, sampling has one outcome


@pytest.mark.parametrize("choice", [GreedyChoice(), SampledChoice(CERTAIN)])
@pytest.mark.parametrize(
    ("drafts", "rows", "expected"),
    [
        ([1, 2, 3], 3, Verdict((1, 2, 3), 3)),  # all accepted, no row left for more
        ([1, 2], 3, Verdict((1, 2, 3), 2)),  # all accepted, and the bonus
        ([1, 0, 3], 3, Verdict((1, 2), 1)),  # drafts after the first wrong one do not count
        ([0, 2, 3], 3, Verdict((1,), 0)),
        ([0], 1, Verdict((1,), 0)),
        ([1], 1, Verdict((1,), 1)),
        ([], 1, Verdict((1,), 0)),  # a plain step in the same form
    ],
)
def test_the_agreeing_part_of_a_draft_is_accepted_and_one_token_of_the_model_follows(
    choice: Choice, drafts: list[int], rows: int, expected: Verdict
) -> None:
    exit_head = head([drafts[row] if row < len(drafts) else 0 for row in range(3)])
    proposals = [choice.propose(exit_head, row, [0], DEPTH) for row in range(len(drafts))]
    assert [proposal.token for proposal in proposals] == drafts
    assert choice.judge(head([1, 2, 3]), rows, proposals, [0]) == expected
    looked_up = [
        Proposal(token, 1.0, 0) for token in drafts
    ]  # as certain as drafts that no distribution was drawn from
    assert choice.judge(head([1, 2, 3]), rows, looked_up, [0]) == expected


@pytest.mark.parametrize("choice", [GreedyChoice(), SampledChoice(CERTAIN)])
def test_a_trimmed_head_proposes_token_ids_and_not_rows(choice: Choice) -> None:
    assert choice.propose(head([3, 1], ids=[1, 3]), 0, [0], DEPTH).token == 3


def test_the_choice_is_the_cheapest_one_for_the_parameters() -> None:
    assert isinstance(make_choice(SamplingParams()), GreedyChoice)
    assert isinstance(make_choice(SamplingParams(top_k=5, top_p=0.5)), GreedyChoice)  # without temperature: no effect
    assert isinstance(make_choice(SamplingParams(temperature=0.5)), SampledChoice)
    assert isinstance(make_choice(SamplingParams(repetition_penalty=1.1)), SampledChoice)


def test_greedy_choice_never_looks_at_logits() -> None:
    blind = Head(1, VOCAB, np.dtype(np.float32), None)
    blind.token[0] = 2
    assert not GreedyChoice.needs_logits
    assert len(blind.logits) == 0
    assert GreedyChoice().pick(blind, 0, []) == 2


def test_the_penalty_of_a_judged_row_sees_the_drafts_accepted_before_it() -> None:
    choice = SampledChoice(SamplingParams(repetition_penalty=100.0))
    exit_head = head([2, 1])
    drafts = [choice.propose(exit_head, 0, [0], DEPTH), choice.propose(exit_head, 1, [0, 2], DEPTH)]
    assert [draft.token for draft in drafts] == [2, 1]
    says_twice = head([2, 2])
    says_twice.logits[1, 1] = 1.0  # second best if 2 is not in the context, best if it is
    assert choice.judge(says_twice, 2, drafts, [0]) == Verdict((2, 1), 2)


def test_a_token_that_the_model_rules_out_is_never_accepted_and_one_it_finds_likelier_always_is() -> None:
    choice = SampledChoice(SamplingParams(temperature=1.0, seed=3))
    wide = head([1], sharpness=0.0)
    for _ in range(200):
        draft = choice.propose(wide, 0, [], DEPTH)
        assert choice.judge(head([2]), 1, [draft], []) == Verdict((2,), int(draft.token == 2))


def test_the_same_seed_gives_the_same_tokens() -> None:
    wide = head([1], sharpness=0.0)
    first, second = (SampledChoice(SamplingParams(temperature=1.0, seed=7)) for _ in range(2))
    picks = [first.pick(wide, 0, []) for _ in range(30)]
    assert picks == [second.pick(wide, 0, []) for _ in range(30)]
    assert len(set(picks)) == VOCAB


def test_a_proposal_has_the_confidence_and_the_depth_of_its_head() -> None:
    exit_head = head([2])
    exit_head.top_prob[0] = 0.25
    for choice in (GreedyChoice(), SampledChoice(CERTAIN)):
        proposal = choice.propose(exit_head, 0, [0], DEPTH)
        assert (proposal.token, proposal.confidence, proposal.depth) == (2, 0.25, DEPTH)


def test_a_token_found_by_lookup_is_accepted_as_often_as_the_model_would_draw_it() -> None:
    choice = SampledChoice(SamplingParams(temperature=1.0, seed=3))
    says = head([1, 1])
    says.logits[0] = np.log([0.1, 0.6, 0.2, 0.1])
    verdicts = [choice.judge(says, 1, [Proposal(1, 1.0, 0)], []) for _ in range(4000)]
    shares = np.bincount([verdict.tokens[0] for verdict in verdicts], minlength=VOCAB) / len(verdicts)
    np.testing.assert_allclose(shares, [0.1, 0.6, 0.2, 0.1], atol=0.03)  # four standard deviations
    assert all(verdict.accepted == (verdict.tokens[0] == 1) for verdict in verdicts)
