"""Early exit on real graphs: the keys and values equal those of full-depth decoding, whichever tokens exit early, and
the output is the same where that is promised.

The exits 1, 2 and 3 of a random six-layer model predict the whole model's token about half the time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import tolerances
from helpers.exit_runs import Pattern
from helpers.scripted_texts import examples
from helpers.tiny_models import SPECULATOR, TinyBundles
from shortstack.graphs import names
from shortstack.graphs.errors import RequestError
from shortstack.runtime import ExitPolicy, Model, Placement, SamplingParams, load, parse_criterion
from shortstack.runtime.early_exit.criteria import Criterion
from shortstack.runtime.early_exit.policy import KVPolicy
from shortstack.runtime.early_exit.reading import Reading

EXITS = (1, 2, 3)
TOKENS = 48
CRITERIA = (
    "top_prob >= 0.3",
    "top_prob >= 0.5 [1: 0.8, 3: 0.2] ~ 4",
    "margin >= 0.1",
    "entropy <= 3.0",
    "similarity >= 0.9",
    "patience >= 2",
    "votes >= 2",
    "mean_prob >= 0.2",
    "max_depth = 3..1",
    "margin >= 0.05 and patience >= 2",
    "entropy <= 1.5 or votes >= 3",
    "always",
)
KV_POLICIES: tuple[KVPolicy, ...] = ("flush", "pipeline", "auto", "recompute")


@dataclass(frozen=True)
class Scripted:
    """Decides by position only, after a pattern, so that the decisions are the same for every KV policy."""

    pattern: Pattern
    needs = frozenset[str]()
    least_exits = 1
    exit_layers = frozenset[int]()

    def leaves(self, reading: Reading) -> bool:
        return self.pattern.leaves_at[(5 * reading.position + reading.exit_layer) % len(self.pattern.leaves_at)]


@pytest.fixture(scope="module")
def model(tiny_bundles: TinyBundles) -> Model:
    return load(tiny_bundles.bundle(SPECULATOR, *EXITS))


def prompt(seed: int, length: int = 9) -> list[int]:
    return np.random.default_rng(seed).integers(3, SPECULATOR.vocab, length).tolist()


def generate(model: Model, ids: Sequence[int], policy: ExitPolicy, tokens: int = TOKENS, **options: Any) -> Any:
    result = model.generate(ids, max_new_tokens=tokens, ignore_eos=True, strategy="early-exit", exits=policy, **options)
    assert result.stats.is_balanced
    assert sum(result.stats.exits.values()) == result.stats.emitted == len(result.tokens)
    return result


def plain(model: Model, ids: Sequence[int], tokens: int = TOKENS, **options: Any) -> tuple[int, ...]:
    return model.generate(ids, max_new_tokens=tokens, ignore_eos=True, **options).tokens


def kv(model: Model, positions: int) -> list[np.ndarray]:
    """Return the keys and values of every layer, each [kv_heads, positions, head_dim]."""
    layers = range(SPECULATOR.layers)
    return [
        model.cache.buffer(layer, part).numpy()[0, :, :positions].copy() for layer in layers for part in names.KV_PARTS
    ]


def assert_kv_is_that_of_full_depth(model: Model, text: Sequence[int]) -> None:
    """Check that the last generation left the keys and values that one run of all layers over its text writes."""
    positions = len(text) - 1  # the newest token is not cached
    left = kv(model, positions)
    model.exclusive_stack().prefill(text[:positions], 0, False)
    for mine, full in zip(left, kv(model, positions), strict=True):
        assert np.abs(mine - full).max() <= tolerances.FLUSHED_KV * np.abs(full).max()


@pytest.mark.parametrize(("expression", "kv_policy"), list(product(CRITERIA, KV_POLICIES)))
def test_every_criterion_gives_the_keys_and_values_of_full_depth(
    model: Model, expression: str, kv_policy: KVPolicy
) -> None:
    policy = ExitPolicy(parse_criterion(expression), kv_policy=kv_policy)
    exited = 0
    for seed in range(3):
        ids = prompt(seed)
        result = generate(model, ids, policy)
        exited += result.stats.exited
        assert_kv_is_that_of_full_depth(model, [*ids, *result.tokens])
    assert exited > 10, "hardly any token exited early, so this shows nothing"


@examples(40)
@given(
    st.lists(st.booleans(), min_size=1, max_size=15),
    st.sampled_from(KV_POLICIES),
    st.sampled_from([(1,), (3,), (1, 3), EXITS]),
    st.none() | st.integers(1, 16),
    st.integers(1, 40),
    st.integers(0, 100),
)
def test_random_exit_patterns_give_the_keys_and_values_of_full_depth(
    model: Model,
    leaves_at: list[bool],
    kv_policy: KVPolicy,
    exits: tuple[int, ...],
    cap: int | None,
    tokens: int,
    seed: int,
) -> None:
    policy = ExitPolicy(Scripted(Pattern(leaves_at)), exits, kv_policy=kv_policy, max_pending=cap)
    ids = prompt(seed, 1 + seed % 20)
    result = generate(model, ids, policy, tokens)
    assert_kv_is_that_of_full_depth(model, [*ids, *result.tokens])
    at_once = ExitPolicy(Scripted(Pattern(leaves_at)), exits, max_pending=1)
    assert generate(model, ids, at_once, tokens).tokens == result.tokens


@pytest.mark.parametrize("expression", CRITERIA)
def test_exact_verification_gives_the_plain_tokens(model: Model, expression: str) -> None:
    accepted = rejected = 0
    for seed, cap in product(range(6), (None, 3)):
        policy = ExitPolicy(parse_criterion(expression), verify="exact", max_pending=cap)
        result = generate(model, prompt(seed), policy)
        assert result.tokens == plain(model, prompt(seed))
        accepted += result.stats.accepted
        rejected += result.stats.rejected
    assert accepted > 10
    assert rejected > 10


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("expression", ["never", "never and top_prob >= 0.1", "entropy <= 0"])
def test_a_threshold_that_is_never_reached_is_plain_decoding(
    model: Model, expression: str, kv_policy: KVPolicy
) -> None:
    for seed in range(4):
        policy = ExitPolicy(parse_criterion(expression), kv_policy=kv_policy)
        assert generate(model, prompt(seed), policy).tokens == plain(model, prompt(seed))


def test_all_kv_policies_generate_the_same(model: Model) -> None:
    for expression, ids in product(CRITERIA, (prompt(0), prompt(1))):
        criterion = parse_criterion(expression)
        texts = {
            generate(model, ids, ExitPolicy(criterion, kv_policy=way, max_pending=cap)).tokens
            for way, cap in product(KV_POLICIES, (None, 5))
        }
        assert len(texts) == 1, expression


@pytest.mark.parametrize("length", [1, 9, 300])
def test_a_prompt_that_may_exit_early_gives_the_same_keys_and_values(model: Model, length: int) -> None:
    ids = prompt(1, length)
    for expression in ("always", "top_prob >= 0.3", "similarity >= 0.8", "never"):
        policy = ExitPolicy(parse_criterion(expression), prefill_exit=True)
        result = generate(model, ids, policy, 30)
        assert_kv_is_that_of_full_depth(model, [*ids, *result.tokens])
        if expression in ("always", "never"):
            assert result.stats.prefilled == (expression == "never")


@pytest.mark.parametrize("length", [1, 9, 300])
def test_a_rule_that_compares_residual_streams_sees_those_of_the_prompt(model: Model, length: int) -> None:
    ids = prompt(4, length)
    wanted = model.activations(ids).hidden
    stack = model.exclusive_stack(EXITS)
    stack.prefill(prompt(5, 40), 0, False)  # leaves something else in the rows
    for level, depth in enumerate(EXITS):
        stack.prefill_level(level, ids, 0, True, False)
        assert np.abs(stack.hidden(level, 0) - wanted[depth][-1]).max() < 1e-4


def test_the_next_turn_starts_from_the_flushed_cache(model: Model) -> None:
    policy = ExitPolicy(parse_criterion("always"))
    ids = prompt(2)
    first = generate(model, ids, policy, 20)
    turn = [*ids, *first.tokens, *prompt(3)]
    for kv_policy in ("flush", "pipeline"):
        again = generate(model, turn, ExitPolicy(parse_criterion("always"), kv_policy=kv_policy), 20, reuse_cache=True)
        assert again.stats.reused > 0
        assert again.tokens == generate(model, turn, policy, 20).tokens
        generate(model, ids, policy, 20)


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
def test_end_stop_and_cancellation_leave_a_usable_model(model: Model, kv_policy: KVPolicy) -> None:
    policy = ExitPolicy(parse_criterion("top_prob >= 0.2"), kv_policy=kv_policy)
    options: dict[str, Any] = {"strategy": "early-exit", "exits": policy}
    whole = generate(model, prompt(4), policy)
    text = model.tokenizer.decode(list(whole.tokens))
    stop = text[8:11]
    stopped = model.generate(prompt(4), max_new_tokens=TOKENS, stop=[stop], ignore_eos=True, **options)
    assert stopped.finish_reason == "stop"
    assert stopped.text == text[: text.index(stop)]

    stream = model.stream(prompt(4), max_new_tokens=TOKENS, ignore_eos=True, **options)
    taken = [next(stream).id for _ in range(7)]
    stream.cancel()
    assert next(stream, None) is None
    assert stream.finish_reason == "cancelled"
    assert tuple(taken) == whole.tokens[:7]
    assert_kv_is_that_of_full_depth(model, [*prompt(4), *taken])

    superseded = model.stream(prompt(4), max_new_tokens=TOKENS, ignore_eos=True, **options)
    next(superseded)
    assert generate(model, prompt(4), policy).tokens == whole.tokens
    with pytest.raises(RequestError, match="newer one"):
        next(superseded)
    alive = [thread.name for thread in threading.enumerate() if "shortstack level" in thread.name]
    assert alive == []


def test_the_end_token_ends_the_text_at_any_exit(model: Model) -> None:
    found: set[int] = set()
    for seed in range(16):
        for kv_policy in ("flush", "pipeline"):
            policy = ExitPolicy(parse_criterion("top_prob >= 0.25"), kv_policy=kv_policy)
            tokens = list(model.stream(prompt(seed), max_new_tokens=120, strategy="early-exit", exits=policy))
            if tokens[-1].id in model.tokenizer.eos_token_ids:
                found.add(tokens[-1].exit_layer)
                assert all(token.id not in model.tokenizer.eos_token_ids for token in tokens[:-1])
    assert SPECULATOR.layers in found, "no text was ended by the whole model"
    assert found - {SPECULATOR.layers}, "no text was ended by an exit"


def test_every_token_records_its_exit_and_confidence(model: Model) -> None:
    policy = ExitPolicy(parse_criterion("top_prob >= 0.3"))
    stream = model.stream(prompt(5), max_new_tokens=TOKENS, ignore_eos=True, strategy="early-exit", exits=policy)
    tokens = list(stream)
    assert {token.exit_layer for token in tokens} >= {1, 6}
    for token in tokens:
        assert (token.pending > 0) == (token.exit_layer < 6)
        assert 0 < token.confidence <= 1
        assert token.exit_layer == 6 or token.confidence >= 0.3
    assert stream.stats.mean_exit_layer == pytest.approx(np.mean([token.exit_layer for token in tokens]))


def test_every_token_is_what_its_head_predicts_for_the_text_so_far(model: Model) -> None:
    differ = 0
    for expression in ("top_prob >= 0.2", "margin >= 0.1 and patience >= 2", "always"):
        policy = ExitPolicy(parse_criterion(expression))
        ids = prompt(7)
        stream = model.stream(ids, max_new_tokens=TOKENS, ignore_eos=True, strategy="early-exit", exits=policy)
        tokens = list(stream)
        heads = model.activations([*ids, *(token.id for token in tokens)]).heads
        for index, token in enumerate(tokens):
            row = len(ids) - 1 + index
            assert token.id == heads[token.exit_layer][row].argmax()
            differ += token.id != heads[SPECULATOR.layers][row].argmax()
    assert differ, "every token that exited early is also the whole model's choice"


def test_upper_layers_on_separate_threads_generate_the_same(tiny_bundles: TinyBundles, model: Model) -> None:
    bundle = tiny_bundles.bundle(SPECULATOR, *EXITS)
    with pytest.raises(RequestError, match="another process"):
        load(bundle, upper=Placement(threads=1))
    ids = prompt(0)
    expected = [generate(model, ids, ExitPolicy(parse_criterion("top_prob >= 0.3"))).tokens] * 4
    script = f"""
import json
from shortstack.runtime import ExitPolicy, Placement, load, parse_criterion
model = load({str(bundle)!r}, threads=1, upper=Placement(threads=1))
load({str(bundle)!r})  # a second model shares nothing with it and is not an error
texts = []
for way in {KV_POLICIES!r}:
    exits = ExitPolicy(parse_criterion("top_prob >= 0.3"), kv_policy=way)
    options = dict(max_new_tokens={TOKENS}, ignore_eos=True, strategy="early-exit", exits=exits)
    texts.append(model.generate({ids!r}, **options).tokens)
print(json.dumps(texts))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == [list(tokens) for tokens in expected]


def test_sampling_at_exits_is_repeatable_and_exact_if_verified(model: Model) -> None:
    sampling = SamplingParams(temperature=0.9, top_p=0.9, seed=3)
    criterion: Criterion = parse_criterion("top_prob >= 0.3")
    for options in ({"kv_policy": "pipeline"}, {"kv_policy": "flush"}, {"verify": "exact"}):
        texts = {
            generate(model, prompt(6), ExitPolicy(criterion, **options), sampling=sampling).tokens for _ in range(3)
        }
        assert len(texts) == 1
    with pytest.raises(RequestError, match="greedy"):
        generate(model, prompt(6), ExitPolicy(criterion, verify="rollback"), sampling=sampling)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"strategy": "early-exit", "exits": ExitPolicy(parse_criterion("gate >= 0.5"))}, "needs a gate"),
        ({"strategy": "early-exit"}, "ExitPolicy"),
        ({"strategy": "plain", "exits": ExitPolicy(parse_criterion("always"))}, "ExitPolicy"),
        ({"strategy": "early-exit", "exits": ExitPolicy(parse_criterion("always"), (5,))}, "unknown exit 5"),
        ({"strategy": "early-exit", "exits": ExitPolicy(parse_criterion("always")), "exit_layer": 1}, "exit_layers"),
        ({"strategy": "late-exit"}, "early-exit"),
    ],
)
def test_impossible_requests_are_refused(model: Model, options: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        model.stream(prompt(0), **options)
