"""The schedules of the recipes against the papers' formulas, and the order of batches."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shortstack.samples.recipes.training.data import Batches, Example, collate
from shortstack.samples.recipes.training.schedules import (
    ExitCurriculum,
    ee_llm_weight,
    exit_weights,
    layer_dropout,
    learning_rate,
)
from shortstack.samples.recipes.training.stack_loss import ExitVocab


def test_dropout_grows_from_nothing_to_its_peak() -> None:
    found = layer_dropout(32, 0.2, 0.0, from_scratch=False)
    assert found[0] == 0.0
    assert found[31] == pytest.approx(0.2)
    assert sum(found) / 32 == pytest.approx(0.443 * 0.2, rel=0.01)  # the mean that the paper's D(l) has
    assert found[10] == pytest.approx(0.2 * (math.exp(10 * math.log(2) / 31) - 1))


def test_dropout_from_scratch_starts_at_nothing() -> None:
    assert set(layer_dropout(8, 0.1, 0.0, from_scratch=True)) == {0.0}
    half = layer_dropout(8, 0.1, 0.5, from_scratch=True)
    assert half[7] == pytest.approx(0.1 * (2**0.5 - 1))
    assert layer_dropout(8, 0.1, 1.0, from_scratch=True) == pytest.approx(
        layer_dropout(8, 0.1, 0.0, from_scratch=False)
    )


@pytest.mark.parametrize("layers", [4, 30])
@pytest.mark.parametrize("e_scale", [0.1, 1.0])
def test_exit_weights_are_those_of_the_paper(layers: int, e_scale: float) -> None:
    enabled = tuple(range(1, layers))
    found = exit_weights(layers, enabled, e_scale, "layerskip")
    raw = {e: e_scale * sum(range(e)) for e in enabled}  # an exit after E layers is layer l = E - 1
    raw[layers] = layers - 1 + e_scale * sum(range(layers - 1))
    for depth, weight in found.items():
        assert weight == pytest.approx(raw[depth] / sum(raw.values()))
    assert sum(found.values()) == pytest.approx(1.0)


def test_equal_weights_split_the_exits_share() -> None:
    assert exit_weights(8, (2, 4), 1.0, "equal") == pytest.approx({2: 0.25, 4: 0.25, 8: 0.5})
    assert exit_weights(8, (), 1.0, "equal") == {8: 1.0}


@given(every=st.integers(1, 9), count=st.integers(1, 12), start=st.integers(0, 50))
def test_rotation_enables_each_exit_once_in_a_turn(every: int, count: int, start: int) -> None:
    exits = tuple(range(1, count + 1))
    curriculum = ExitCurriculum(exits, "rotational", every, count + 1)
    turn = [exit_layer for step in range(start, start + every) for exit_layer in curriculum.enabled(step, 100)]
    assert sorted(turn) == list(exits)


def test_the_gradual_curriculum_goes_from_the_top_down() -> None:
    curriculum = ExitCurriculum(tuple(range(1, 8)), "gradual", 1, 8)
    seen = [curriculum.enabled(step, 160) for step in range(160)]
    assert seen[0] == ()
    assert seen[10] == (7,)
    assert all(set(a) <= set(b) for a, b in itertools.pairwise(seen))
    assert seen[69] == tuple(range(2, 8))
    assert seen[80] == tuple(range(1, 8))  # all from half of the run on


def test_the_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    rates = [learning_rate(step, 100, 1.0, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert learning_rate(100, 100, 1.0, 10) == pytest.approx(0.1)


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_exit_weights_of_ee_llm_warm_up_or_decay(style: str) -> None:
    up = [ee_llm_weight(step, 10, 0.0, 0.5, style) for step in range(20)]  # type: ignore[arg-type]
    down = [ee_llm_weight(step, 10, 1.0, 0.25, style) for step in range(20)]  # type: ignore[arg-type]
    assert (up[0], up[5], up[10], up[19]) == pytest.approx((0.0, 0.25, 0.5, 0.5))
    assert (down[0], down[10], down[19]) == pytest.approx((1.0, 0.25, 0.25))
    assert ee_llm_weight(0, 0, 0.0, 0.5, style) == 0.5  # type: ignore[arg-type]


def test_only_the_completion_is_learnt() -> None:
    batch = collate([Example((5, 6, 7, 8), 2), Example((9, 4), 1)])
    assert batch.ids.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    flat = batch.ids.flatten()
    assert flat[batch.rows].tolist() == [6, 7, 9]  # each reads the token before
    assert batch.targets.tolist() == [7, 8, 4]
    assert batch.tokens == 6


@given(count=st.integers(3, 60), size=st.integers(1, 9), seed=st.integers(0, 5))
def test_an_epoch_shows_every_text_once_and_is_the_same_again(count: int, size: int, seed: int) -> None:
    examples = [Example((index, *range(index % 7 + 1)), 1) for index in range(count)]
    batches = Batches(examples, size, seed)
    shown = [row[0] for index in range(batches.per_epoch) for row in batches[index].ids.tolist()]
    assert len(set(shown)) == len(shown) == batches.per_epoch * min(size, count)
    again = Batches(examples, size, seed)
    late = 2 * batches.per_epoch + batches.per_epoch // 2
    assert torch.equal(batches[late].ids, again[late].ids)


def test_an_exit_vocabulary_holds_the_most_frequent_tokens() -> None:
    vocab = ExitVocab.most_frequent([7, 7, 7, 2, 2, 9], 2, 12)
    assert vocab.ids.tolist() == [2, 7]
    assert vocab.row_of[[2, 7, 9]].tolist() == [0, 1, -1]
