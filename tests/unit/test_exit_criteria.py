"""Criteria of early exit: when each one lets a token leave, how it is written, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.scripted_texts import examples
from shortstack.graphs.errors import RequestError
from shortstack.graphs.plan import ExitSpec, SplitPlan
from shortstack.runtime.early_exit.criteria import (
    MEASURES,
    Bound,
    Combined,
    Criterion,
    Fixed,
    MaxDepth,
    Patience,
    Threshold,
    Votes,
)
from shortstack.runtime.early_exit.expression import parse_criterion
from shortstack.runtime.early_exit.policy import ExitPolicy
from shortstack.runtime.early_exit.reading import Reading, cosine

LOWEST = Reading(
    exit_layer=4,
    token=7,
    top_prob=0.8,
    margin=0.6,
    entropy=0.5,
    gate=0.7,
    similarity=None,
    position=0,
    max_new_tokens=101,
    below=(),
)
PLAN = SplitPlan(30, (ExitSpec(4), ExitSpec(8, has_gate=True), ExitSpec(12)))


def column(*tokens: int, probs: tuple[float, ...] = (0.8, 0.8, 0.8, 0.8)) -> Reading:
    """Return the last exit's reading for a position, with those of the exits below."""
    below: tuple[Reading, ...] = ()
    for index, token in enumerate(tokens):
        newest = replace(LOWEST, exit_layer=4 * (index + 1), token=token, top_prob=probs[index], below=below)
        below = (*below, newest)
    return newest


@pytest.mark.parametrize(
    ("expression", "reading", "leaves"),
    [
        ("top_prob >= 0.8", LOWEST, True),
        ("top_prob >= 0.81", LOWEST, False),
        ("margin >= 0.6", LOWEST, True),
        ("margin >= 0.7", LOWEST, False),
        ("entropy <= 0.5", LOWEST, True),
        ("entropy <= 0.4", LOWEST, False),
        ("gate >= 0.7", LOWEST, True),
        ("gate >= 0.71", LOWEST, False),
        ("gate >= 0", replace(LOWEST, gate=None), False),
        ("similarity >= -1", LOWEST, False),  # there is no exit below to compare with
        ("similarity >= 0.9", replace(LOWEST, similarity=0.95), True),
        ("similarity >= 0.9", replace(LOWEST, similarity=0.85), False),
        ("patience >= 1", column(1), True),
        ("patience >= 2", column(1), False),
        ("patience >= 2", column(1, 2), False),
        ("patience >= 2", column(1, 2, 2), True),
        ("patience >= 3", column(2, 1, 2, 2), False),
        ("votes >= 3", column(2, 1, 2, 2), True),
        ("votes >= 2", column(2, 1), False),
        ("mean_prob >= 0.4", column(1, 2), True),
        ("mean_prob >= 0.41", column(1, 2), False),
        ("mean_prob >= 0.7", column(2, 2, probs=(0.6, 0.8, 0, 0)), True),
        ("max_depth = 8..4", LOWEST, False),
        ("max_depth = 8..4", replace(LOWEST, position=99), False),
        ("max_depth = 8..4", replace(LOWEST, position=100), True),
        ("max_depth = 8..4", replace(LOWEST, exit_layer=6, position=50), True),
        ("max_depth = 8..4", replace(LOWEST, exit_layer=6, position=49), False),
        ("never", LOWEST, False),
        ("always", LOWEST, True),
        ("top_prob >= 0.9 [4: 0.5]", LOWEST, True),
        ("top_prob >= 0.5 [4: 0.9, 8: 0]", LOWEST, False),
        ("top_prob >= 0.9 [8: 0.5]", LOWEST, False),
        ("top_prob >= 0.5 and margin >= 0.9", LOWEST, False),
        ("top_prob >= 0.9 or margin >= 0.5", LOWEST, True),
        ("never and always or always", LOWEST, True),  # `and` binds more tightly
        ("never and (always or always)", LOWEST, False),
    ],
)
def test_a_criterion_means_what_the_table_says(expression: str, reading: Reading, leaves: bool) -> None:
    assert parse_criterion(expression).leaves(reading) is leaves


def test_a_threshold_decays_as_in_calm() -> None:
    criterion = parse_criterion("top_prob >= 0.8 ~ 4")
    assert isinstance(criterion, Bound)
    for position in (0, 10, 101):
        expected = 0.9 * 0.8 + 0.1 * 0.8 * math.exp(-4 * position / 101)
        assert criterion.threshold.at(replace(LOWEST, position=position)) == pytest.approx(expected)
    assert criterion.threshold.at(LOWEST) == pytest.approx(0.8)


def test_the_cosine_is_computed_in_float32() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 64))
    expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert cosine(a.astype(np.float32), b.astype(np.float32)) == pytest.approx(expected, abs=1e-6)
    assert cosine(a.astype(np.float16), a.astype(np.float16)) == pytest.approx(1, abs=1e-6)
    assert cosine(np.zeros(4, np.float32), np.ones(4, np.float32)) == 0


numbers = st.floats(0, 1, allow_nan=False)
thresholds = st.builds(
    Threshold,
    numbers,
    st.dictionaries(st.integers(1, 99), numbers, max_size=3).map(lambda d: tuple(sorted(d.items()))),
    st.none() | st.floats(0.1, 10),
)
simple = (
    st.builds(Bound, st.sampled_from([m for m in MEASURES if m != "entropy"]), thresholds)
    | st.builds(Bound, st.just("entropy"), st.builds(Threshold, numbers))
    | st.builds(Patience, st.integers(1, 9))
    | st.builds(Votes, st.integers(1, 9))
    | st.builds(lambda a, b: MaxDepth(max(a, b), min(a, b)), st.integers(1, 40), st.integers(1, 40))
    | st.builds(Fixed, st.booleans())
)


def groups(inner: st.SearchStrategy[Criterion]) -> st.SearchStrategy[Criterion]:
    several = st.lists(inner, min_size=2, max_size=3).map(tuple)
    return st.builds(Combined, several, st.sampled_from(["and", "or"]))


@examples(300)
@given(st.recursive(simple, groups, max_leaves=6), st.floats(0, 1), st.integers(0, 100))
def test_a_criterion_written_as_text_is_read_back_the_same(
    criterion: Criterion, top_prob: float, position: int
) -> None:
    again = parse_criterion(str(criterion))
    assert str(parse_criterion(str(again))) == str(again)
    reading = replace(LOWEST, top_prob=top_prob, position=position)
    assert again.leaves(reading) == criterion.leaves(reading)
    assert again.needs == criterion.needs
    assert again.exit_layers == criterion.exit_layers
    assert again.least_exits == criterion.least_exits


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("", "the end"),
        ("top_prob", "found: the end"),
        ("top_prob <= 0.5", "found: <=, expected: >="),
        ("entropy >= 0.5", "found: >=, expected: <="),
        ("top_prob >= high", "found: high, expected: a number"),
        ("top_prob >= -0.1", "threshold of top_prob is out of range"),
        ("top_prob >= 1e999", "threshold of top_prob is out of range"),
        ("entropy <= -1", "threshold of entropy is out of range"),
        ("similarity >= -2", "threshold of similarity is out of range"),
        ("top_prob >= 90", "found: 90, expected: 0..1. Write 0.9 for 90 percent; `never` lets no token leave"),
        ("top_prob >= 1.01", "found: 1.01, expected: 0..1. Write 0.0101 for 1.01 percent"),
        ("margin >= 50 or always", "Write 0.5 for 50 percent"),
        ("mean_prob >= 120", "expected: 0..1. Give a number of this range"),
        ("gate >= 0.5 [4: 80]", "Write 0.8 for 80 percent"),
        ("similarity >= 99", "expected: -1..1. Write 0.99 for 99 percent"),
        ("entropy <= 50", "expected: 0..14 nats. Give a number of this range; `always` lets every token leave"),
        ("top_prob > 0.5", "found: >, expected: >=. Write >= in place of >"),
        ("entropy < 0.5", "found: <, expected: <=. Write <= in place of <"),
        ("top_prob = 0.5", "found: =, expected: >=. Write >= in place of ="),
        ("top_prob == 0.5", "Write >= in place of =="),
        ("margin => 0.5", "Write >= in place of =>"),
        ("patience > 2", "Write >= in place of >"),
        ("max_depth >= 8..4", "Write = in place of >="),
        ("top_prob 0.5", "found: 0.5, expected: >=. Write a rule such as 'top_prob >= 0.9'"),
        ("top_prob >= 0.5 [4: 0.9, 4: 0.5]", "found: 4, expected: an exit that has no threshold yet"),
        ("top_prob >= 0.5 [4: -1]", "threshold of top_prob is out of range"),
        ("top_prob >= 0.5 ~ 0", "decay of top_prob"),
        ("entropy <= 0.5 ~ 4", "entropy has no decay"),
        ("patience >= 0", "exit criterion patience"),
        ("votes >= 1.5", "expected: a whole number"),
        ("max_depth = 4..8", "max_depth"),
        ("confidence >= 0.5", "found: confidence"),
        ("top_prob >= 0.5 and", "found: the end"),
        ("top_prob >= 0.5 margin >= 0.5", "found: margin"),
        ("(top_prob >= 0.5", "found: the end, expected: )"),
        ("top_prob >= 0.5; rm", "found: ;"),
        ("__import__('os')", "cannot be read"),
    ],
)
def test_an_expression_that_cannot_be_read_is_refused_with_the_part_at_fault(expression: str, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_criterion(expression)
    assert says.replace("found: ", "found ").replace("expected: ", "expected ") in str(caught.value).replace(
        "found: ", "found "
    ).replace("expected: ", "expected ")


@pytest.mark.parametrize(
    ("expression", "options", "says"),
    [
        ("always", {"exit_layers": (5,)}, "unknown exit 5"),
        ("top_prob >= 0.9 [5: 0.8, 6: 1]", {}, "unknown exit 5, 6"),
        ("gate >= 0.9", {"exit_layers": (4, 12)}, "needs a gate"),
        ("similarity >= 0.9", {"exit_layers": (4,)}, "needs at least 2 exits"),
        ("patience >= 4", {}, "needs at least 4 exits"),
        ("max_depth = 40..30", {}, "lets no token leave"),
        ("votes >= 9 and always", {}, "needs at least 9 exits"),
    ],
)
def test_a_bundle_that_lacks_what_the_policy_needs_is_refused(
    expression: str, options: dict[str, tuple[int, ...]], says: str
) -> None:
    policy = ExitPolicy(parse_criterion(expression), **options)
    with pytest.raises(RequestError, match=says):
        policy.exits_in(PLAN)


@pytest.mark.parametrize(
    "options",
    [
        {"verify": "sometimes"},
        {"kv_policy": "lazy"},
        {"max_pending": 0},
        {"exit_layers": ()},
        {"rollback_below": 0.5},
        {"verify": "rollback", "rollback_below": 1.5},
        {"verify": "exact", "kv_policy": "pipeline"},
        {"verify": "rollback", "kv_policy": "auto"},
        {"prefill_exit": True, "kv_policy": "pipeline"},
        {"prefill_exit": True, "verify": "exact"},
    ],
)
def test_options_that_are_unknown_or_do_not_go_together_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(RequestError):
        ExitPolicy(Fixed(always=True), **options)  # type: ignore[arg-type]


def test_the_exits_in_use_are_those_that_were_asked_for_or_all() -> None:
    assert ExitPolicy(Fixed(always=True)).exits_in(PLAN) == (4, 8, 12)
    assert ExitPolicy(Fixed(always=True), exit_layers=(12, 4)).exits_in(PLAN) == (4, 12)
    assert ExitPolicy(parse_criterion("gate >= 0.5")).exits_in(PLAN) == (4, 8, 12)
    with pytest.raises(RequestError, match="this bundle has none"):
        ExitPolicy(Fixed(always=True)).exits_in(SplitPlan(30, ()))
    states = SplitPlan(30, (ExitSpec(4, branch="linear", sees_state=True),))
    with pytest.raises(RequestError, match="state"):
        ExitPolicy(Fixed(always=True), prefill_exit=True).exits_in(states)
