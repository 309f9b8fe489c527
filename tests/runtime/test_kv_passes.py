"""Passes over iterated groups: how many run, which positions they make final, and what a number means in training."""

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
from shortstack.graphs.kv_map import groups_within, iterated_groups, placement, producers
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
    return model._one._stack(()).final.logits[0].copy()


@torch.no_grad()
def as_trained(twin: Twin, text: list[int], passes: int) -> np.ndarray:
    """Return the logits [vocab] of the last position after as many passes of each group, as training runs them."""
    depth = twin.spec.num_hidden_layers
    boundary = twin.boundaries(torch.tensor([text]), (depth,), passes=passes)[depth]
    return twin.logits(boundary.hidden)[0, -1].numpy()  # type: ignore[no-any-return]


@maps
@pytest.mark.parametrize("masks_diagonal", [False, True])
def test_n_passes_make_the_first_positions_final(kv_bundles: KVBundles, name: str, masks_diagonal: bool) -> None:
    changes: dict[str, Any] = {"masks_diagonal": True} if masks_diagonal else {}
    bundle, text = kv_bundles.bundle(MAPS[name], **changes), ids(LENGTH)
    final = kept(load(bundle, prefill_passes=LENGTH + 3), text)
    converged = kept(load(bundle, prefill_passes="converged"), text)
    exact = kept(load(bundle, prefill_passes="sequential"), text)
    for owner, parts in final.items():
        for part, stopped, one_by_one in zip(parts, converged[owner], exact[owner], strict=True):
            assert np.abs(part - stopped).max() <= TOLERANCE
            assert np.abs(part - one_by_one).max() <= TOLERANCE
    for passes in (2, 4, LENGTH - 1):
        found = kept(load(bundle, prefill_passes=passes), text)
        is_open = False
        for owner, parts in found.items():
            for part, end in zip(parts, final[owner], strict=True):
                assert np.abs(part - end)[:, :, :passes].max() <= TOLERANCE, (passes, owner)
                is_open |= bool(np.abs(part - end)[:, :, passes].max() > 1e-3)
        assert is_open or passes > 2, "the next position must still be open, else this shows nothing"


@maps
def test_as_many_passes_as_positions_give_the_logits_of_decoding_one_by_one(kv_bundles: KVBundles, name: str) -> None:
    text = ids(LENGTH)
    with torch.no_grad():
        exact = sequential(kv_bundles.twin(MAPS[name]), torch.tensor([text])).logits[0, -1].numpy()
    for passes in (LENGTH, LENGTH + 3, "converged", "sequential"):
        model = load(kv_bundles.bundle(MAPS[name]), prefill_passes=passes)  # type: ignore[arg-type]
        kept(model, text)
        assert np.abs(last_logits(model) - exact).max() <= TOLERANCE, passes


@pytest.mark.parametrize("length", [2, 3, 9, 10, 40, 300])
@pytest.mark.parametrize("name", [name for name in MAPS if name != "overlapping groups"])
def test_a_number_of_passes_gives_what_training_with_that_number_computed(
    kv_bundles: KVBundles, name: str, length: int
) -> None:
    """LCKV's seven and two are nine. 300 positions are more than a prompt's chunk."""
    twin, text = kv_bundles.twin(MAPS[name]), ids(length)
    bundles = [kv_bundles.bundle(MAPS[name])]
    if exits := exits_of(MAPS[name]):
        bundles.append(kv_bundles.bundle(MAPS[name], *exits))
    final = as_trained(twin, text, length)
    for passes in (2, 3, 9):
        expected = as_trained(twin, text, passes)
        for bundle in bundles:
            model = load(bundle, prefill_passes=passes)
            kept(model, ids(length, 1))  # nothing of this text may remain
            kept(model, text)
            assert np.abs(last_logits(model) - expected).max() <= TOLERANCE, passes
        assert np.abs(expected - final).max() > TOLERANCE or min(length, 3) <= passes, "too few must be too few"


@pytest.mark.parametrize("changes", [{"masks_diagonal": True}, {"windows": (0, 5, 5, 5, 0, 3)}])
def test_nine_passes_are_those_of_training_for_other_ways_to_attend(
    kv_bundles: KVBundles, changes: dict[str, Any]
) -> None:
    text = ids(60)
    for name in ("sandwich-top", "pizza-middle"):
        model = load(kv_bundles.bundle(MAPS[name], **changes), prefill_passes=9)
        kept(model, text)
        expected = as_trained(kv_bundles.twin(MAPS[name], **changes), text, 9)
        assert np.abs(last_logits(model) - expected).max() <= TOLERANCE


def test_training_itself_computes_what_its_seven_and_two_passes_name(kv_bundles: KVBundles) -> None:
    twin, text = kv_bundles.twin(TOP), torch.tensor([ids(40)])
    assert twin.passes.without_gradient + twin.passes.with_gradient == 9
    depth = twin.spec.num_hidden_layers
    twin.train()
    try:
        trained = twin.logits(twin.boundaries(text, (depth,))[depth].hidden)[0, -1].detach().numpy()
    finally:
        twin.eval()
    model = load(kv_bundles.bundle(TOP), prefill_passes=9)
    kept(model, ids(40))
    assert np.abs(last_logits(model) - trained).max() <= TOLERANCE


def test_groups_that_overlap_are_close_to_what_training_computed(kv_bundles: KVBundles) -> None:
    """A producer in the middle of a group does not see the first position in the first pass, as it did in training."""
    kv_map, text, calm = MAPS["overlapping groups"], ids(40), {"calm_above": 0}
    model = load(kv_bundles.bundle(kv_map, **calm), prefill_passes=9)
    kept(model, text)
    assert np.abs(last_logits(model) - as_trained(kv_bundles.twin(kv_map, **calm), text, 9)).max() <= TOLERANCE


@maps
def test_a_prompt_runs_the_requested_number_of_passes_and_a_token_one(
    kv_bundles: KVBundles, runs: Callable[[Model], list[int]], name: str
) -> None:
    groups = len(iterated_groups(MAPS[name]))
    expected = {4: 4 * groups, 20: 20 * groups, "sequential": LENGTH - 1}
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
    often = [len(groups_within(MAPS[name], s.start, s.end)) for s in segments]
    # Above a KV-complete exit only the prompt's last position runs.
    owns = [bool(producers(MAPS[name], s.start, s.end)) for s in segments]
    assert any(often)
    assert runs(model) == [1 + (5 * o or 1) if own else 1 for o, own in zip(often, owns, strict=True)]
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


@pytest.mark.parametrize("passes", [1, 0, -1, "often", 1.5, True])
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
