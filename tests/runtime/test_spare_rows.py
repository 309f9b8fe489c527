"""A spare row behind each row that would run alone leaves no trace, whatever decodes, and makes rows comparable."""

from __future__ import annotations

import numpy as np
import pytest

from helpers import tolerances
from helpers.kv_bundles import KVBundles
from helpers.quantized import QuantizedBundles, preset
from helpers.tiny_models import BASE, TinyBundles
from shortstack import DraftPolicy, ExitEarly, ExitPolicy, Model, Plain, Speculate, load, parse_criterion
from shortstack.graphs.precision import BlockFormat, KVType
from shortstack.runtime import one_slot
from shortstack.runtime.commands.row_check import check_rows
from shortstack.runtime.engine.row_classes import fewest_rows
from shortstack.runtime.engine.stack import PREFILL_ROWS
from shortstack.runtime.request import Strategy

STRATEGIES = (
    Plain(),
    Speculate(1, DraftPolicy(3)),
    Speculate(3, DraftPolicy(4, has_bonus=True)),
    ExitEarly(ExitPolicy(parse_criterion("top_prob >= 0.1"))),
    ExitEarly(ExitPolicy(parse_criterion("top_prob >= 0.1"), kv_policy="pipeline")),
    ExitEarly(ExitPolicy(parse_criterion("top_prob >= 0.1"), kv_policy="recompute")),
    ExitEarly(ExitPolicy(parse_criterion("always"), verify="exact")),
    ExitEarly(ExitPolicy(parse_criterion("top_prob >= 0.1"), prefill_exit=True)),
)


@pytest.fixture
def spare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bundle that is loaded in the test runs no row alone, on every machine."""
    monkeypatch.setattr(one_slot, "fewest_rows", lambda graphs: 2)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, BASE.vocab, length).tolist()


def decode(model: Model, ids: list[int], strategy: Strategy, **options: bool) -> tuple[int, ...]:
    return model.generate(ids, max_new_tokens=40, strategy=strategy, ignore_eos=True, **options).tokens


@pytest.mark.parametrize("length", [1, 2, 17, PREFILL_ROWS, PREFILL_ROWS + 1])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_a_spare_row_changes_no_token(
    tiny_bundles: TinyBundles, monkeypatch: pytest.MonkeyPatch, strategy: Strategy, length: int
) -> None:
    bundle = tiny_bundles.bundle(BASE, 1, 3)
    expected = decode(load(bundle), prompt(length), strategy)
    monkeypatch.setattr(one_slot, "fewest_rows", lambda graphs: 2)
    model = load(bundle)
    assert decode(model, prompt(length), strategy) == expected
    assert decode(model, prompt(length), strategy, reuse_cache=True) == expected


@pytest.mark.usefixtures("spare")
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_the_last_position_of_the_context_is_reached_with_spare_rows(
    tiny_bundles: TinyBundles, strategy: Strategy
) -> None:
    model = load(tiny_bundles.bundle(BASE, 1, 3, max_length=24))
    result = model.generate(prompt(5), max_new_tokens=100, strategy=strategy, ignore_eos=True)
    assert len(result.tokens) == 19
    assert result.finish_reason == "context"


@pytest.mark.parametrize("kv_map", [(0, 0, 2, 2), (0, 1, 1, 1), (0, 3, 3, 3)])
def test_layers_that_share_keys_and_values_take_spare_rows_too(
    kv_bundles: KVBundles, monkeypatch: pytest.MonkeyPatch, kv_map: tuple[int, ...]
) -> None:
    bundle = kv_bundles.bundle(kv_map, 1)
    ids = np.random.default_rng(1).integers(3, 60, 9).tolist()
    expected = [decode(load(bundle), ids, strategy) for strategy in (Plain(), Speculate(1, DraftPolicy(3)))]
    monkeypatch.setattr(one_slot, "fewest_rows", lambda graphs: 2)
    model = load(bundle)
    assert [decode(model, ids, strategy) for strategy in (Plain(), Speculate(1, DraftPolicy(3)))] == expected


@pytest.mark.parametrize("kv_cache", ["float", "int8"])
def test_what_is_measured_at_load_makes_rows_of_4_bit_bundles_exact(
    tiny_bundles: TinyBundles, quantized: QuantizedBundles, kv_cache: KVType
) -> None:
    """On a machine whose single rows differ, without the spare row the check of rows would find it."""
    model = load(quantized(tiny_bundles.bundle(BASE, 1, 3), preset(BlockFormat(4), kv_cache)))
    assert all(check.is_exact for check in check_rows(model, prompt(40)))
    if fewest_rows(model.graphs) == 2:
        model._one._fewest_rows = 1
        model._one._stacks.clear()
        assert not all(check.is_exact for check in check_rows(model, prompt(40)))


def test_bundles_without_4_bit_weights_run_rows_alone(tiny_bundles: TinyBundles) -> None:
    model = load(tiny_bundles.bundle(BASE, 1, 3))
    assert fewest_rows(model.graphs) == 1


@pytest.mark.usefixtures("spare")
def test_a_row_among_others_says_what_the_whole_text_says(tiny_bundles: TinyBundles) -> None:
    model = load(tiny_bundles.bundle(BASE, 1, 3))
    ids = prompt(20)
    expected = model.activations(ids).heads[BASE.layers]
    stack = model.exclusive_stack()
    stack.prefill(ids[:1], 0, with_logits=True)
    np.testing.assert_allclose(stack.final.logits[0], expected[0], atol=tolerances.TINY.max_abs)
    for position, token in enumerate(ids[1:], 1):
        stack.put(0, token)
        stack.verify(1, position, with_logits=True)
        np.testing.assert_allclose(stack.final.logits[0], expected[position], atol=tolerances.TINY.max_abs)
