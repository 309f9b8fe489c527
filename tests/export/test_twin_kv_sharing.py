"""The twin with shared keys and values: a whole sequence at once gives what decoding one token after another gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from helpers.kv_twins import VOCAB, kv_spec, random_ids, random_twin
from shortstack.export.twin.exits import ExitNode
from shortstack.export.twin.layer import Layer
from shortstack.export.twin.model import Passes, Twin
from shortstack.export.twin.sequential import sequential
from shortstack.graphs.errors import RequestError
from shortstack.graphs.kv_map import Partition, Position, identity_kv_map, placement, producers
from shortstack.graphs.plan import ExitSpec

SAME = 2e-5  # 1.0e-5 was measured without AVX-512
"""Two orders of summation in float32 in up to nine layers; logits of standard deviation 1. Measured: at most 3e-6."""
LENGTH = 11

LCKV = placement("sandwich", "top", 5, 3)
LASAGNA = placement("lasagna", "middle", 9, 3)
MAPS = {
    "none": identity_kv_map(4),
    "pizza-bottom": placement("pizza", "bottom", 5, 3),
    "sandwich-top": LCKV,
    "lasagna-middle": LASAGNA,
    "two-groups-in-one": (3, 4, 4, 3, 4, 5),
    "own-layer-in-a-group": (2, 1, 2, 3),
}


@pytest.fixture(autouse=True)
def one_thread(one_torch_thread: object) -> None:
    torch.set_num_threads(1)


def exact(twin: Twin, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return sequential(twin, ids).logits


def at_once(twin: Twin, ids: Tensor, passes: int | None = None) -> Tensor:
    depth = twin.spec.num_hidden_layers
    with torch.no_grad():
        return twin.logits(twin.boundaries(ids, (depth,), passes=passes)[depth].hidden)


@pytest.mark.parametrize("layers", [5, 9])
@pytest.mark.parametrize("position", get_args(Position))
@pytest.mark.parametrize("partition", get_args(Partition))
def test_every_placement_computes_what_decoding_one_by_one_computes(
    partition: Partition, position: Position, layers: int
) -> None:
    ids = random_ids(length=LENGTH)
    for count in range(1, layers + 1):
        twin = random_twin(kv_spec(placement(partition, position, layers, count)))
        assert (at_once(twin, ids) - exact(twin, ids)).abs().max() <= SAME, count


SWITCHES: dict[str, dict[str, Any]] = {
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "six-query-heads-per-kv-head": {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 6},
    "odd-sizes-tied": {
        "hidden_size": 30,
        "intermediate_size": 47,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "tie_word_embeddings": True,
    },
    "biased": {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "masks-diagonal": {"masks_diagonal": True},
    "masks-diagonal-biased": {"masks_diagonal": True, "qkv_bias": True, "attention_out_bias": True},
}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("switch", SWITCHES)
def test_every_shape_of_model_computes_what_decoding_one_by_one_computes(name: str, switch: str) -> None:
    twin, ids = random_twin(kv_spec(MAPS[name], **SWITCHES[switch])), random_ids(length=LENGTH)
    assert (at_once(twin, ids) - exact(twin, ids)).abs().max() <= SAME


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("masks_diagonal", [False, True])
@pytest.mark.parametrize("window", [1, 2, 5, LENGTH, 40])
def test_windows_on_all_or_some_layers_give_what_decoding_one_by_one_gives(
    name: str, masks_diagonal: bool, window: int
) -> None:
    kv_map, ids = MAPS[name], random_ids(length=LENGTH)
    everywhere = (window,) * len(kv_map)
    below = tuple(window if layer % 2 == 0 else 0 for layer in range(len(kv_map)))
    for windows in (everywhere, below):
        twin = random_twin(kv_spec(kv_map, windows=windows, masks_diagonal=masks_diagonal))
        assert (at_once(twin, ids) - exact(twin, ids)).abs().max() <= SAME


def test_a_window_counts_its_own_position_as_transformers_does() -> None:
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        rms_norm_eps=1e-5,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    model = MistralForCausalLM(config).eval()
    twin = Twin(kv_spec(identity_kv_map(3), windows=(4, 4, 4))).eval()
    twin.load_state_dict(model.state_dict())
    ids = random_ids(length=LENGTH)
    with torch.no_grad():
        assert (model(ids).logits - twin(ids)).abs().max() <= SAME
    assert (exact(twin, ids) - at_once(twin, ids)).abs().max() <= SAME


@pytest.mark.parametrize("name", ["sandwich-top", "lasagna-middle", "two-groups-in-one", "own-layer-in-a-group"])
@pytest.mark.parametrize("masks_diagonal", [False, True])
def test_n_passes_make_the_first_n_positions_final(name: str, masks_diagonal: bool) -> None:
    twin, ids = random_twin(kv_spec(MAPS[name], masks_diagonal=masks_diagonal)), random_ids(length=LENGTH)
    final = at_once(twin, ids)
    for passes in range(1, LENGTH + 3):
        found = at_once(twin, ids, passes)
        assert torch.equal(found[:, :passes], final[:, :passes]), passes
        if passes < 4:  # else this shows nothing; later passes may have converged up to rounding
            assert not torch.equal(found[:, passes:], final[:, passes:]), passes


def test_one_pass_is_enough_for_layers_that_look_down() -> None:
    twin, ids = random_twin(kv_spec(MAPS["pizza-bottom"])), random_ids()
    assert torch.equal(at_once(twin, ids, passes=1), at_once(twin, ids))


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("masks_diagonal", [False, True])
def test_attention_of_the_first_position_is_zero_if_it_cannot_see_itself(name: str, masks_diagonal: bool) -> None:
    twin = random_twin(kv_spec(MAPS[name], masks_diagonal=masks_diagonal))
    mixed: dict[int, Tensor] = {}
    for index, layer in enumerate(twin.model.layers):
        assert isinstance(layer, Layer)
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, index=index: mixed.__setitem__(index, args[0]))
    at_once(twin, random_ids())
    for index, value in mixed.items():
        assert bool((value[:, 0] == 0).all()) is not twin.spec.sees_itself(index)
        assert (value[:, 1:] != 0).all()


@pytest.mark.parametrize("name", MAPS)
def test_it_does_not_matter_how_a_sequence_is_fed(name: str) -> None:
    twin, ids = random_twin(kv_spec(MAPS[name], windows=(3,) + (0,) * (len(MAPS[name]) - 1))), random_ids()
    with torch.no_grad():
        whole, caches = sequential(twin, ids), None
        parts: list[Tensor] = []
        for chunk in ids.split([1, 4, 2, 4], dim=1):
            part = sequential(twin, chunk, caches)
            caches, parts = part.caches, [*parts, part.hidden]
    assert torch.equal(torch.cat(parts, dim=1), whole.hidden)
    assert caches is not None
    assert caches.keys() == whole.caches.keys() == set(producers(MAPS[name], 0, len(MAPS[name])))
    for producer, (keys, values) in caches.items():
        assert keys.shape == (2, 2, 11, 8)
        assert torch.equal(keys, whole.caches[producer][0])
        assert torch.equal(values, whole.caches[producer][1])


@pytest.mark.parametrize("name", MAPS)
def test_padding_at_the_end_changes_nothing(name: str) -> None:
    twin, ids = random_twin(kv_spec(MAPS[name])), random_ids()
    padded = torch.nn.functional.pad(ids, (0, 5))
    assert (at_once(twin, padded)[:, :11] - at_once(twin, ids)).abs().max() <= SAME


def test_training_runs_some_passes_without_gradient_and_some_with_gradient() -> None:
    twin, ids = random_twin(kv_spec(LCKV)).train(), random_ids(length=30)
    with_gradient: list[bool] = []
    twin.model.layers[2].register_forward_pre_hook(lambda *_: with_gradient.append(torch.is_grad_enabled()))
    for passes in (Passes(), Passes(3, 4), Passes(0, 1)):
        twin.passes = passes
        with_gradient.clear()
        found = twin(ids)
        assert with_gradient == [False] * passes.without_gradient + [True] * passes.with_gradient
        expected = at_once(twin, ids, passes.without_gradient + passes.with_gradient)
        assert torch.equal(found, expected)


def test_training_on_a_short_sequence_is_exact_and_runs_no_unneeded_pass() -> None:
    twin, ids = random_twin(kv_spec(LCKV)).train(), random_ids(length=4)
    count: list[int] = []
    twin.model.layers[2].register_forward_pre_hook(lambda *_: count.append(1))
    found = twin(ids)
    assert len(count) == 4
    assert (found - exact(twin, ids)).abs().max() <= SAME


@pytest.mark.parametrize(("with_gradient", "reached"), [(1, False), (2, True)])
def test_gradients_reach_the_keys_and_values_through_the_last_passes_only(with_gradient: int, reached: bool) -> None:
    twin, ids = random_twin(kv_spec(placement("pizza", "top", 5, 1))).train(), random_ids(length=30)
    twin.passes = Passes(7, with_gradient)
    # The top layer does not use its own keys and values, so that gradients reach them only from the layers below.
    twin.model.layers[4].self_attn.o_proj.requires_grad_(False).weight.zero_()
    twin(ids).square().mean().backward()
    target, bottom = twin.model.layers[4], twin.model.layers[0]
    assert isinstance(target, Layer)
    assert isinstance(bottom, Layer)
    gradient = target.self_attn.k_proj.weight.grad
    assert (gradient is not None and bool(gradient.abs().max() > 0)) is reached
    assert bottom.self_attn.q_proj.weight.grad is not None
    assert bottom.self_attn.q_proj.weight.grad.abs().max() > 0


def test_gradients_come_from_the_last_passes_with_fixed_keys_and_values() -> None:
    """If all other passes have converged, the gradients of b passes are a truncated sum, to which more passes add."""
    twin, ids = random_twin(kv_spec(LCKV)).train(), random_ids(length=6)
    gradients = []
    for b in (2, 3, 6):
        twin.passes = Passes(6 - b, b)
        twin.zero_grad()
        twin(ids).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None]))
    assert all(gradient.isfinite().all() for gradient in gradients)
    twin.zero_grad()
    sequential(twin, ids).logits.square().mean().backward()
    true = torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None])
    errors = [float((gradient - true).norm() / true.norm()) for gradient in gradients]
    assert errors[2] < SAME < errors[0]


def test_at_least_one_pass_has_a_gradient() -> None:
    with pytest.raises(ValueError, match="at least"):
        Passes(7, 0)


def test_layers_that_share_are_never_dropped() -> None:
    twin, ids = random_twin(kv_spec(placement("pizza", "top", 5, 1))), random_ids(length=6)
    expected = at_once(twin, ids)
    twin.layer_dropout = (1.0,) * 5
    assert torch.equal(twin.train()(ids), expected)


def test_autocast_runs_iterated_groups_in_half_precision() -> None:
    twin, ids = random_twin(kv_spec(LCKV)), random_ids()
    with torch.autocast("cpu", torch.bfloat16):
        found = at_once(twin, ids)
    assert found.isfinite().all()
    assert (found - at_once(twin, ids)).abs().mean() < 0.5


@pytest.mark.parametrize("depth", [2, 3])
def test_a_depth_inside_an_iterated_group_is_refused(depth: int) -> None:
    twin = random_twin(kv_spec(LCKV))
    with pytest.raises(RequestError, match=rf"after {depth} layers cuts layers 1\.\.3 apart"):
        twin.boundaries(random_ids(), (depth,))


@pytest.mark.parametrize("masks_diagonal", [False, True])
def test_an_exit_next_to_an_iterated_group_sees_the_state_of_the_stack(masks_diagonal: bool) -> None:
    twin, ids = random_twin(kv_spec(LCKV, masks_diagonal=masks_diagonal)), random_ids()
    with torch.no_grad():
        found = twin.boundaries(ids, (1, 4, 5))
        upto = Twin(replace(twin.spec, layers=twin.spec.layers[:4], kv_map=LCKV[:4]))
        upto.load_state_dict(twin.state_dict(), strict=False)
        assert (found[4].hidden - sequential(upto, ids).hidden).abs().max() <= SAME
        assert (found[5].hidden - sequential(twin, ids).hidden).abs().max() <= SAME
        for depth in (1, 4):
            for branch in ("none", "mlp", "block"):
                node = ExitNode(twin.spec, ExitSpec(exit_layer=depth, branch=branch, head="own"))
                assert node(found[depth], None, None, twin).logits.shape == (*ids.shape, VOCAB)


def test_a_block_exit_has_its_own_ordinary_attention() -> None:
    spec = kv_spec(LCKV, windows=(2,) * 5, masks_diagonal=True)
    node = ExitNode(spec, ExitSpec(exit_layer=4, branch="block", head="own"))
    assert (node.block.self_attn.spec.window, node.block.self_attn.sees_itself) == (0, True)
    assert node.block.self_attn.k_proj.weight.shape == (16, 32)
