"""Sampling options, distributions compared with a definition in plain loops, and exactness of rejection sampling."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shortstack.graphs.errors import ContractError, RequestError
from shortstack.runtime.decode.sampling import Distribution, SamplingParams, accept, distribution, residual

WARM = SamplingParams(temperature=0.8)
# float64 arithmetic on a handful of terms
EXACT = 1e-12
# distribution() chooses and, untruncated, also computes weights in float32
FLOAT32 = 1e-6

quick = settings(deadline=None, max_examples=200)
# Eighths: exact in float32, and ties are common.
logit_lists = st.lists(st.integers(-64, 64), min_size=1, max_size=40).map(lambda row: np.array(row, np.float32) / 8)
temperatures = st.sampled_from([0.5, 1.0, 2.0])


def defined(logits: NDArray[np.float32], params: SamplingParams, context: set[int]) -> dict[int, float]:
    """The definition: applies one option after the other to a plain dict."""
    scores = {row: float(logit) for row, logit in enumerate(logits)}
    for row in context & scores.keys():
        factor = params.repetition_penalty
        scores[row] = scores[row] / factor if scores[row] > 0 else scores[row] * factor
    scores = {row: score / params.temperature for row, score in scores.items()}
    if params.top_k:
        kth = sorted(scores.values(), reverse=True)[: params.top_k][-1]
        scores = {row: score for row, score in scores.items() if score >= kth}
    probs = normalised(scores)
    if params.top_p < 1:
        kept: dict[int, float] = {}
        for row in sorted(probs, key=lambda row: (-probs[row], row)):
            if kept and sum(kept.values()) >= params.top_p:
                break
            kept[row] = probs[row]
        probs = kept
    largest = max(probs.values())
    probs = {row: prob for row, prob in probs.items() if prob >= params.min_p * largest}
    total = sum(probs.values())
    return {row: prob / total for row, prob in sorted(probs.items())}


def normalised(scores: dict[int, float]) -> dict[int, float]:
    peak = max(scores.values())
    weights = {row: math.exp(score - peak) for row, score in scores.items()}
    return {row: weight / sum(weights.values()) for row, weight in weights.items()}


def assert_equals_definition(logits: NDArray[np.float32], params: SamplingParams, context: set[int]) -> None:
    found, expected = distribution(logits, params, context), defined(logits, params, context)
    assert found.ids.tolist() == list(expected)
    np.testing.assert_allclose(found.probs, list(expected.values()), atol=FLOAT32, rtol=0)
    assert found.probs.sum() == pytest.approx(1, abs=EXACT)


def random_distribution(rng: np.random.Generator, vocab: int) -> Distribution:
    ids = np.sort(rng.choice(vocab, rng.integers(1, vocab + 1), replace=False))
    return Distribution(ids.astype(np.int64), rng.dirichlet(np.full(ids.size, 0.5)))


def dense(dist: Distribution, vocab: int) -> NDArray[np.float64]:
    return dist.probs_at(np.arange(vocab))


# --- options ---------------------------------------------------------------------------------------------------------


def test_the_defaults_are_greedy_and_need_no_logits() -> None:
    assert SamplingParams().is_greedy
    assert not SamplingParams().needs_logits
    assert SamplingParams(repetition_penalty=1.1).needs_logits
    assert WARM.needs_logits
    assert not WARM.is_greedy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "sampling option temperature: found -1, expected 0 .greedy. or a number from 1e-06"),
        ({"temperature": 1e-9}, "temperature: found 1e-09"),
        ({"temperature": math.nan}, "temperature: found nan"),
        ({"temperature": math.inf}, "temperature: found inf"),
        ({"temperature": "hot"}, "temperature: found 'hot'"),
        ({"temperature": True}, "temperature: found True"),
        ({"top_k": -1}, "top_k: found -1"),
        ({"top_k": 1.5}, "top_k: found 1.5"),
        ({"top_p": 1.01}, "top_p: found 1.01"),
        ({"min_p": -0.1}, "min_p: found -0.1"),
        ({"repetition_penalty": 0}, "repetition_penalty: found 0"),
        ({"seed": -1}, "seed: found -1"),
        ({"seed": "x"}, "seed: found 'x'"),
    ],
)
def test_an_option_out_of_range_is_named_with_what_was_expected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**options)


def test_all_wrong_options_are_named_at_once() -> None:
    with pytest.raises(RequestError, match=r"top_k: .*; .*top_p: "):
        SamplingParams(top_k=-3, top_p=2)


def test_numpy_numbers_are_numbers() -> None:
    assert SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3)).top_k == 3  # type: ignore[arg-type]


def test_a_seed_gives_the_same_draws_again() -> None:
    params = SamplingParams(seed=7)
    assert params.generator().random() == params.generator().random()
    assert SamplingParams().generator().random() != SamplingParams().generator().random()


# --- from logits to a distribution -----------------------------------------------------------------------------------


@quick
@given(
    logit_lists,
    temperatures,
    st.integers(0, 45),
    st.sampled_from([1.0, 0.9371, 0.4603, 0.0]),  # not a sum of equal shares, for which either set would be right
    st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    st.sampled_from([1.0, 1.25, 0.5]),
    st.sets(st.integers(0, 50), max_size=10),
)
def test_every_combination_of_options_equals_the_definition(
    logits: NDArray[np.float32],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
    context: set[int],
) -> None:
    params = SamplingParams(temperature, top_k, top_p, min_p, penalty)
    assert_equals_definition(logits, params, context)


@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.95}, {"min_p": 0.05}, {"top_k": 3000}]
)
def test_the_shortcuts_for_large_vocabularies_choose_the_same_tokens(
    options: dict[str, Any], spread: float, seed: int
) -> None:
    logits = (np.random.default_rng(seed).normal(size=5000) * spread).astype(np.float32)
    assert_equals_definition(logits, SamplingParams(temperature=0.7, **options), set())


def test_equal_logits_work_with_every_option() -> None:
    logits = np.zeros(1000, np.float32)
    assert distribution(logits, WARM, ()).ids.size == 1000
    assert (
        distribution(logits, SamplingParams(temperature=1, top_k=5), ()).ids.size == 1000
    )  # all are tied with the 5th
    assert distribution(logits, SamplingParams(temperature=1, top_p=0.0), ()).ids.tolist() == [0]
    assert distribution(logits, SamplingParams(temperature=1, top_p=0.0095), ()).ids.tolist() == list(range(10))
    assert distribution(logits, SamplingParams(temperature=1, min_p=1.0), ()).ids.size == 1000


def test_masked_logits_have_no_probability() -> None:
    logits = np.array([-np.inf, 1, -np.inf, 1], np.float32)
    for options in ({}, {"top_k": 3}, {"top_p": 0.999}, {"min_p": 0.01}):
        found = distribution(logits, SamplingParams(temperature=0.5, **options), [0, 1])
        np.testing.assert_allclose(dense(found, 4), [0, 0.5, 0, 0.5], atol=EXACT)


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_extreme_temperatures_neither_overflow_nor_warn(temperature: float) -> None:
    logits = np.array([-300, 0, 40, 300], np.float32)
    for options in ({}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}, {"min_p": 1e-300}):
        found = distribution(logits, SamplingParams(temperature=temperature, **options), ())
        assert found.probs.sum() == pytest.approx(1, abs=EXACT)
        assert found.ids[found.probs.argmax()] == 3


def test_greedy_takes_the_largest_logit_and_among_equals_the_lowest_id() -> None:
    found = distribution(np.array([0, 3, 1, 3], np.float32), SamplingParams(), ())
    assert (found.ids.tolist(), found.probs.tolist()) == ([1], [1.0])


def test_the_penalty_divides_positive_and_multiplies_negative_logits_once_per_token() -> None:
    logits = np.array([4.0, 3.0, -1.0, -1.5], np.float32)
    params = SamplingParams(repetition_penalty=2.0)
    assert distribution(logits, params, [0, 0, 0]).ids.tolist() == [1]
    assert distribution(logits[2:], params, {0}).ids.tolist() == [1]
    assert logits.tolist() == [4.0, 3.0, -1.0, -1.5], "the caller's logits must not change"


def test_a_context_may_be_a_sequence_a_set_or_an_array_and_hold_tokens_without_a_row() -> None:
    logits = np.array([4.0, 3.0], np.float32)
    params = SamplingParams(repetition_penalty=2.0)
    for context in ([0, 9, -1], (0, 9), {0, 9}, np.array([9, 0, 0]), frozenset({0})):
        assert distribution(logits, params, context).ids.tolist() == [1]
    assert distribution(logits, params, []).ids.tolist() == [0]


@quick
@given(st.integers(0, 2**32), st.integers(0, 8), st.sampled_from([1.0, 0.8]), st.sampled_from([0.0, 0.5]))
def test_a_trimmed_head_gives_the_full_heads_distribution_over_its_tokens(
    seed: int, top_k: int, top_p: float, temperature: float
) -> None:
    rng = np.random.default_rng(seed)
    full = rng.normal(size=30).astype(np.float32)
    ids = np.sort(rng.choice(30, 12, replace=False))
    context = rng.integers(0, 30, 6)
    params = SamplingParams(temperature, top_k, top_p, repetition_penalty=1.3)
    masked = np.full(30, -np.inf, np.float32)
    masked[ids] = full[ids]
    found = distribution(full[ids], params, context, ids=ids)
    np.testing.assert_allclose(dense(found, 30), dense(distribution(masked, params, context), 30), atol=FLOAT32)


@pytest.mark.parametrize("params", [SamplingParams(), WARM, SamplingParams(temperature=1, top_k=1)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_numbers_are_refused(params: SamplingParams, value: float) -> None:
    with pytest.raises(ContractError, match="largest logit"):
        distribution(np.array([value, value if value < 0 else 1.0], np.float32), params, ())


@pytest.mark.parametrize("shape", [(0,), (1, 3), ()])
def test_logits_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ContractError, match="shape of the logits"):
        distribution(np.zeros(shape, np.float32), WARM, ())
    with pytest.raises(ContractError, match=r"expected \[5\]"):
        distribution(np.zeros(3, np.float32), WARM, (), ids=np.arange(5))


def test_half_precision_logits_are_accepted() -> None:
    found = distribution(np.array([0, 1], np.float16), SamplingParams(temperature=1.0), ())
    np.testing.assert_allclose(found.probs, [1 / (1 + math.e), math.e / (1 + math.e)], atol=FLOAT32)


# --- a distribution --------------------------------------------------------------------------------------------------


def test_a_token_outside_the_support_has_probability_zero() -> None:
    dist = Distribution(np.array([2, 5, 9]), np.array([0.2, 0.3, 0.5]))
    assert [dist.prob(token) for token in (0, 2, 3, 5, 9, 10)] == [0, 0.2, 0, 0.3, 0.5, 0]
    assert dist.probs_at(np.array([9, 0, 12, 5])).tolist() == [0.5, 0, 0, 0.3]


class Scripted(np.random.Generator):
    """Returns the given draws in order, and fails if asked for one more."""

    def __init__(self, *draws: float) -> None:
        super().__init__(np.random.PCG64(0))
        self._draws = list(draws)

    def random(self, *args: Any, **kwargs: Any) -> Any:
        return self._draws.pop(0)


@pytest.mark.parametrize(
    ("draw", "token"), [(0.0, 2), (0.1999, 2), (0.2, 9), (0.6, 9), (0.75, 11), (math.nextafter(1, 0), 11)]
)
def test_one_draw_is_inverted_through_the_cumulative_distribution(draw: float, token: int) -> None:
    dist = Distribution(np.array([0, 2, 5, 9, 11, 12]), np.array([0, 0.2, 0, 0.5, 0.3, 0]))
    rng = Scripted(draw)
    assert dist.sample(rng) == token
    assert rng._draws == []


# --- speculative sampling --------------------------------------------------------------------------------------------


@quick
@given(st.integers(0, 2**32), st.integers(1, 12))
def test_accepting_or_resampling_gives_exactly_the_full_models_distribution(seed: int, vocab: int) -> None:
    """The sum over all drafted tokens x, written out: q(x) [accepted as x, or rejected and resampled]."""
    rng = np.random.default_rng(seed)
    p, q = random_distribution(rng, vocab), random_distribution(rng, vocab)
    if seed % 3 == 0:
        q = Distribution(q.ids, q.probs * 0.5 + q.probs[::-1] * 0.5)
    p_dense, q_dense = dense(p, vocab), dense(q, vocab)
    accepted = np.array([min(1.0, p_dense[x] / q_dense[x]) if q_dense[x] > 0 else 0.0 for x in range(vocab)])
    rejected_mass = (q_dense * (1 - accepted)).sum()
    emitted = q_dense * accepted + rejected_mass * dense(residual(p, q), vocab)
    np.testing.assert_allclose(emitted, p_dense, atol=EXACT, rtol=0)


@quick
@given(st.integers(0, 2**32), st.integers(1, 12))
def test_the_residual_is_the_normalised_positive_difference(seed: int, vocab: int) -> None:
    rng = np.random.default_rng(seed)
    p, q = random_distribution(rng, vocab), random_distribution(rng, vocab)
    difference = np.maximum(dense(p, vocab) - dense(q, vocab), 0)
    left = residual(p, q)
    if difference.sum() > 1e-9:
        np.testing.assert_allclose(dense(left, vocab), difference / difference.sum(), atol=1e-6, rtol=0)
        assert (left.probs > 0).all()
        assert (np.diff(left.ids) > 0).all()


@quick
@given(st.integers(0, 2**32), st.floats(0, 1, exclude_max=True), st.integers(0, 5))
def test_a_draft_is_accepted_exactly_when_the_draw_is_below_p_over_q(seed: int, draw: float, token: int) -> None:
    rng = np.random.default_rng(seed)
    p, q = random_distribution(rng, 6), random_distribution(rng, 6)
    scripted = Scripted(draw)
    stands = accept(p, q, token, scripted)
    assert scripted._draws == []
    if q.prob(token) > 0:
        assert stands == (draw < p.prob(token) / q.prob(token)) or draw == pytest.approx(p.prob(token) / q.prob(token))
    if p.prob(token) == 0:
        assert not stands


def test_equal_distributions_leave_no_residual_and_never_reject() -> None:
    p = Distribution(np.array([1, 4]), np.array([0.25, 0.75]))
    q = Distribution(np.array([1, 4]), np.array([0.25 + 1e-16, 0.75]))
    assert residual(p, q) is p
    assert accept(p, p, 4, Scripted(math.nextafter(1, 0)))


def test_greedy_drafts_are_accepted_exactly_when_the_full_model_agrees() -> None:
    p, same, other = Distribution.point(3), Distribution.point(3), Distribution.point(8)
    assert accept(p, same, 3, Scripted(math.nextafter(1, 0)))
    assert not accept(p, other, 8, Scripted(0.0))
    assert residual(p, other).ids.tolist() == [3]


def test_a_certain_draft_is_accepted_with_the_full_models_probability_and_never_resampled() -> None:
    p, lookup = Distribution(np.array([1, 4]), np.array([0.25, 0.75])), Distribution.point(1)
    assert accept(p, lookup, 1, Scripted(0.2499))
    assert not accept(p, lookup, 1, Scripted(0.25))
    assert residual(p, lookup).ids.tolist() == [4]


# Chi-square over 8 tokens, 7 degrees of freedom. CRITICAL is its 0.999 quantile: one seed in a thousand fails by
# chance, and the seed is fixed. EFFECT is Cohen's w = sqrt(sum((found - p)^2 / p)) of the smallest deviation it is
# to see: 0.03, e.g. a token of probability 0.125 that comes out at 0.135 while others lose in proportion. DRAWS
# gives it a power above 0.9.
TOKENS, CRITICAL, EFFECT, DRAWS = 8, 24.322, 0.03, 40_000
P = np.array([0.30, 0.22, 0.15, 0.12, 0.09, 0.06, 0.04, 0.02])
Q = np.array([0.10, 0.30, 0.05, 0.20, 0.02, 0.13, 0.15, 0.05])


def chi_square_of_rounds(resample: Distribution, rng: np.random.Generator) -> float:
    p, q = (Distribution(np.arange(TOKENS), probs) for probs in (P, Q))
    counts = np.zeros(TOKENS)
    for _ in range(DRAWS):
        token = q.sample(rng)
        if not accept(p, q, token, rng):
            token = resample.sample(rng)
        counts[token] += 1
    return float(((counts - DRAWS * P) ** 2 / (DRAWS * P)).sum())


def test_the_chi_square_test_has_the_stated_power_and_false_alarms(seed: int) -> None:
    rng = np.random.default_rng(seed)
    deviating = rng.noncentral_chisquare(TOKENS - 1, DRAWS * EFFECT**2, 200_000)
    assert (deviating > CRITICAL).mean() > 0.9
    assert (rng.chisquare(TOKENS - 1, 200_000) > CRITICAL).mean() == pytest.approx(0.001, abs=5e-4)


def test_simulated_rounds_are_distributed_as_the_full_model(seed: int) -> None:
    p, q = (Distribution(np.arange(TOKENS), probs) for probs in (P, Q))
    assert chi_square_of_rounds(residual(p, q), np.random.default_rng(seed)) < CRITICAL


def test_the_simulation_detects_resampling_from_the_wrong_distribution(seed: int) -> None:
    wrong = Distribution(np.arange(TOKENS), P)  # a frequent mistake: p itself instead of the residual
    assert chi_square_of_rounds(wrong, np.random.default_rng(seed)) > CRITICAL
