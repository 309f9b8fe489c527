"""A threshold of `auto` on a tiny model: it is learned over several texts, by each model for itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from helpers.tiny_models import SPECULATOR, TinyBundles
from shortstack.graphs.bundle import Bundle, open_bundle
from shortstack.runtime import ExitPolicy, Model, Result, parse_criterion
from shortstack.runtime.early_exit.adaptive import FIRST_THRESHOLD, Adaptive

EXITS = (1, 3, 4)
AUTO = ExitPolicy(parse_criterion("margin >= auto"), EXITS)


@pytest.fixture(scope="module")
def opened(tiny_bundles: TinyBundles) -> Bundle:
    return open_bundle(tiny_bundles.bundle(SPECULATOR, *EXITS))


def texts(model: Model, policy: ExitPolicy, count: int = 30) -> list[Result]:
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, SPECULATOR.vocab, 8).tolist() for _ in range(count)]
    options = {"max_new_tokens": 40, "ignore_eos": True, "strategy": "early-exit", "exits": policy}
    return [model.generate(prompt, **options) for prompt in prompts]  # type: ignore[arg-type]


def thresholds(model: Model, exit_layers: tuple[int, ...] = EXITS) -> dict[int, float]:
    assert isinstance(AUTO.criterion, Adaptive)
    return dict(model._one._loops._thresholds[exit_layers, AUTO.criterion].begin().threshold.by_exit)


def test_thresholds_are_learned_over_several_texts_and_let_more_tokens_exit_early(opened: Bundle) -> None:
    model = Model(opened)
    results = texts(model, AUTO)
    assert all(result.stats.is_balanced for result in results)
    assert min(thresholds(model).values()) < FIRST_THRESHOLD
    assert sum(r.stats.exited for r in results[20:]) > sum(r.stats.exited for r in results[:10])


def test_learned_thresholds_belong_to_one_model_and_its_exits(opened: Bundle) -> None:
    model, other = Model(opened), Model(opened)
    texts(model, AUTO)
    texts(other, AUTO, 1)
    assert thresholds(model) != thresholds(other)
    before = thresholds(model)
    texts(model, replace(AUTO, exit_layers=(1,)), 5)
    assert thresholds(model) == before
    assert thresholds(model, (1,)).keys() == {1}


def test_max_pending_does_not_change_what_is_learned(opened: Bundle) -> None:
    outputs, learned = [], []
    for max_pending in (1, 3, 16):
        model = Model(opened)
        outputs.append([result.tokens for result in texts(model, replace(AUTO, max_pending=max_pending), 12)])
        learned.append(thresholds(model))
    assert outputs[0] == outputs[1] == outputs[2]
    assert learned[0] == learned[1] == learned[2]


def test_exact_verification_gives_the_text_of_plain_decoding(opened: Bundle) -> None:
    model = Model(opened)
    rng = np.random.default_rng(3)
    for result in texts(model, replace(AUTO, verify="exact"), 12):
        prompt = rng.integers(3, SPECULATOR.vocab, 8).tolist()
        assert result.tokens == model.generate(prompt, max_new_tokens=40, ignore_eos=True).tokens
    assert min(thresholds(model).values()) < FIRST_THRESHOLD
