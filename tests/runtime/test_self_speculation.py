"""Self-speculation emits the tokens of plain decoding on real graphs: a tiny model and the full grid of settings.

Exits 1, 3 and 4 of six layers stand for exits 4, 8 and 15 of SmolLM2's thirty.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from helpers import tolerances
from helpers.tiny_models import SPECULATOR, TinyBundles
from shortstack.runtime import DraftPolicy, Model, Result, SamplingParams, load
from shortstack.runtime.engine.cache import CHUNK_POSITIONS
from shortstack.runtime.engine.stack import PREFILL_ROWS
from shortstack.runtime.request import Plain, Speculate, Strategy

EXITS = (1, 3, 4)
PROMPTS = 30
SOME = 12  # prompts of a test that does not need the full grid
TOKENS = 64
POLICIES = [DraftPolicy(k, has_bonus=bonus) for k, bonus in product(range(1, 7), (False, True))]
# Accepts about half of the runs of drafts and rejects some for certain, which every grid below relies on.
ACCEPTANCE = (0.15, 0.9)


def prompts(count: int, length: int | None = None) -> list[list[int]]:
    """Return prompts of random token ids, the same for every test; 1 to 40 ids each, or ``length``."""
    rng = np.random.default_rng(7)
    return [rng.integers(3, SPECULATOR.vocab, length or rng.integers(1, 41)).tolist() for _ in range(count)]


def decode(model: Model, prompt: list[int], tokens: int = TOKENS, **options: Any) -> Result:
    result = model.generate(prompt, max_new_tokens=tokens, ignore_eos=True, **options)
    assert result.stats.is_balanced
    assert result.stats.emitted == len(result.tokens)
    return result


def speculate(model: Model, prompt: list[int], policy: DraftPolicy, tokens: int = TOKENS, **options: Any) -> Result:
    return decode(model, prompt, tokens, strategy="self-speculative", draft=policy, **options)


@pytest.fixture(scope="module")
def model(tiny_bundles: TinyBundles) -> Model:
    """All three exits in one bundle of four segments."""
    return load(tiny_bundles.bundle(SPECULATOR, *EXITS))


@pytest.fixture(scope="module")
def plain(model: Model) -> list[tuple[int, ...]]:
    """The plain continuation of each prompt."""
    outputs = [decode(model, prompt).tokens for prompt in prompts(PROMPTS)]
    assert len(set(outputs)) == PROMPTS
    assert sum(len(set(tokens)) for tokens in outputs) > 8 * PROMPTS, "too repetitive to show anything"
    return outputs


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"k{p.max_draft_tokens}{'-bonus' if p.has_bonus else ''}")
@pytest.mark.parametrize("exit_layer", EXITS)
def test_every_exit_and_draft_length_gives_the_plain_tokens(
    model: Model, plain: list[tuple[int, ...]], exit_layer: int, policy: DraftPolicy
) -> None:
    drafted = accepted = 0
    for prompt, expected in zip(prompts(PROMPTS), plain, strict=True):
        result = speculate(model, prompt, policy, exit_layer=exit_layer)
        assert result.tokens == expected
        drafted += result.stats.drafted
        accepted += result.stats.accepted
    low, high = ACCEPTANCE
    assert low < accepted / drafted < high, "the grid must meet accepted and rejected drafts"


@pytest.mark.parametrize("exit_layer", EXITS)
def test_a_bundle_with_only_that_exit_gives_the_same_tokens(
    tiny_bundles: TinyBundles, plain: list[tuple[int, ...]], exit_layer: int
) -> None:
    model = load(tiny_bundles.bundle(SPECULATOR, exit_layer))
    for index, (prompt, expected) in enumerate(zip(prompts(SOME), plain[:SOME], strict=True)):
        assert decode(model, prompt).tokens == expected
        assert speculate(model, prompt, POLICIES[index % len(POLICIES)]).tokens == expected


@pytest.mark.parametrize("confidence", [0.2, 0.6, 1.0])
@pytest.mark.parametrize("bonus", [False, True])
def test_stopping_drafts_at_low_confidence_gives_the_plain_tokens(
    model: Model, plain: list[tuple[int, ...]], bonus: bool, confidence: float
) -> None:
    lengths: set[int] = set()
    for index, (prompt, expected) in enumerate(zip(prompts(SOME), plain[:SOME], strict=True)):
        policy = DraftPolicy(6, confidence, has_bonus=bonus)
        result = speculate(model, prompt, policy, exit_layer=EXITS[index % 3])
        assert result.tokens == expected
        lengths.add(len(result.stats.drafted_at))
    assert lengths == {1} if confidence == 1.0 else max(lengths) > 1


@pytest.mark.parametrize("bonus", [False, True])
def test_adapting_the_draft_length_gives_the_plain_tokens(
    model: Model, plain: list[tuple[int, ...]], bonus: bool
) -> None:
    rounds = plain_steps = 0
    for index, (prompt, expected) in enumerate(zip(prompts(SOME), plain[:SOME], strict=True)):
        policy = DraftPolicy(5, is_adaptive=True, has_bonus=bonus)
        result = speculate(model, prompt, policy, exit_layer=EXITS[index % 3])
        assert result.tokens == expected
        rounds += result.stats.rounds
        plain_steps += result.stats.plain
    assert rounds
    assert plain_steps


@pytest.mark.parametrize("draft_vocab", [2, 40, 200])
def test_a_trimmed_head_drafts_worse_but_emits_the_same(
    tiny_bundles: TinyBundles, plain: list[tuple[int, ...]], draft_vocab: int
) -> None:
    model = load(tiny_bundles.bundle(SPECULATOR, *EXITS, draft_vocab=draft_vocab))
    drafted = accepted = 0
    for index, (prompt, expected) in enumerate(zip(prompts(SOME), plain[:SOME], strict=True)):
        assert decode(model, prompt).tokens == expected
        policy = POLICIES[index % len(POLICIES)]
        result = speculate(model, prompt, policy, exit_layer=EXITS[index % 3])
        assert result.tokens == expected
        drafted += result.stats.drafted
        accepted += result.stats.accepted
    assert accepted < drafted
    assert accepted or draft_vocab == 2


@pytest.mark.parametrize("is_tied", [False, True])
def test_biases_and_padded_heads_change_nothing(tiny_bundles: TinyBundles, is_tied: bool) -> None:
    tiny = replace(
        SPECULATOR,
        name=f"speculator-{is_tied}",
        attention_bias=True,
        mlp_bias=True,
        head_dim=20,
        is_tied=is_tied,
        vocab=131,
        hidden=60,
        heads=6,
        kv_heads=3,
    )
    model = load(tiny_bundles.bundle(tiny, *EXITS))
    for prompt, policy in zip(prompts(len(POLICIES)), POLICIES, strict=True):
        prompt = [token % tiny.vocab for token in prompt]
        expected = decode(model, prompt).tokens
        for exit_layer in EXITS[:: 1 + policy.has_bonus]:
            assert speculate(model, prompt, policy, exit_layer=exit_layer).tokens == expected


@pytest.mark.parametrize("length", [PREFILL_ROWS - 1, PREFILL_ROWS, PREFILL_ROWS + 1, 2 * PREFILL_ROWS + 37])
def test_prompts_around_and_beyond_a_prefill_chunk_give_the_plain_tokens(model: Model, length: int) -> None:
    prompt = prompts(1, length)[0]
    expected = decode(model, prompt).tokens
    # The same prompt in two halves, the second on the cache of the first, must give the same tokens.
    decode(model, prompt[: length // 2], 1)
    assert decode(model, prompt, reuse_cache=True).tokens == expected
    for policy, exit_layer in zip(POLICIES[::2], EXITS * 2, strict=True):
        assert speculate(model, prompt, policy, exit_layer=exit_layer).tokens == expected


def test_generations_across_cache_growth_give_the_plain_tokens(tiny_bundles: TinyBundles) -> None:
    tokens = 2 * CHUNK_POSITIONS + 20
    bundle = tiny_bundles.bundle(SPECULATOR, *EXITS)
    for index, (prompt, bonus) in enumerate(zip(prompts(3), (False, True, True), strict=True)):
        expected = decode(load(bundle), prompt, tokens).tokens
        model = load(bundle)  # with a cache that has not grown yet
        policy = DraftPolicy(2 + index, has_bonus=bonus)
        assert speculate(model, prompt, policy, tokens, exit_layer=EXITS[index]).tokens == expected
        assert model.cache.capacity >= 2 * CHUNK_POSITIONS


@pytest.mark.parametrize("max_length", [2, 3, 17, 40, CHUNK_POSITIONS + 5])
def test_the_end_of_the_context_ends_every_strategy_at_the_same_token(
    tiny_bundles: TinyBundles, max_length: int
) -> None:
    model = load(tiny_bundles.bundle(SPECULATOR, *EXITS, max_length=max_length))
    for prompt in prompts(3, max(1, max_length - 30)):
        expected = decode(model, prompt, 10_000)
        assert len(prompt) + len(expected.tokens) == max_length
        assert expected.finish_reason == "context"
        for policy, exit_layer in product(POLICIES[:: 1 if max_length < 100 else 5], EXITS[:2]):
            result = speculate(model, prompt, policy, 10_000, exit_layer=exit_layer)
            assert result.tokens == expected.tokens
            assert result.finish_reason == "context"


def test_exits_of_one_bundle_share_the_cache_across_turns(model: Model) -> None:
    text = prompts(1, 20)[0]
    fresh = list(text)
    for turn in range(9):
        expected = decode(model, fresh, 24).tokens
        fresh += [*expected, 5 + turn]
    for turn in range(9):
        options: dict[str, Any] = {"exit_layer": EXITS[turn % 3]} if turn % 4 else {}
        run = speculate(model, text, POLICIES[turn], 24, reuse_cache=turn > 0, **options)
        assert run.stats.reused >= len(text) - 26 if turn else True
        text += [*run.tokens, 5 + turn]
    assert text == fresh


def test_an_end_of_text_inside_a_draft_ends_every_strategy_there(model: Model) -> None:
    ended = 0
    for prompt, (exit_layer, policy) in product(prompts(SOME), [(1, POLICIES[6]), (3, POLICIES[9])]):
        expected = model.generate(prompt, max_new_tokens=TOKENS)
        result = model.generate(
            prompt, max_new_tokens=TOKENS, strategy="self-speculative", exit_layer=exit_layer, draft=policy
        )
        assert (result.tokens, result.text, result.finish_reason) == (
            expected.tokens,
            expected.text,
            expected.finish_reason,
        )
        assert result.stats.is_balanced
        ended += result.finish_reason == "eos"
    assert ended


def test_a_repetition_penalty_keeps_greedy_decoding_lossless(model: Model) -> None:
    sampling = SamplingParams(repetition_penalty=1.3)
    for prompt, policy in zip(prompts(6), POLICIES[::2], strict=True):
        expected = decode(model, prompt, sampling=sampling).tokens
        for exit_layer in EXITS[1:]:
            assert speculate(model, prompt, policy, sampling=sampling, exit_layer=exit_layer).tokens == expected


@pytest.mark.parametrize("strategy", [Plain(), Speculate(draft=DraftPolicy(4))], ids=["plain", "self-speculative"])
def test_sampling_with_a_seed_is_repeatable(model: Model, strategy: Strategy) -> None:
    outputs = set()
    for seed in range(4):
        sampling = SamplingParams(temperature=0.8, top_k=50, top_p=0.95, min_p=0.01, seed=seed)
        options: dict[str, Any] = {"sampling": sampling, "strategy": strategy}
        first = decode(model, prompts(1)[0], **options).tokens
        assert decode(model, prompts(1)[0], **options).tokens == first
        outputs.add(first)
    assert len(outputs) == 4


def test_a_float16_bundle_forks_only_at_near_ties(tiny_bundles: TinyBundles) -> None:
    """Rung 2 of the guarantee ladder: in float16 one row and many may round differently."""
    model = load(tiny_bundles.bundle(SPECULATOR, *EXITS, dtype="float16"))
    forks = 0
    for prompt, policy in zip(prompts(len(POLICIES)), POLICIES, strict=True):
        expected, tokens = decode(model, prompt).tokens, speculate(model, prompt, policy).tokens
        fork = next((i for i, (a, b) in enumerate(zip(expected, tokens, strict=True)) if a != b), None)
        if fork is not None:
            forks += 1
            logits = model.activations([*prompt, *expected[:fork]]).heads[SPECULATOR.layers][-1]
            second, best = np.sort(logits)[-2:]
            print(f"fork at new token {fork}, lead {best - second:.1e}")
            assert best - second < tolerances.TINY_FP16.tie
    assert forks <= len(POLICIES) // 3
