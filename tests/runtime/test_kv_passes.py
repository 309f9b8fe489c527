"""Passes over iterated groups: how many run, which positions they make final, and what fewer passes give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from helpers.kv_bundles import KVBundles
from helpers.kv_cases import TOLERANCE, exits_of, ids
from shortstack.__main__ import run
from shortstack.export.twin.model import Twin
from shortstack.export.twin.sequential import sequential
from shortstack.graphs.errors import RequestError
from shortstack.graphs.kv_map import placement, producers
from shortstack.runtime import Model, load
from shortstack.runtime.engine.binding import Binding

LENGTH = 12
TOP = placement("sandwich", "top", 6, 3)
MAPS = {
    "sandwich-top": TOP,
    "pizza-middle": placement("pizza", "middle", 6, 3),
    "three groups": placement("lasagna", "middle", 9, 3),
    "overlapping groups": (3, 4, 4, 3, 4, 5),
    "a producer without consumers in a group": (2, 1, 2, 3),
}
maps = pytest.mark.parametrize("name", MAPS)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Callable[[Model], list[int]]:
    """Return a function that tells how often each graph of a model ran since its last call."""
    counted: Counter[Any] = Counter()
    whole = Binding.run

    def watch(binding: Binding) -> None:
        counted[binding._run.__self__] += 1
        whole(binding)

    def read(model: Model) -> list[int]:
        found = [counted[session] for session in model.graphs.sessions]
        counted.clear()
        return found

    monkeypatch.setattr(Binding, "run", watch)
    return read


def kept(model: Model, text: list[int]) -> dict[int, list[np.ndarray]]:
    """Return the keys and values [1, kv_heads, len(text), head_dim] after a prompt, by producer."""
    kv_map = model.bundle.manifest.spec.kv_map
    model.exclusive_stack().prefill(text, 0, True)
    return {owner: model.cache.read(owner, 0, len(text)) for owner in producers(kv_map, 0, len(kv_map))}


def last_logits(model: Model) -> np.ndarray:
    return model._stack(()).final.logits[0].copy()


@torch.no_grad()
def after_passes(twin: Twin, text: list[int], passes: int) -> np.ndarray:
    """Return the logits [vocab] of the last position after a number of passes.

    The first position is final, all others begin with nothing, and the whole stack runs in each pass. The runtime does
    the same if no exit divides the layers.
    """
    tokens, spec = torch.tensor([text]), twin.spec
    first = sequential(twin, tokens[:, :1]).caches
    lent = {
        owner: tuple(torch.nn.functional.pad(part, (0, 0, 0, len(text) - 1)) for part in parts)
        for owner, parts in first.items()
    }
    x = twin.model.embed_tokens(tokens)
    for _ in range(passes):
        hidden, _ = twin._once(0, spec.num_hidden_layers, x, twin._rotary_of(tokens), lent)  # type: ignore[arg-type]
    return twin.logits(hidden)[0, -1].numpy()  # type: ignore[no-any-return]


@maps
@pytest.mark.parametrize("masks_diagonal", [False, True])
def test_n_passes_make_the_first_positions_final(kv_bundles: KVBundles, name: str, masks_diagonal: bool) -> None:
    """One position more than n is final, since the first position has run alone."""
    changes: dict[str, Any] = {"masks_diagonal": True} if masks_diagonal else {}
    bundle, text = kv_bundles.bundle(MAPS[name], **changes), ids(LENGTH)
    final = kept(load(bundle, prefill_passes=LENGTH + 3), text)
    converged = kept(load(bundle, prefill_passes="converged"), text)
    exact = kept(load(bundle, prefill_passes="sequential"), text)
    for owner, parts in final.items():
        for part, stopped, one_by_one in zip(parts, converged[owner], exact[owner], strict=True):
            assert np.abs(part - stopped).max() <= TOLERANCE
            assert np.abs(part - one_by_one).max() <= TOLERANCE
    for passes in (1, 2, 4, LENGTH - 1):
        found = kept(load(bundle, prefill_passes=passes), text)
        is_open = False
        for owner, parts in found.items():
            for part, end in zip(parts, final[owner], strict=True):
                assert np.array_equal(part[:, :, : passes + 1], end[:, :, : passes + 1]), (passes, owner)
                later = np.abs(part - end)[:, :, passes + 1 :]
                is_open |= bool(later.size) and bool(later[:, :, 0].max() > 1e-3)
        assert is_open or passes > 2, "the next position must still be open, else this shows nothing"


@maps
def test_as_many_passes_as_positions_give_the_logits_of_decoding_one_by_one(kv_bundles: KVBundles, name: str) -> None:
    text = ids(LENGTH)
    with torch.no_grad():
        exact = sequential(kv_bundles.twin(MAPS[name]), torch.tensor([text])).logits[0, -1].numpy()
    for passes in (LENGTH - 1, LENGTH, LENGTH + 3, "converged", "sequential"):
        model = load(kv_bundles.bundle(MAPS[name]), prefill_passes=passes)  # type: ignore[arg-type]
        kept(model, text)
        assert np.abs(last_logits(model) - exact).max() <= TOLERANCE, passes


@maps
def test_fewer_passes_give_what_the_twin_computes_in_as_many(kv_bundles: KVBundles, name: str) -> None:
    twin, text = kv_bundles.twin(MAPS[name]), ids(LENGTH)
    exact = after_passes(twin, text, LENGTH)
    for passes in (1, 2, 5):
        model = load(kv_bundles.bundle(MAPS[name]), prefill_passes=passes)
        kept(model, ids(LENGTH, 1))  # nothing of this text may remain
        kept(model, text)
        expected = after_passes(twin, text, passes)
        assert np.abs(last_logits(model) - expected).max() <= TOLERANCE, passes
        assert np.abs(expected - exact).max() > TOLERANCE or passes > 2, "too few passes must make a difference"


@maps
def test_a_prompt_runs_the_requested_number_of_passes_and_a_token_one(
    kv_bundles: KVBundles, runs: Callable[[Model], list[int]], name: str
) -> None:
    expected = {1: 1, 4: 4, 20: 20, "sequential": LENGTH - 1}
    for passes, count in expected.items():
        model = load(kv_bundles.bundle(MAPS[name]), prefill_passes=passes)  # type: ignore[arg-type]
        stack = model.exclusive_stack()
        stack.prefill(ids(LENGTH), 0, True)
        assert runs(model) == [1 + count], passes  # the first position runs alone
        for past in range(LENGTH, LENGTH + 3):
            stack.put(0, 7)
            stack.verify(1, past, True)
        assert runs(model) == [3]


@maps
def test_only_the_layers_of_a_group_are_iterated(
    kv_bundles: KVBundles, runs: Callable[[Model], list[int]], name: str
) -> None:
    exits = exits_of(MAPS[name])
    if not exits:
        pytest.skip("no depth at which this map may be cut")
    model = load(kv_bundles.bundle(MAPS[name], *exits), prefill_passes=5)
    stack = model.exclusive_stack(exits[:1])
    stack.prefill(ids(LENGTH), 0, True)
    segments = model.bundle.manifest.plan.segments
    often = [any(MAPS[name][layer] > layer for layer in range(s.start, s.end)) for s in segments]
    # Above a KV-complete exit only the prompt's last position runs.
    owns = [bool(producers(MAPS[name], s.start, s.end)) for s in segments]
    assert any(often)
    assert runs(model) == [1 + (5 if o else 1) if own else 1 for o, own in zip(often, owns, strict=True)]
    for past in range(LENGTH, LENGTH + 3):
        stack.put(0, 7)
        stack.draft(0, past, with_head=True, with_logits=False)
        stack.verify(1, past, True)
    assert runs(model) == [3] * len(segments)


@maps
def test_passes_stop_once_nothing_changes(kv_bundles: KVBundles, runs: Callable[[Model], list[int]], name: str) -> None:
    """Layers that add little, as trained layers do, forget what a pass began with."""
    text, calm = ids(40), {"calm_above": 0}
    model = load(kv_bundles.bundle(MAPS[name], **calm))
    kept(model, text)
    with torch.no_grad():
        exact = sequential(kv_bundles.twin(MAPS[name], **calm), torch.tensor([text])).logits[0, -1].numpy()
    assert np.abs(last_logits(model) - exact).max() <= TOLERANCE
    (count,) = runs(model)
    assert 3 <= count <= 12, "first position, passes, and one that changes nothing; measured: 6 or 7"


@pytest.mark.parametrize("passes", [0, -1, "often", 1.5, True])
def test_passes_that_are_not_valid_are_refused(kv_bundles: KVBundles, passes: Any) -> None:
    with pytest.raises(RequestError, match="passes over a prompt"):
        load(kv_bundles.bundle(TOP), prefill_passes=passes)


def test_generate_accepts_prefill_passes_only_for_models_that_iterate(
    kv_bundles: KVBundles, capsys: pytest.CaptureFixture[str]
) -> None:
    top, bottom = kv_bundles.bundle(TOP), kv_bundles.bundle(placement("sandwich", "bottom", 6, 3))
    for passes in ("9", "converged", "sequential"):
        assert run(["generate", str(top), "the red stone", "-n", "4", "--prefill-passes", passes]) == 0
    capsys.readouterr()
    assert run(["generate", str(top), "the red stone", "--prefill-passes", "often"]) == 2
    assert "'converged' or 'sequential'" in capsys.readouterr().err
    assert run(["generate", str(bottom), "the red stone", "--prefill-passes", "9"]) == 2
    assert "would have no effect" in capsys.readouterr().err
