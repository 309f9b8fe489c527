"""Recomputing with exits in the prompt is EE-LLM's method with one pipeline stage.

:func:`ee_llm` says what that method computes (pan-x-c/EE-LLM, ``megatron/text_generation/generation.py``), in own code
and with no cache: for each token the text runs from the first layer; at each exit, bottom to top, the last position's
largest log probability is compared with the logarithm of the threshold; and the first exit that reaches it names the
token. Since EE-LLM runs pending positions again from the first layer until a token passes all layers, every position
that it reads keys and values of is complete.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from helpers.tiny_models import SPECULATOR, TinyBundles
from shortstack.graphs.errors import RequestError
from shortstack.runtime import ExitPolicy, Model, load, parse_criterion
from shortstack.runtime.engine.stack import Stack

EXITS = (1, 2, 3)
TOKENS = 24
CLOSE = 1e-4  # of probabilities, between runs over one row and over a whole text


@pytest.fixture(scope="module")
def model(tiny_bundles: TinyBundles) -> Model:
    return load(tiny_bundles.bundle(SPECULATOR, *EXITS))


def prompt(seed: int, length: int = 9) -> list[int]:
    return np.random.default_rng(seed).integers(3, SPECULATOR.vocab, length).tolist()


def ee_llm(model: Model, ids: list[int], threshold: float, exits: tuple[int, ...]) -> list[tuple[int, int, float]]:
    """Return (token, layers run, confidence) of each token."""
    least = math.log(threshold) if threshold > 0 else -math.inf
    text, found = list(ids), []
    for _ in range(TOKENS):
        heads = model.activations(text).heads
        for depth in (*exits, SPECULATOR.layers):
            logits = heads[depth][-1].astype(np.float64)
            log_probs = logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())
            if log_probs.max() >= least or depth == SPECULATOR.layers:
                break
        found.append((int(log_probs.argmax()), depth, math.exp(log_probs.max())))
        text.append(found[-1][0])
    return found


def recompute(threshold: float, **options: Any) -> ExitPolicy:
    return ExitPolicy(parse_criterion(f"top_prob >= {threshold}"), kv_policy="recompute", prefill_exit=True, **options)


@pytest.mark.parametrize("exits", [EXITS, (2,), (1, 3)])
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0])
def test_tokens_depths_and_confidences_are_those_of_ee_llm(
    model: Model, threshold: float, exits: tuple[int, ...]
) -> None:
    for seed in range(4):
        expected = ee_llm(model, prompt(seed), threshold, exits)
        policy = recompute(threshold, exit_layers=exits)
        found = list(model.stream(prompt(seed), exits=policy, max_new_tokens=TOKENS, ignore_eos=True))
        assert [(token.id, token.exit_layer) for token in found] == [(token, depth) for token, depth, _ in expected]
        for token, (_, _, confidence) in zip(found, expected, strict=True):
            assert token.confidence == pytest.approx(confidence, abs=CLOSE)


def test_prompts_do_leave_and_the_whole_prompt_runs_again_with_every_token_until_one_does_not(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cost is EE-LLM's too: within a fixed cap, not one learned from times, the lowest level runs for each."""
    runs: Counter[int] = Counter()
    whole = Stack.prefill_level

    def watch(stack: Stack, level: int, *arguments: Any) -> None:
        runs[level] += 1
        whole(stack, level, *arguments)

    monkeypatch.setattr(Stack, "prefill_level", watch)
    for policy, lowest in (
        (recompute(0.0, max_pending=16), 12),
        (ExitPolicy(parse_criterion("always"), prefill_exit=True, max_pending=16), 1),
    ):
        runs.clear()
        result = model.generate(prompt(0), exits=policy, max_new_tokens=12, ignore_eos=True)
        assert result.stats.exits == {1: 12}
        assert result.stats.prefilled == 0
        assert runs == {0: lowest, 1: 1, 2: 1, 3: 1}


def test_a_prompt_that_left_leaves_the_cache_of_full_depth(model: Model) -> None:
    """The next turn starts from it."""
    first = model.generate(prompt(1), exits=recompute(0.0), max_new_tokens=20, ignore_eos=True).tokens
    turn = [*prompt(1), *first, *prompt(2)]
    again = model.generate(turn, max_new_tokens=20, ignore_eos=True, reuse_cache=True)
    assert again.stats.reused == len(prompt(1)) + len(first) - 1
    assert again.tokens == model.generate(turn, max_new_tokens=20, ignore_eos=True).tokens


@pytest.mark.parametrize("kv_policy", ["pipeline", "auto"])
def test_other_ways_still_run_prompts_through_all_layers(kv_policy: Any) -> None:
    with pytest.raises(RequestError, match="flush or recompute only"):
        ExitPolicy(parse_criterion("always"), kv_policy=kv_policy, prefill_exit=True)
