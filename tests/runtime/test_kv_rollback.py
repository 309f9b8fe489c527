"""Shared keys and values after a rollback: rows of another text lie beyond the cache's end, and nothing sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from helpers.kv_bundles import KVBundles
from helpers.kv_cases import NINE, TOLERANCE, cases, early, exits_of, ids, wanted
from shortstack.graphs.kv_map import complete_from
from shortstack.runtime import DraftPolicy, ExitPolicy, load, parse_criterion
from shortstack.runtime.engine.stack import Stack

PROMPT, ROWS = 9, 4


def one_round(stack: Stack, tokens: Sequence[int], past: int) -> list[np.ndarray]:
    """Draft the given tokens, whatever the exit predicts, and verify them in one run; return what each head chose."""
    drafts = []
    for row, token in enumerate(tokens):
        stack.put(row, token)
        stack.draft(row, past, with_head=True, with_logits=True)
        drafts.append(int(stack.exit.token[row]))
    for row, token in enumerate(tokens):
        stack.put(row, token)  # the draft run has written the exit's own token there
    stack.verify(len(tokens), past, True)
    return [np.array(drafts), stack.final.token[: len(tokens)]][-len(stack.heads) :]


@cases
def test_rejected_rows_leave_no_trace_in_any_logit(
    kv_bundles: KVBundles, kv_map: tuple[int, ...], changes: dict[str, Any]
) -> None:
    exits, layers = exits_of(kv_map), len(kv_map)
    model, twin = load(kv_bundles.bundle(kv_map, *exits, **changes)), kv_bundles.twin(kv_map, **changes)
    text = ids(PROMPT + 2 * ROWS)
    wrong = [(token - 3 + 61) % 128 + 3 for token in text]
    rounds = [  # past, and how many of the four tokens are right
        (PROMPT, 0),
        (PROMPT, 2),
        (PROMPT + 2, 4),
        (PROMPT + 1, 0),  # deeper than the round before
        (PROMPT, 4),
        (PROMPT + 4, 4),
    ]
    for used in (*((depth,) for depth in exits), ()):
        stack = model.exclusive_stack(used)
        stack.prefill(text[:PROMPT], 0, False)
        for past, right in rounds:
            tokens = [*text[past : past + right], *wrong[past + right : past + ROWS]]
            chosen = one_round(stack, tokens, past)
            expected = wanted(twin, [*text[:past], *tokens], (*used, layers))
            for depth, head, token in zip((*used, layers), stack.heads, chosen, strict=True):
                assert np.abs(head.logits[:ROWS] - expected[depth][past:]).max() <= TOLERANCE, (used, depth, past)
                assert (token == expected[depth][past:].argmax(-1)).all()
    assert np.abs(wanted(twin, wrong, (layers,))[layers] - wanted(twin, text, (layers,))[layers]).max() > 1


@cases
def test_verified_drafts_give_the_tokens_of_plain_decoding(
    kv_bundles: KVBundles, kv_map: tuple[int, ...], changes: dict[str, Any]
) -> None:
    exits = exits_of(kv_map)
    if not exits:
        pytest.skip("no depth at which this map may be cut")
    model = load(kv_bundles.bundle(kv_map, *exits, **changes))
    drafted = rejected = 0
    for seed in range(3):
        plain = model.generate(ids(7, seed), max_new_tokens=24, ignore_eos=True)
        for depth in exits:
            for policy in (DraftPolicy(2), DraftPolicy(4, has_bonus=True)):
                found = model.generate(
                    ids(7, seed),
                    max_new_tokens=24,
                    ignore_eos=True,
                    strategy="self-speculative",
                    exit_layer=depth,
                    draft=policy,
                )
                assert found.tokens == plain.tokens
                drafted += found.stats.drafted
                rejected += found.stats.rejected
            exact = ExitPolicy(parse_criterion("top_prob >= 0.1"), exit_layers=(depth,), verify="exact")
            assert early(model, ids(7, seed), exact) == plain.tokens
        exact = ExitPolicy(parse_criterion("top_prob >= 0.1"), verify="exact")
        assert early(model, ids(7, seed), exact) == plain.tokens
    assert drafted > 0
    assert rejected > 0, "random layers above an exit change most tokens"


@pytest.mark.parametrize("kv_map", [kv_map for kv_map in NINE if exits_of(kv_map)], ids=str)
def test_calm_layers_above_an_exit_accept_some_drafts_but_not_all(
    kv_bundles: KVBundles, kv_map: tuple[int, ...]
) -> None:
    depth = exits_of(kv_map)[-1]
    model = load(kv_bundles.bundle(kv_map, depth, calm_above=depth))
    accepted = rejected = 0
    for seed in range(6):
        plain = model.generate(ids(7, seed), max_new_tokens=30, ignore_eos=True)
        found = model.generate(
            ids(7, seed), max_new_tokens=30, ignore_eos=True, strategy="self-speculative", draft=DraftPolicy(4)
        )
        assert found.tokens == plain.tokens
        accepted += found.stats.accepted
        rejected += found.stats.rejected
    assert accepted > 0
    assert rejected > 0


def test_every_map_with_a_complete_exit_is_cut_there() -> None:
    assert len(set(NINE)) == 9
    complete = [kv_map for kv_map in NINE if complete_from(kv_map) < len(kv_map)]
    assert len(complete) == 4  # pizza-bottom and -middle, lasagna-bottom and -middle
    assert all(complete_from(kv_map) in exits_of(kv_map) for kv_map in complete)
