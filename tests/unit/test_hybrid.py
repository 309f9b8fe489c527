"""Which source drafts a round: no choice changes a token, and on scripted costs the choice is the best there is."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.scripted import Prefix, ScriptedDecoder, ScriptedModel, scripted_time
from helpers.scripted_runs import assert_consistent
from helpers.scripted_texts import SAMPLINGS, examples, models, prompts
from shortstack.runtime.decode.choice import make_choice
from shortstack.runtime.decode.draft_length import DraftLength, DraftPolicy
from shortstack.runtime.decode.drafters import ExitDrafter
from shortstack.runtime.decode.hybrid import HybridDrafter, Knowledge, Plan
from shortstack.runtime.decode.lookup import LookupDrafter
from shortstack.runtime.decode.plain import plain
from shortstack.runtime.decode.runs import solo
from shortstack.runtime.decode.sampling import SamplingParams
from shortstack.runtime.decode.sequence import TokenSequence
from shortstack.runtime.decode.speculative import speculative
from shortstack.runtime.decode.step import Stats
from shortstack.runtime.decode.text_index import TextIndex

POLICY = DraftPolicy(4, is_adaptive=True, max_lookup_tokens=15)
# Seconds: 0.25 for a row below the exit, 0.1 for its head, 0.75 for one above; a plain step takes 1.0.
CHEAP = {"verify_s": [0.75 + 0.03 * row for row in range(16)], "rows_s": [0.25 + 0.01 * row for row in range(16)]}
DEAR = {"verify_s": [0.75 + 0.6 * row for row in range(16)], "rows_s": [0.25 + 0.2 * row for row in range(16)]}
Way = Literal["plain", "exit", "lookup", "auto"]


class Spoken(ScriptedModel):
    """A model that says one text, whatever stands before; its exit agrees as in :class:`ScriptedModel`."""

    def __init__(self, text: Sequence[int], agreement: float | Sequence[bool], vocab_size: int = 2000) -> None:
        super().__init__(seed=1, vocab_size=vocab_size, agreement=agreement)
        self._text = text

    def final(self, text: Prefix) -> np.ndarray:  # type: ignore[type-arg]
        if text.final_logits is None:
            logits = np.zeros(self.vocab_size, np.float32)
            logits[self._text[text.length % len(self._text)]] = 9.0
            text.final_logits = logits
        return text.final_logits

    def exit(self, text: Prefix) -> np.ndarray:  # type: ignore[type-arg]
        if text.exit_logits is None:
            wanted = int(self.final(text).argmax())
            logits = np.zeros(self.vocab_size, np.float32)
            logits[wanted if self._agrees(text) else (wanted + 1) % self.vocab_size] = 9.0
            text.exit_logits = logits
        return text.exit_logits


def repeating(count: int, every: int = 40) -> list[int]:
    """A text that repeats what came ``every`` tokens before."""
    return [100 + i % every for i in range(count)]


def fresh(count: int, seed: int = 0) -> list[int]:
    """A text in which no pair of tokens comes twice."""
    rng, seen, text = random.Random(seed), set[tuple[int, int]](), [0]
    while len(text) < count:
        token = rng.randrange(2000)
        if (text[-1], token) not in seen:
            seen.add((text[-1], token))
            text.append(token)
    return text


def misleading(count: int) -> list[int]:
    """A text in which every pair comes again and again, each time followed by another token."""
    rng = random.Random(5)
    return [token for _ in range(count // 3 + 1) for token in (1, 2, 10 + rng.randrange(1900))][:count]


def timed(
    model: ScriptedModel,
    way: Way,
    costs: dict[str, list[float]],
    count: int = 400,
    *,
    prompt: Sequence[int] = (),
    known: Knowledge | None = None,
    policy: DraftPolicy = POLICY,
    draft_s: float = 0.25,
) -> tuple[float, Stats]:
    """Decode, and return the seconds after the prompt, and the counts."""
    decoder = ScriptedDecoder(
        model, max_length=2048, draft_s=draft_s, head_s=0.4 * draft_s, sees_state=False, is_cut=way != "lookup", **costs
    )
    if way == "lookup":  # a stack without an exit judges through all layers
        decoder = ScriptedDecoder(
            model,
            max_length=2048,
            is_cut=False,
            verify_s=[a + b for a, b in zip(costs["verify_s"], costs["rows_s"], strict=True)],
        )
    sequence, stats, choice = TokenSequence(prompt or [0]), Stats(), make_choice(SamplingParams())
    with scripted_time(decoder):
        if way == "plain":
            loop = plain(decoder, sequence, choice, stats, count)
        elif way == "exit":
            loop = speculative(
                decoder, sequence, choice, stats, count, DraftLength(policy), ExitDrafter(decoder, choice)
            )
        else:
            own = ExitDrafter(decoder, choice) if way == "auto" else None
            hybrid = HybridDrafter(decoder, choice, policy, known or Knowledge(), own, LookupDrafter())
            loop = speculative(decoder, sequence, choice, stats, count, hybrid, hybrid)
        tokens = [step.token for step in solo(loop, decoder)]
    assert tokens == model.continuation(prompt or [0], count, 2048)
    assert stats.is_balanced
    return decoder.clock.now_s - 1.0, stats


policies = st.builds(
    DraftPolicy,
    max_draft_tokens=st.integers(1, 6),
    confidence=st.sampled_from([0.0, 0.3, 0.5]),
    is_adaptive=st.just(True),
    has_bonus=st.booleans(),
    max_lookup_tokens=st.none() | st.integers(1, 15),
)
costs = st.lists(st.floats(0.1, 3.0), min_size=16, max_size=16).map(sorted)


@examples(200)
@given(
    models,
    prompts,
    policies,
    st.sampled_from(SAMPLINGS),
    st.none() | st.lists(prompts, min_size=1, max_size=3).map(TextIndex),
    costs,
    st.booleans(),
    st.booleans(),
)
def test_whatever_is_chosen_the_tokens_are_those_of_plain_decoding(
    model: ScriptedModel,
    prompt: list[int],
    policy: DraftPolicy,
    sampling: SamplingParams,
    texts: TextIndex | None,
    verify_s: list[float],
    is_cut: bool,
    sees_state: bool,
) -> None:
    decoder = ScriptedDecoder(model, is_cut=is_cut, verify_s=verify_s, head_s=0.1, sees_state=sees_state)
    choice, stats, sequence = make_choice(sampling), Stats(prompt=len(prompt)), TokenSequence(prompt)
    own = ExitDrafter(decoder, choice) if is_cut else None
    hybrid = HybridDrafter(decoder, choice, policy, Knowledge(), own, LookupDrafter(texts))
    with scripted_time(decoder):
        steps = []
        for step in solo(speculative(decoder, sequence, choice, stats, 50, hybrid, hybrid), decoder):
            steps.append(step)
            assert_consistent(decoder, sequence, stats)
    assert len(steps) == min(50, decoder.max_length - len(prompt))
    if sampling == SamplingParams():
        assert [step.token for step in steps] == model.continuation(prompt, 50, decoder.max_length)


def test_all_sources_are_counted_apart_and_add_up() -> None:
    """Rounds of all sources, and rounds of two, in one text."""
    text = [*fresh(60), *repeating(200), *misleading(60)]
    model = Spoken(text, agreement=[i % 5 != 0 for i in range(len(text))])
    _, stats = timed(model, "auto", CHEAP, 300)
    assert stats.drafted_by.keys() == {"exit", "lookup"}
    assert sum(stats.drafted_by.values()) == stats.drafted
    assert sum(stats.accepted_by.values()) == stats.accepted
    assert sum(stats.drafted_at) == stats.drafted


CASES = {
    "a text that repeats itself, a bad exit": (Spoken(repeating(500), 0.0), CHEAP, "lookup"),
    "a fresh text, a good exit": (Spoken(fresh(500), 0.9), CHEAP, "exit"),
    "a fresh text, a bad exit": (Spoken(fresh(500), 0.1), CHEAP, "plain"),
    "a misleading text, a bad exit, dear rows": (Spoken(misleading(500), 0.0), DEAR, "plain"),
    "a repeating text, dear rows": (Spoken(repeating(500), 0.9), DEAR, "lookup"),
    "a fresh text, a good exit, dear rows": (Spoken(fresh(500), 0.7), DEAR, "plain"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_best_single_source_is_found(case: str) -> None:
    model, costs, best = CASES[case]
    seconds = {way: timed(model, way, costs)[0] for way in ("plain", "exit", "lookup", "auto")}  # type: ignore[arg-type]
    # the way that is named is the best of those that decode by one source, or within the cost of its own measurements
    assert seconds[best] <= 1.03 * min(seconds[way] for way in ("plain", "exit", "lookup"))
    assert seconds["auto"] <= 1.03 * seconds[best], seconds


def test_where_a_text_changes_each_part_gets_its_source() -> None:
    text = [*fresh(150), *repeating(150), *fresh(150, seed=9), *repeating(50)]
    agreement = [i < 150 or i >= 300 for i in range(500)]
    model = Spoken(text, agreement)
    seconds = {way: timed(model, way, CHEAP, 480)[0] for way in ("plain", "exit", "lookup", "auto")}  # type: ignore[arg-type]
    assert seconds["auto"] < 0.85 * min(seconds["plain"], seconds["exit"], seconds["lookup"]), seconds


@pytest.mark.parametrize("text", [fresh(400), misleading(400)], ids=["fresh", "misleading"])
@pytest.mark.parametrize("cost", [CHEAP, DEAR], ids=["cheap", "dear"])
@pytest.mark.parametrize("agreement", [0.0, 0.15])
def test_drafting_that_cannot_pay_costs_two_per_cent_at_most_in_a_short_answer(
    text: list[int], cost: dict[str, list[float]], agreement: float
) -> None:
    model = Spoken(text, agreement)
    for count in (64, 128, 300):
        known = Knowledge()  # nothing is known yet
        seconds, _ = timed(model, "auto", cost, count, known=known)
        assert seconds <= 1.02 * timed(model, "plain", cost, count)[0]
        again, _ = timed(model, "auto", cost, count, known=known)
        assert again <= 1.02 * timed(model, "plain", cost, count)[0]


def test_without_an_exit_a_text_without_repetitions_costs_nothing() -> None:
    model = Spoken(fresh(300), 0.0)
    seconds, stats = timed(model, "lookup", CHEAP, 200)
    assert stats.rounds == 0
    assert seconds == pytest.approx(timed(model, "plain", CHEAP, 200)[0])


def test_an_exit_that_becomes_good_is_used_again() -> None:
    model = Spoken(fresh(600), [False] * 150 + [True] * 500)
    _, stats = timed(model, "auto", CHEAP, 600)
    assert stats.accepted > 250


def test_an_exit_that_becomes_bad_is_turned_off() -> None:
    model = Spoken(fresh(600), [True] * 150 + [False] * 500)
    seconds, stats = timed(model, "auto", CHEAP, 600)
    assert stats.rejected < 60
    assert seconds < 1.03 * (450 + 150 / 1.5)


def test_a_cost_that_was_measured_in_a_bad_moment_does_not_keep_lookup_off() -> None:
    known = Knowledge()
    known.costs.observe_plain(1.0)
    for rows in range(2, 17):
        known.costs.observe_whole(rows, 20.0, 20.0)
    seconds, stats = timed(Spoken(repeating(500), 0.0), "auto", CHEAP, known=known)
    assert stats.accepted > 250
    assert seconds < 0.5 * 400


def test_the_exit_goes_on_behind_a_lookup_where_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    # Pairs come again and are followed by one more right token, then by new ones, which the exit knows.
    rng = random.Random(2)
    text = [token for _ in range(100) for token in (1, 2, 3, *(10 + rng.randrange(1900) for _ in range(4)))]
    model = Spoken(text, 0.97)
    kinds = Counter[str]()
    planned = HybridDrafter._planned

    def counted(self: HybridDrafter, max_rows: int) -> Plan:
        plan = planned(self, max_rows)
        kinds[plan.kind] += 1
        return plan

    monkeypatch.setattr(HybridDrafter, "_planned", counted)
    options: dict[str, Any] = {"policy": DraftPolicy(2, is_adaptive=True, max_lookup_tokens=15), "draft_s": 0.05}
    low = {"verify_s": [0.95 + 0.03 * row for row in range(16)], "rows_s": [0.05] * 16}
    seconds, stats = timed(model, "auto", low, 600, **options)
    assert kinds["both"] > 20
    assert stats.accepted_by["lookup"] > 15
    assert stats.accepted_by["exit"] > 200
    assert seconds < timed(model, "exit", low, 600, **options)[0]
