"""Learn-then-Test: p-values against brute force, testing in order, distances, thresholds to try."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest

from shortstack.graphs.errors import RequestError
from shortstack.runtime.calibration.calibrate import CalibrationSpec, too_few
from shortstack.runtime.calibration.dissimilarity import (
    Answer,
    dissimilarity,
    edit_distance,
    longest_common_subsequence,
    rouge_l_distance,
    words,
)
from shortstack.runtime.calibration.learn_then_test import (
    TESTS,
    Test,
    binomial,
    fewest_prompts,
    fixed_sequence,
    hoeffding,
    hoeffding_bentkus,
    p_value,
)
from shortstack.runtime.calibration.template import Template

# p-values


@pytest.mark.parametrize(("count", "delta"), [(1, 0.3), (5, 0.1), (12, 0.5), (12, 0.9)])
def test_the_binomial_tail_equals_the_sum_over_all_outcomes(count: int, delta: float) -> None:
    chance = [0.0] * (count + 1)
    for outcome in product((0, 1), repeat=count):
        chance[sum(outcome)] += math.prod(delta if failed else 1 - delta for failed in outcome)
    for failures in range(count + 1):
        assert binomial(failures, count, delta) == pytest.approx(sum(chance[: failures + 1]), rel=1e-9)


def test_the_hoeffding_p_value_is_the_formula_of_the_paper() -> None:
    assert hoeffding(0.02, 200, 0.1) == pytest.approx(math.exp(-2 * 200 * 0.08**2))
    assert hoeffding(0.1, 200, 0.1) == hoeffding(0.7, 200, 0.1) == 1.0


def test_hoeffding_bentkus_is_never_above_hoeffding_and_never_below_the_exact_tail() -> None:
    for count, delta in product((10, 50, 150), (0.05, 0.2, 0.6)):
        for failures in range(count + 1):
            value = hoeffding_bentkus(failures, count, delta)
            assert value <= hoeffding(failures / count, count, delta) + 1e-12
            assert value >= binomial(failures, count, delta) - 1e-12


@pytest.mark.parametrize("test", TESTS)
def test_p_values_are_rarely_small_where_the_mean_loss_is_above_delta(test: Test) -> None:
    rng = np.random.default_rng(3)
    delta = 0.2
    losses = (rng.random((2000, 60)) < delta).astype(float)  # a mean of delta itself, the hardest case
    values = np.array([p_value(test, row.tolist(), delta) for row in losses])
    for epsilon in (0.01, 0.05, 0.2):
        assert (values <= epsilon).mean() <= epsilon + 3 * math.sqrt(epsilon / 2000)


def test_the_binomial_test_refuses_losses_between_0_and_1() -> None:
    assert p_value("binomial", [0.0, 1.0, 0.0], 0.5) == pytest.approx(0.5)
    with pytest.raises(RequestError, match="losses of 0 or 1"):
        p_value("binomial", [0.0, 0.5], 0.5)


@pytest.mark.parametrize("losses", [[], [-0.1], [1.1], [float("nan")]])
def test_a_value_that_is_not_a_loss_is_refused(losses: list[float]) -> None:
    with pytest.raises(RequestError, match=r"each 0\.\.1"):
        p_value("hoeffding", losses, 0.1)


# How many prompts


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize(("delta", "epsilon"), [(0.1, 0.05), (0.05, 0.05), (0.3, 0.01), (0.5, 0.5)])
def test_the_fewest_prompts_pass_without_a_loss_and_one_less_does_not(test: Test, delta: float, epsilon: float) -> None:
    count = fewest_prompts(test, delta, epsilon)
    assert p_value(test, [0.0] * count, delta) <= epsilon
    assert count == 1 or p_value(test, [0.0] * (count - 1), delta) > epsilon


def test_hoeffding_needs_150_prompts_at_the_defaults_and_600_for_half_of_delta() -> None:
    assert CalibrationSpec().fewest_prompts == 150
    assert CalibrationSpec(delta=0.05).fewest_prompts == 600
    assert CalibrationSpec(test="binomial", loss="any").fewest_prompts == 29
    message = str(too_few(149, CalibrationSpec()))
    assert all(part in message for part in ("149", "150 or more", "hoeffding-bentkus, which needs 29"))


# Testing in order


def test_testing_ends_at_the_first_failure_and_reads_nothing_after_it() -> None:
    asked: list[float] = []

    def values() -> Iterator[float]:
        for value in (0.01, 0.05, 0.06, 0.0, 0.0):
            asked.append(value)
            yield value

    assert fixed_sequence(values(), 0.05) == 2
    assert asked == [0.01, 0.05, 0.06]


def test_no_threshold_and_every_threshold_may_pass() -> None:
    assert fixed_sequence([0.2, 0.0], 0.05) == 0
    assert fixed_sequence([0.0, 0.01], 0.05) == 2
    assert fixed_sequence([], 0.05) == 0


# Distances


def slow_lcs(a: str, b: str) -> int:
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + slow_lcs(a[1:], b[1:])
    return max(slow_lcs(a[1:], b), slow_lcs(a, b[1:]))


def slow_edits(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(
        slow_edits(a[1:], b[1:]) + (a[0] != b[0]),
        slow_edits(a[1:], b) + 1,
        slow_edits(a, b[1:]) + 1,
    )


def test_distances_agree_with_their_recursive_definitions() -> None:
    rng = np.random.default_rng(1)
    for _ in range(150):
        a, b = (tuple(rng.integers(0, 3, rng.integers(0, 7)).tolist()) for _ in range(2))
        assert longest_common_subsequence(a, b) == slow_lcs("".join(map(str, a)), "".join(map(str, b)))
        assert edit_distance(a, b) == slow_edits(a, b)


def test_rouge_l_of_the_example_in_the_paper() -> None:
    """Lin 2004, section 3.1: "police killed the gunman" shares 3 of 4 words in order with S2, and 2 of 4 with S3."""
    reference = words("police killed the gunman")
    assert rouge_l_distance(words("police kill the gunman"), reference) == pytest.approx(0.25)
    assert rouge_l_distance(words("the gunman kill police"), reference) == pytest.approx(0.5)


def test_losses_are_0_for_the_same_answer_and_1_for_nothing_in_common() -> None:
    a, b = Answer((1, 2, 3, 0), "The sky, blue."), Answer((1, 2, 4, 0), "the SKY, green.")
    other, empty = Answer((7, 8), "never mind"), Answer((), "")
    for loss in ("text", "token", "any"):
        assert dissimilarity(loss, a, a) == dissimilarity(loss, empty, empty) == 0.0
        assert dissimilarity(loss, a, other) == dissimilarity(loss, a, empty) == 1.0
    assert dissimilarity("text", a, b) == pytest.approx(1 - 4 / 5)
    assert dissimilarity("token", a, b) == pytest.approx(1 / 4)
    assert dissimilarity("any", a, b) == 1.0


def test_words_of_scripts_without_spaces_are_characters() -> None:
    assert words("Why blue? 空は青い") == ["why", "blue", "?", "空", "は", "青", "い"]


# Thresholds to try


def test_grids_go_from_few_early_tokens_to_many() -> None:
    assert Template("top_prob >= {}").ordered([0.5, 1, 0.9, 0.5]) == (1, 0.9, 0.5)
    assert Template("entropy <= {}").ordered([2, 0.1, 0]) == (0, 0.1, 2)
    for text in ("margin >= {} and patience >= 2", "entropy<={}", "patience >= {}", "top_prob >= {} or margin >= {}"):
        template = Template(text)
        grid = template.default_grid(3)
        assert template.ordered(reversed(grid)) == grid
    assert Template("patience >= {}").default_grid(3) == (3, 2, 1)


def test_the_threshold_goes_into_the_gap() -> None:
    assert str(Template("margin >= {} and patience >= 2").at(0.25)) == "margin >= 0.25 and patience >= 2"
    assert str(Template("votes >= {}").at(2.0)) == "votes >= 2"
    assert str(Template("top_prob >= {} [4: 0.9] ~ 4").at(1e-5)) == "top_prob >= 1e-05 [4: 0.9] ~ 4.0"


@pytest.mark.parametrize(
    "text",
    [
        "top_prob >= 0.9",
        "",
        "max_depth = {}..2",
        "top_prob >= 0.9 ~ {}",
        "top_prob >= 0.5 [4: {}]",
        "top_prob >= {} or entropy <= {}",
    ],
)
def test_a_criterion_without_a_gap_for_a_threshold_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match=r"such as 'top_prob >= \{\}'|Such as 'top_prob >= \{\}'"):
        Template(text)


@pytest.mark.parametrize(
    "text", ["top >= {}", "top_prob <= {}", "top_prob >= {} and", "top_prob >= {} and margin >= auto"]
)
def test_a_template_that_is_not_a_criterion_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="exit criterion"):
        Template(text)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"delta": 0.0}, "delta"),
        ({"epsilon": 1.0}, "epsilon"),
        ({"delta": float("nan")}, "delta"),
        ({"test": "binomial"}, "hoeffding-bentkus"),
        ({"loss": "bleu"}, "text or token or any"),
        ({"test": "t"}, "hoeffding"),
        ({"max_new_tokens": 1}, "2 or more"),
    ],
)
def test_a_calibration_with_impossible_settings_is_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        CalibrationSpec(**fields)  # type: ignore[arg-type]
