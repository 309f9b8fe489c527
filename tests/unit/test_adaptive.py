"""A threshold learned while decoding: the threshold for known distributions, and what is learned from readings."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from shortstack.graphs.errors import RequestError
from shortstack.runtime.early_exit.adaptive import (
    FIRST_THRESHOLD,
    GRID,
    Adaptive,
    AdaptiveThreshold,
    BetaMixture,
    beta_log_density,
)
from shortstack.runtime.early_exit.criteria import Bound
from shortstack.runtime.early_exit.expression import parse_criterion
from shortstack.runtime.early_exit.policy import ExitPolicy
from shortstack.runtime.early_exit.reading import Reading

READING = Reading(
    exit_layer=4,
    token=1,
    top_prob=0.95,
    margin=0.2,
    entropy=1.0,
    gate=None,
    similarity=None,
    position=0,
    max_new_tokens=8,
    below=(),
)


def taught(
    wrong: tuple[float, float], right: tuple[float, float], texts: int = 40, share_right: float = 0.7
) -> BetaMixture:
    rng = np.random.default_rng(5)
    mixture = BetaMixture()
    for _ in range(texts):
        agreed = rng.random(50) < share_right
        confidences = np.where(agreed, rng.beta(*right, 50), rng.beta(*wrong, 50))
        mixture.learn(confidences.tolist(), agreed.tolist())
    return mixture


def best_threshold(wrong: tuple[float, float], right: tuple[float, float]) -> float:
    """Return the threshold that the rule gives if the distributions are known."""

    def density(x: float, a: float, b: float) -> float:
        return x ** (a - 1) * (1 - x) ** (b - 1) * math.gamma(a + b) / (math.gamma(a) * math.gamma(b))

    good = [density(x, *right) / (density(x, *right) + density(x, *wrong)) > 0.4 for x in GRID]
    return float(GRID[good.index(True)]) if any(good) else FIRST_THRESHOLD


def test_the_log_density_is_that_of_the_beta_distribution() -> None:
    x = np.linspace(0.001, 0.999, 999)
    for shapes in ((1.0, 1.0), (2.0, 5.0), (8.0, 3.0)):
        assert np.exp(beta_log_density(x, *shapes)).sum() * 0.001 == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize(
    ("wrong", "right"), [((2.0, 6.0), (9.0, 2.0)), ((4.0, 4.0), (10.0, 2.0)), ((8.0, 3.0), (30.0, 2.0))]
)
def test_the_mixture_learns_the_threshold_of_known_distributions(
    wrong: tuple[float, float], right: tuple[float, float]
) -> None:
    mixture = taught(wrong, right)
    for found, shapes in zip(mixture.shapes, (wrong, right), strict=True):
        assert found[0] / sum(found) == pytest.approx(shapes[0] / sum(shapes), abs=0.03)
    step = GRID[1] - GRID[0]
    assert abs(mixture.threshold - best_threshold(wrong, right)) <= step + 1e-9


def test_better_exits_get_lower_thresholds() -> None:
    good = taught((2.0, 6.0), (9.0, 2.0)).threshold
    poor = taught((9.0, 3.0), (12.0, 3.0)).threshold
    assert good < poor


def test_the_threshold_is_the_highest_before_anything_is_learned_and_if_no_point_will_do() -> None:
    assert BetaMixture().threshold == FIRST_THRESHOLD == pytest.approx(0.9)
    assert taught((40.0, 2.0), (2.0, 40.0)).threshold == FIRST_THRESHOLD


@pytest.mark.parametrize("confidence", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("agreed", [False, True])
def test_texts_of_one_kind_and_one_confidence_do_not_break_the_fit(confidence: float, agreed: bool) -> None:
    mixture = BetaMixture()
    for _ in range(500):
        mixture.learn([confidence] * 100, [agreed] * 100)
    assert all(math.isfinite(value) and value > 0 for shapes in mixture.shapes for value in shapes)
    assert mixture.threshold in GRID


def test_the_learned_threshold_follows_a_change_of_subject() -> None:
    mixture = taught((2.0, 6.0), (9.0, 2.0), texts=200)
    low = mixture.threshold
    rng = np.random.default_rng(2)
    for _ in range(400):
        agreed = rng.random(50) < 0.5
        confidences = np.where(agreed, rng.beta(12, 2, 50), rng.beta(10, 3, 50))
        mixture.learn(confidences.tolist(), agreed.tolist())
    assert mixture.threshold > low


# The criterion


@pytest.mark.parametrize("text", ["top_prob >= auto", "margin >= auto", "(margin >= auto)"])
def test_auto_is_read_and_written(text: str) -> None:
    criterion = parse_criterion(text)
    assert isinstance(criterion, Adaptive)
    assert str(criterion) == text.strip("()")
    assert parse_criterion(str(criterion)) == criterion


@pytest.mark.parametrize(
    "text",
    [
        "top_prob >= auto and patience >= 2",
        "never or margin >= auto",
        "entropy <= auto",
        "gate >= auto",
        "top_prob <= auto",
        "auto",
        "patience >= auto",
        "top_prob >= auto ~ 4",
        "top_prob >= 0.9 [4: auto]",
    ],
)
def test_auto_cannot_be_combined_and_works_for_two_measures_only(text: str) -> None:
    with pytest.raises(RequestError):
        parse_criterion(text)


@pytest.mark.parametrize("kv_policy", ["pipeline", "auto"])
def test_auto_is_refused_with_a_pipeline_which_gives_no_labels(kv_policy: str) -> None:
    with pytest.raises(RequestError, match="does not go with kv_policy"):
        ExitPolicy(Adaptive("margin"), kv_policy=kv_policy)  # type: ignore[arg-type]
    ExitPolicy(Adaptive("margin"), kv_policy="recompute")


def test_a_criterion_that_has_learned_nothing_uses_the_first_threshold() -> None:
    assert Adaptive("top_prob").leaves(READING)
    assert not Adaptive("margin").leaves(READING)


def test_each_exit_learns_from_its_own_tokens_between_texts() -> None:
    learned = AdaptiveThreshold(Adaptive("margin"), (4, 8))
    first = learned.begin()
    assert str(first) == "margin >= 0.9 [4: 0.9, 8: 0.9]"
    rng = np.random.default_rng(4)
    for _ in range(300):
        agrees = bool(rng.random() < 0.8)
        margin = float(rng.beta(9, 2) if agrees else rng.beta(2, 8))
        learned.observe(replace(READING, margin=margin), agrees)
    second = learned.begin()
    thresholds = dict(second.threshold.by_exit)
    assert thresholds[4] < 0.7
    assert thresholds[8] == pytest.approx(0.9)
    assert first != second
    assert learned.begin() == second, "there were no readings since"
    assert isinstance(second, Bound)
