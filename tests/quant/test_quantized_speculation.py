"""Through graphs with blocks and int8 caches a run of several rows computes what runs of one row compute, bit for bit;
so self-speculation emits what plain decoding emits, token for token.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from helpers.quantized import INT4, INT4_OFFSETS, INT8, QuantizedBundles, preset
from helpers.tiny_models import SPECULATOR, SWITCHES, TinyBundles, TinyModel
from shortstack.graphs.precision import BlockFormat, KVType
from shortstack.runtime import DraftPolicy, Model, Result, load
from shortstack.runtime.commands.row_check import MOST_ROWS, check_rows
from shortstack.runtime.engine.cache import CHUNK_POSITIONS

EXITS = (1, 3, 4)
PROMPTS = 6
TOKENS = 40
POLICIES = [DraftPolicy(k, has_bonus=bonus) for k, bonus in product((1, 2, 4, 6), (False, True))]
# As likely to accept a run of drafts as not, and sure to reject some: what every grid below relies on.
ACCEPTANCE = (0.15, 0.9)
FORMATS = (INT4, INT4_OFFSETS, INT8)
CACHES: tuple[KVType, ...] = ("float", "int8")
MIXES = pytest.mark.parametrize(
    ("weights", "kv_cache"),
    list(product(FORMATS, CACHES)),
    ids=[f"{weights}, {kv_cache} cache" for weights, kv_cache in product(FORMATS, CACHES)],
)

TINY = {tiny.name: tiny for tiny in SWITCHES}
# Ties, biases, padded heads, widths that are no multiple of a block, one KV head and as many as heads.
MODELS = [
    *(TINY[name] for name in ("tied", "all-biases-tied", "head-dim-20-biased", "head-dim-40", "multi-query")),
    *(TINY[name] for name in ("odd-sizes", "odd-sizes-tied")),
]


def prompts(count: int, tiny: TinyModel = SPECULATOR, length: int | None = None) -> list[list[int]]:
    """Random token ids, the same for every test; 1 to 40 of them, or ``length``."""
    rng = np.random.default_rng(7)
    return [rng.integers(3, tiny.vocab, length or rng.integers(1, 41)).tolist() for _ in range(count)]


def decode(model: Model, prompt: list[int], tokens: int = TOKENS, **options: Any) -> Result:
    result = model.generate(prompt, max_new_tokens=tokens, ignore_eos=True, **options)
    assert result.stats.is_balanced
    assert result.stats.emitted == len(result.tokens)
    return result


def speculate(model: Model, prompt: list[int], policy: DraftPolicy, tokens: int = TOKENS, **options: Any) -> Result:
    return decode(model, prompt, tokens, strategy="self-speculative", draft=policy, **options)


def check_exits(model: Model, tiny: TinyModel, count: int, policies: list[DraftPolicy] = POLICIES) -> float:
    """Every exit gives the plain tokens with every policy; returns the share of drafts accepted."""
    drafted = accepted = 0
    for prompt in prompts(count, tiny):
        expected = decode(model, prompt).tokens
        for exit_layer, policy in product(model.exit_layers, policies):
            result = speculate(model, prompt, policy, exit_layer=exit_layer)
            assert result.tokens == expected, (exit_layer, policy)
            drafted += result.stats.drafted
            accepted += result.stats.accepted
    return accepted / drafted


def check_bits(model: Model, length: int = 40) -> None:
    vocab = model.bundle.manifest.spec.vocab_size
    text = np.random.default_rng(3).integers(3, vocab, length).tolist()
    checks = check_rows(model, text)
    assert [check.rows for check in checks] == list(range(1, MOST_ROWS + 1))
    assert all(check.is_exact for check in checks), checks


@MIXES
def test_every_exit_and_draft_length_gives_the_plain_tokens(
    tiny_bundles: TinyBundles, quantized: QuantizedBundles, weights: BlockFormat, kv_cache: KVType
) -> None:
    model = load(quantized(tiny_bundles.bundle(SPECULATOR, *EXITS), preset(weights, kv_cache)))
    low, high = ACCEPTANCE
    assert low < check_exits(model, SPECULATOR, PROMPTS) < high, "the grid must meet accepted and rejected drafts"


@MIXES
@pytest.mark.parametrize("length", [MOST_ROWS + 1, 40, CHUNK_POSITIONS, CHUNK_POSITIONS + MOST_ROWS // 2])
def test_rows_are_the_same_bit_for_bit_at_every_past(
    tiny_bundles: TinyBundles, quantized: QuantizedBundles, weights: BlockFormat, kv_cache: KVType, length: int
) -> None:
    check_bits(load(quantized(tiny_bundles.bundle(SPECULATOR, *EXITS), preset(weights, kv_cache))), length)


@pytest.mark.parametrize("kv_cache", CACHES)
@pytest.mark.parametrize("tiny", MODELS, ids=lambda tiny: tiny.name)
def test_ties_biases_padded_heads_and_odd_widths_change_nothing(
    tiny_bundles: TinyBundles, quantized: QuantizedBundles, tiny: TinyModel, kv_cache: KVType
) -> None:
    bundle = tiny_bundles.bundle(tiny, 1, 3)
    for weights in (INT8, replace(INT4, is_symmetric=True), INT4_OFFSETS):
        model = load(quantized(bundle, preset(weights, kv_cache)))
        check_bits(model)
        check_exits(model, tiny, 1, POLICIES[::3])


@MIXES
def test_a_trimmed_head_of_blocks_drafts_worse_and_emits_the_same(
    tiny_bundles: TinyBundles, quantized: QuantizedBundles, weights: BlockFormat, kv_cache: KVType
) -> None:
    mix = preset(weights, kv_cache)
    whole = load(quantized(tiny_bundles.bundle(SPECULATOR, *EXITS), mix))
    trimmed = load(quantized(tiny_bundles.bundle(SPECULATOR, *EXITS, draft_vocab=100), mix))
    for prompt in prompts(2):
        assert decode(trimmed, prompt).tokens == decode(whole, prompt).tokens
    assert check_exits(trimmed, SPECULATOR, 2) < 0.9


@pytest.mark.parametrize("kv_cache", CACHES)
@pytest.mark.parametrize("tiny", [TINY["base"], TINY["tied"]], ids=lambda tiny: tiny.name)
def test_first_rows_of_a_format_of_their_own_change_nothing(
    tiny_bundles: TinyBundles, quantized: QuantizedBundles, tiny: TinyModel, kv_cache: KVType
) -> None:
    mix = preset(INT4, kv_cache, first_rows=100, first_rows_format=INT8)
    for options in ({}, {"draft_vocab": 64}):
        model = load(quantized(tiny_bundles.bundle(tiny, 1, 3, **options), mix))
        check_bits(model)
        check_exits(model, tiny, 1, POLICIES[::3])


@pytest.mark.parametrize("head", [INT8, None])
def test_a_lower_draft_head_changes_what_is_drafted_and_never_what_is_emitted(
    tiny_bundles: TinyBundles, quantized: QuantizedBundles, head: BlockFormat | None
) -> None:
    bundle = tiny_bundles.bundle(SPECULATOR, *EXITS)
    shared = load(quantized(bundle, preset(INT4, head=head)))
    lower = load(quantized(bundle, preset(INT4, head=head, draft_head=INT4)))
    proposals = []
    for model in (shared, lower):
        results = [speculate(model, prompt, DraftPolicy(4), exit_layer=3) for prompt in prompts(PROMPTS)]
        proposals.append(sum(result.stats.accepted for result in results))
    assert proposals[0] != proposals[1]
    for prompt in prompts(PROMPTS):
        expected = decode(shared, prompt).tokens
        assert decode(lower, prompt).tokens == expected
        for exit_layer in EXITS:
            assert speculate(lower, prompt, DraftPolicy(3), exit_layer=exit_layer).tokens == expected


@pytest.mark.parametrize("kv_cache", CACHES)
@pytest.mark.parametrize("max_length", [2, 3, 17, 40, CHUNK_POSITIONS, CHUNK_POSITIONS + 5])
def test_every_strategy_reaches_the_last_position_of_the_context(
    tiny_bundles: TinyBundles, quantized: QuantizedBundles, kv_cache: KVType, max_length: int
) -> None:
    bundle = tiny_bundles.bundle(SPECULATOR, *EXITS, max_length=max_length)
    model = load(quantized(bundle, preset(INT4, kv_cache)))
    for prompt in prompts(2, length=max(1, max_length - 30)):
        expected = decode(model, prompt, 10_000)
        assert len(prompt) + len(expected.tokens) == max_length
        assert expected.finish_reason == "context"
        for policy, exit_layer in product(POLICIES[::3], EXITS[:2]):
            result = speculate(model, prompt, policy, 10_000, exit_layer=exit_layer)
            assert result.tokens == expected.tokens
            assert result.finish_reason == "context"


@pytest.mark.parametrize("kv_cache", CACHES)
def test_the_whole_context_of_a_model_can_be_decoded(
    tiny_bundles: TinyBundles, quantized: QuantizedBundles, kv_cache: KVType
) -> None:
    """As many positions as the model was made for: a spare row and its rotary angles lie one beyond."""
    model = load(quantized(tiny_bundles.bundle(SPECULATOR, *EXITS), preset(INT8, kv_cache)))
    prompt = prompts(1, length=SPECULATOR.context - 12)[0]
    expected = decode(model, prompt, 10_000)
    assert len(prompt) + len(expected.tokens) == SPECULATOR.context
    assert speculate(model, prompt, DraftPolicy(5), 10_000, exit_layer=3).tokens == expected.tokens


@pytest.mark.parametrize("kv_cache", CACHES)
def test_growing_the_cache_and_turns_on_a_kept_one_change_nothing(
    tiny_bundles: TinyBundles, quantized: QuantizedBundles, kv_cache: KVType
) -> None:
    folder = quantized(tiny_bundles.bundle(SPECULATOR, *EXITS), preset(INT4, kv_cache))
    model = load(folder)
    text = prompts(1, length=CHUNK_POSITIONS - 30)[0]
    for turn, policy in enumerate(POLICIES[:4]):
        expected = decode(load(folder), text).tokens
        assert speculate(model, text, policy, reuse_cache=turn > 0, exit_layer=EXITS[turn % 3]).tokens == expected
        text += [*expected, 5 + turn]
    assert model.cache.capacity > CHUNK_POSITIONS
