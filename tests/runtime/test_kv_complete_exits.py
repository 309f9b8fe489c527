"""Exits above which no layer owns a cache: the upper graphs have none, a prompt runs there with its last position only,
and tokens that exit early leave no hole. With other maps, only the missing producers are filled in later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from helpers import tolerances
from helpers.kv_bundles import KVBundles
from helpers.kv_cases import PIZZA, early, ids
from shortstack.graphs import names
from shortstack.graphs.kv_map import complete_from, placement, producers
from shortstack.runtime import ExitPolicy, Model, load, parse_criterion
from shortstack.runtime.early_exit.policy import KVPolicy
from shortstack.runtime.engine.binder import SegmentBinder
from shortstack.runtime.engine.stack import PREFILL_ROWS

TOKENS = 24
COMPLETE: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "pizza-bottom": (PIZZA, (3, 4), {}),
    "pizza-bottom in windows": (PIZZA, (3, 4), {"windows": (4, 4, 0, 5, 0, 3)}),
    "lasagna-bottom": (placement("lasagna", "bottom", 8, 3), (7,), {}),
    "pizza-middle": (placement("pizza", "middle", 7, 3), (5, 6), {}),
    "pizza-middle without diagonal": (placement("pizza", "middle", 7, 3), (5, 6), {"masks_diagonal": True}),
    "lasagna-middle": (placement("lasagna", "middle", 9, 3), (8,), {}),
}
complete_maps = pytest.mark.parametrize("name", COMPLETE)


@complete_maps
def test_above_a_complete_exit_there_is_no_cache(kv_bundles: KVBundles, name: str) -> None:
    kv_map, exits, changes = COMPLETE[name]
    assert exits[0] == complete_from(kv_map)
    model = load(kv_bundles.bundle(kv_map, *exits, **changes))
    for number in range(1, len(exits) + 1):
        inputs = [port.name for port in model.graphs.sessions[number].get_inputs()]
        assert not [port for port in inputs if port.startswith(names.past(0, "").split("0")[0])]
        borrowed = sorted(set(kv_map[model.bundle.manifest.plan.segments[number].start :]))
        assert [port for port in inputs if "shared" in port] == [
            names.shared(layer, part) for layer in borrowed for part in names.KV_PARTS
        ]
    assert len(model.graphs.sessions[-1].get_outputs()) == 5


def criterion(model: Model, measure: str, exits: Sequence[int]) -> str:
    """Return a criterion that half of the positions of some text meet."""
    if measure == "always":
        return measure
    found = model.activations(ids(64))
    if measure == "similarity":
        below, here = (found.hidden[depth] for depth in exits)
        values = (below * here).sum(-1) / np.linalg.norm(below, axis=-1) / np.linalg.norm(here, axis=-1)
    else:
        logits = found.heads[exits[0]]
        values = 1 / np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)
    return f"{measure} >= {np.median(values):.4f}"


@complete_maps
@pytest.mark.parametrize("measure", ["always", "top_prob", "similarity"])
def test_exiting_at_a_complete_exit_changes_no_later_logit(kv_bundles: KVBundles, name: str, measure: str) -> None:
    kv_map, exits, changes = COMPLETE[name]
    if measure == "similarity" and len(exits) == 1:
        pytest.skip("similarity compares an exit with the one below")
    model = load(kv_bundles.bundle(kv_map, *exits, **changes))
    expression = criterion(model, measure, exits)
    left = stayed = 0
    for seed in range(3):
        for kv_policy in ("flush", "pipeline", "auto"):  # recomputing runs other numbers of rows
            policy = ExitPolicy(parse_criterion(expression), kv_policy=kv_policy)  # type: ignore[arg-type]
            prompt = ids(7, seed)
            stream = model.stream(prompt, max_new_tokens=TOKENS, ignore_eos=True, strategy="early-exit", exits=policy)
            tokens = list(stream)
            assert {token.pending for token in tokens} == {0}
            left += sum(token.exit_layer < len(kv_map) for token in tokens[1:])
            stayed += sum(token.exit_layer == len(kv_map) for token in tokens[1:])
            text = [*prompt, *(token.id for token in tokens)]
            # One more full-depth step reads the caches after early exit, and those of a text that never exited early.
            after = []
            for fresh in (False, True):
                stack = model._one._stack(())
                if fresh:
                    stack.prefill(text[:7], 0, False)
                    for past in range(7, len(text) - 1):
                        stack.put(0, text[past])
                        stack.verify(1, past, False)
                stack.put(0, text[-1])
                stack.verify(1, len(text) - 1, True)
                after.append(stack.final.logits[0].copy())
            assert (after[0] == after[1]).all(), "bit for bit"
    assert left > 0
    assert (stayed == 0) is (measure == "always"), "with a criterion, some tokens exit early and some do not"


@complete_maps
def test_only_the_last_position_of_a_prompt_runs_above_a_complete_exit(
    kv_bundles: KVBundles, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    kv_map, exits, changes = COMPLETE[name]
    model = load(kv_bundles.bundle(kv_map, *exits, **changes))
    stack = model.exclusive_stack(exits)
    rows: list[tuple[int, int]] = []
    set_lengths = SegmentBinder.set_lengths

    def watch(binder: SegmentBinder, past: int, count: int) -> None:
        rows.append((binder.index, count))
        set_lengths(binder, past, count)

    monkeypatch.setattr(SegmentBinder, "set_lengths", watch)
    stack.prefill(ids(PREFILL_ROWS + 30), 0, True)
    spec = model.bundle.manifest.spec
    is_first_alone = not all(spec.sees_itself(layer) for layer in range(len(kv_map)))
    chunks = [1, PREFILL_ROWS, 29] if is_first_alone else [PREFILL_ROWS, 30]
    above = [(number, 1) for number in range(1, len(exits) + 1)]
    assert rows == [*((0, count) for count in chunks), *above]


def test_a_level_without_a_cache_runs_only_on_rows_that_need_its_head(
    kv_bundles: KVBundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv_map = placement("lasagna", "bottom", 6, 3)
    model = load(kv_bundles.bundle(kv_map, 2, 5))
    expression = criterion(model, "top_prob", (2, 5))
    stack = model._one._stack((2, 5))
    rows: list[int] = []
    run = stack.run

    def watch(level: int, start: int, end: int, *rest: Any) -> None:
        if level == 2:
            rows.append(end - start)
        run(level, start, end, *rest)

    monkeypatch.setattr(stack, "run", watch)
    texts = set()
    for kv_policy in ("flush", "pipeline", "auto"):
        rows.clear()
        policy = ExitPolicy(parse_criterion(expression), kv_policy=kv_policy)  # type: ignore[arg-type]
        tokens = list(model.stream(ids(7), exits=policy, max_new_tokens=TOKENS, ignore_eos=True))
        whole = sum(token.exit_layer == len(kv_map) for token in tokens[1:])
        assert 0 < whole < len(tokens) - 1, "some tokens leave and some do not"
        assert rows == [1] * whole
        texts.add(tuple(token.id for token in tokens))
    assert len(texts) == 1


@pytest.mark.parametrize("kv_policy", ["flush", "pipeline"])
def test_only_missing_producers_are_filled_in_later(kv_bundles: KVBundles, kv_policy: KVPolicy) -> None:
    kv_map = placement("lasagna", "bottom", 6, 3)  # 0 0 2 2 4 4: complete from 5 on
    model = load(kv_bundles.bundle(kv_map, 2, 5))
    runs: list[tuple[int, int]] = []
    stack = model._one._stack((2, 5))
    run = stack.run

    def watch(level: int, start: int, end: int, *rest: Any) -> None:
        runs.append((level, end - start))
        run(level, start, end, *rest)

    stack.run = watch  # type: ignore[method-assign]
    policy = ExitPolicy(parse_criterion("always"), kv_policy=kv_policy, max_pending=4)
    tokens = early(model, ids(7), policy, 25)
    assert [count for level, count in runs if level == 2] == []
    assert sum(count for level, count in runs if level == 1) == 24
    text = [*ids(7), *tokens]
    left = [model.cache.read(layer, 0, len(text) - 1) for layer in producers(kv_map, 0, 6)]
    model.exclusive_stack().prefill(text[:-1], 0, False)
    for mine, layer in zip(left, producers(kv_map, 0, 6), strict=True):
        for part, full in zip(mine, model.cache.read(layer, 0, len(text) - 1), strict=True):
            assert np.abs(part - full).max() <= tolerances.FLUSHED_KV * np.abs(full).max()
