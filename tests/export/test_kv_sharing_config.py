"""Configs of models whose layers share keys and values, valid and not: our own, Gemma's and LCKV's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.bad_input import edit_json
from helpers.kv_twins import kv_spec, random_ids, random_twin
from helpers.lckv import TINYLLAMA_LCKV_W10
from helpers.tiny_models import write_tokenizer
from shortstack.export.arch import ARCHITECTURES
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.checkpoint.config import Config
from shortstack.export.twin.folder import load_twin, save_twin
from shortstack.export.twin.model import Passes, Twin
from shortstack.graphs.errors import CheckpointError, UnsupportedError
from shortstack.graphs.kv_map import Partition, Position, identity_kv_map, parse_kv_map, placement
from shortstack.graphs.spec import ModelSpec

STACK: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "vocab_size": 100,
}


@pytest.fixture(autouse=True)
def quick(one_torch_thread: object) -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


def spec_of(model_type: str = "llama", **fields: Any) -> ModelSpec:
    return ARCHITECTURES[model_type].read_spec(Config({**STACK, **fields}, "config.json"))


def written(twin: Twin, folder: Path, **fields: Any) -> Path:
    """Write a twin as a checkpoint folder with changed fields in its config; null counts as absent."""
    save_twin(twin, folder, {})
    write_tokenizer(folder, twin.spec.vocab_size)
    edit_json(folder / "config.json", **fields)
    return folder


MAPS = {
    **{
        f"{partition}-{position}": placement(partition, position, 5, 3)
        for partition in get_args(Partition)
        for position in get_args(Position)
    },
    "none": identity_kv_map(5),
    "two-groups-in-one": (3, 4, 4, 3, 4),
}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(
    "seen", [{}, {"windows": (2, 0, 0, 3, 0)}, {"masks_diagonal": True}, {"windows": (4,) * 5, "masks_diagonal": True}]
)
def test_the_twins_own_checkpoint_is_read_back(tmp_path: Path, name: str, seen: dict[str, Any]) -> None:
    twin = random_twin(kv_spec(MAPS[name], **seen))
    folder = written(twin, tmp_path / "written")
    again = load_twin(str(folder)).eval()
    assert again.spec == twin.spec
    ids = random_ids()
    assert torch.equal(again(ids), twin(ids))
    config = json.loads((folder / "config.json").read_text())
    assert ("kv_map" in config) is (MAPS[name] != identity_kv_map(5))
    assert {field for field in ("windows", "masks_diagonal") if field in config} == seen.keys()


def test_the_number_of_passes_is_kept(tmp_path: Path) -> None:
    twin = random_twin(kv_spec(placement("sandwich", "top", 5, 3)))
    twin.passes = Passes(3, 4)
    assert load_twin(str(written(twin, tmp_path / "iterated"))).passes == Passes(3, 4)
    below = random_twin(kv_spec(placement("pizza", "bottom", 5, 3)))
    assert "forward_passes" not in (written(below, tmp_path / "once") / "config.json").read_text()


def test_a_released_lckv_config() -> None:
    spec = ARCHITECTURES["lckv-llama"].read_spec(Config(TINYLLAMA_LCKV_W10, "config.json"))
    assert spec.kv_map == parse_kv_map("lckv:10", 22)
    assert (spec.masks_diagonal, spec.windows, spec.model_type) == (True, (), "llama")
    attention = spec.layers[0].attention
    assert (attention.kv_heads, attention.head_dim, spec.max_position_embeddings) == (
        4,
        64,
        2048,
    )


def test_lckv_layers_may_slide_and_own_their_kv_by_default() -> None:
    slides = spec_of("lckv-llama", layer_types="0s_1s_3_3", sliding_window=7)
    assert (slides.kv_map, slides.windows, slides.masks_diagonal) == ((0, 1, 3, 3), (7, 7, 0, 0), False)
    assert spec_of("lckv-llama", layer_types="0s_0s_0s_0s").windows == (4096,) * 4
    plain = spec_of("lckv-llama")
    assert (plain.kv_map, plain.windows) == ((0, 1, 2, 3), ())


@pytest.mark.parametrize(
    ("fields", "kv_map"),
    [
        ({"layer_types": "0_1_2_0", "target_layer": -2}, (0, 2, 2, 3)),
        ({"layer_types": "0_2_1_0", "target_layer": 1}, (0, 1, 1, 3)),
        ({"num_warmup_layers": 1}, (0, 3, 3, 3)),
        ({}, (0, 1, 2, 3)),
    ],
)
def test_the_first_lckv_code_counts_layers_by_kind(fields: dict[str, Any], kv_map: tuple[int, ...]) -> None:
    spec = spec_of("opt-llama", **fields)
    assert (spec.kv_map, spec.masks_diagonal) == (kv_map, True)


def test_the_first_cla_code_counts_layers_by_kind() -> None:
    spec = spec_of("cla-llama", layer_types="2_1_1_0")
    assert (spec.kv_map, spec.masks_diagonal) == ((0, 0, 0, 3), False)
    assert spec_of("cla-llama", layer_types="2_1_2_1").kv_map == parse_kv_map("cla:2", 4)
    assert spec_of("cla-llama").kv_map == (0, 1, 2, 3)


@pytest.mark.parametrize("model_type", ["lckv-llama", "opt-llama"])
def test_an_lckv_checkpoint_is_read_like_ours(tmp_path: Path, model_type: str) -> None:
    twin = random_twin(kv_spec(placement("sandwich", "top", 5, 3), masks_diagonal=True))
    lckv = {
        "lckv-llama": {"layer_types": "0_3_3_3_4", "force_nodiag": True, "sliding_window": 4096},
        "opt-llama": {"layer_types": "0_1_1_2_0", "target_layer": -2, "num_encoders": 8, "train_kv": False},
    }[model_type]
    folder = written(twin, tmp_path / "lckv", model_type=model_type, kv_map=None, masks_diagonal=None, **lckv)
    assert "model.layers.2.self_attn.k_proj.weight" not in open_checkpoint(str(folder)).names()
    again = load_twin(str(folder)).eval()
    assert again.spec == twin.spec
    ids = random_ids()
    assert torch.equal(again(ids), twin(ids))


@pytest.mark.parametrize(
    ("layers", "shared", "full_every", "above"),
    [
        (35, 15, 5, (18, 18, 18, 18, 19) * 3),  # Gemma 3n E2B and E4B
        (35, 20, 5, (13, 13, 13, 13, 14) * 4),  # Gemma 4 E2B
        (42, 18, 6, (22, 22, 22, 22, 22, 23) * 3),  # Gemma 4 E4B
    ],
)
def test_gemma_layers_share_with_the_nearest_producer_of_the_same_type(
    layers: int, shared: int, full_every: int, above: tuple[int, ...]
) -> None:
    kinds = ["sliding_attention"] * (full_every - 1) + ["full_attention"]
    types = kinds * (layers // full_every)
    spec = spec_of(num_hidden_layers=layers, num_kv_shared_layers=shared, layer_types=types, sliding_window=512)
    assert spec.kv_map == identity_kv_map(layers - shared) + above
    assert spec.windows == tuple(512 if kind == "sliding_attention" else 0 for kind in types)


def test_each_gemma_field_is_optional() -> None:
    assert spec_of(num_kv_shared_layers=2).kv_map == (0, 1, 1, 1)
    assert spec_of(num_kv_shared_layers=0, sliding_window=None).kv_map == (0, 1, 2, 3)
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    assert spec_of(layer_types=types, sliding_window=3).windows == (3, 0, 3, 0)
    both = spec_of(layer_types=types, sliding_window=3, kv_map=[0, 1, 1, 1])
    assert (both.kv_map, both.windows) == ((0, 1, 1, 1), (3, 0, 3, 0))
    assert spec_of(sliding_window=4096).windows == ()  # LlamaForCausalLM has no windows, whatever its config says


HEADS_OF_FULL_LAYERS = {"global_head_dim": ("head_dim", 16), "num_global_key_value_heads": ("num_key_value_heads", 2)}


@pytest.mark.parametrize("field", HEADS_OF_FULL_LAYERS)
def test_full_layers_with_different_heads_are_refused(field: str) -> None:
    of_all, value = HEADS_OF_FULL_LAYERS[field]
    gemma = {"num_kv_shared_layers": 2, "num_key_value_heads": 2}
    for same in (value, None):
        assert spec_of(**gemma, **{field: same}) == spec_of(**gemma)
    with pytest.raises(UnsupportedError) as caught:
        spec_of(**gemma, **{field: 2 * value})
    found = f"config.json: {field} gives full_attention layers different", f"found {2 * value}"
    for words in (*found, f"expected {of_all} = {value}, or null", "Set it to null if"):
        assert words in str(caught.value), str(caught.value)
    with pytest.raises(CheckpointError, match=f"{field}: found 'all', expected an integer"):
        spec_of(**gemma, **{field: "all"})


KV = "config.json: kv_map"
TYPES = "config.json: layer_types"
SHARED = "config.json: num_kv_shared_layers"
BAD: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a consumer of a consumer": ({"kv_map": [0, 0, 1, 1]}, (KV, "kv_map[2] = 1, but layer 1 owns no K,V itself")),
    "a layer that does not exist": ({"kv_map": [0, 1, 2, 4]}, (KV, "kv_map[3] = 4 is not a layer in 0..3")),
    "a map too short": ({"kv_map": [0, 1, 2]}, (KV, "found 3 entries", "num_hidden_layers = 4")),
    "a map that is not a list": ({"kv_map": "0,1,2,2"}, (KV, "found '0,1,2,2'", "a list of integers")),
    "a map with a bool": ({"kv_map": [0, True, 2, 3]}, (KV, "a list of integers")),
    "two maps": ({"kv_map": [0, 1, 2, 2], "num_kv_shared_layers": 1}, (KV, "num_kv_shared_layers say the same")),
    "windows too long": ({"windows": [1] * 5}, ("config.json: windows", "found 5 entries", "num_hidden_layers = 4")),
    "a negative window": ({"windows": [1, 1, 1, -1]}, ("config.json: windows", "0 for all")),
    "a window that is not an integer": ({"windows": [1, 1, 1, 1.5]}, ("config.json: windows", "a list of integers")),
    "windows given twice": ({"windows": [1] * 4, "layer_types": ["full_attention"] * 4}, ("windows and layer_types",)),
    "masks_diagonal not a bool": ({"masks_diagonal": 1}, ("config.json: masks_diagonal", "true or false")),
    "an unknown type": (
        {"layer_types": ["full_attention", "chunked_attention"] * 2},
        ("config.json: layer_types[1]", "found 'chunked_attention'", "full_attention, sliding_attention"),
    ),
    "too few types": ({"layer_types": ["full_attention"]}, (TYPES, "found 1 entries", "num_hidden_layers = 4")),
    "types as a string": ({"layer_types": "0_1_2_3"}, (TYPES, "found '0_1_2_3'", "a list of strings")),
    "sliding without a window": ({"layer_types": ["sliding_attention"] * 4}, ("sliding_window is missing",)),
    "a window of none": (
        {"layer_types": ["sliding_attention"] * 4, "sliding_window": 0},
        ("config.json: sliding_window", "found 0", "a positive number of positions"),
    ),
    "all layers share": ({"num_kv_shared_layers": 4}, (SHARED, "found 4", "0..3")),
    "a negative number shares": ({"num_kv_shared_layers": -1}, (SHARED, "found -1", "0..3")),
    "no layer of the type below": (
        {
            "num_kv_shared_layers": 1,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
            "sliding_window": 4,
        },
        (SHARED, "layer 3 is of type full_attention", "no layer of this type is below layer 3"),
    ),
}
BAD_LCKV: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a list": ({"layer_types": ["full_attention"] * 4}, (TYPES, "a string")),
    "too few": ({"layer_types": "0_1_2"}, (TYPES, "found 3 entries", "num_hidden_layers = 4")),
    "a mark that does not exist": ({"layer_types": "0_1_2_3x"}, (TYPES, "'0_1_2_3x'", "such as 0_1s_1_3")),
    "a consumer of a consumer": ({"layer_types": "0_0_1_3"}, (TYPES, "layer 1 owns no K,V itself")),
    "a window of none": ({"layer_types": "0s_1_2_3", "sliding_window": 0}, ("sliding_window", "found 0")),
    "force_nodiag not a bool": ({"force_nodiag": "yes"}, ("config.json: force_nodiag", "found 'yes'", "true or false")),
}
BAD_OPT: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a kind that does not exist": ({"layer_types": "0_3_2_0"}, (TYPES, "0, 1 or 2")),
    "too few": ({"layer_types": "0_1_2"}, (TYPES, "found 3 entries")),
    "another target": ({"layer_types": "0_1_2_0", "target_layer": 3}, (TYPES, "0_1_2_0", "2 for layer 3")),
    "two targets": ({"layer_types": "2_1_2_0", "target_layer": 2}, (TYPES, "2 for layer 2", "alone")),
    "no target": ({"layer_types": "0_1_1_0"}, (TYPES, "2 for layer 3")),
    "a target outside": ({"layer_types": "0_1_2_0", "target_layer": 4}, ("target_layer", "found 4", "-4..3")),
    "all warm-up": ({"num_warmup_layers": 4}, ("num_warmup_layers", "found 4", "0..3")),
}
BAD_CLA: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "nothing below": ({"layer_types": "1_2_1_0"}, (TYPES, "found '1_2_1_0'", "0 or 2 for the first layer")),
    "a kind that does not exist": ({"layer_types": "2_1_4_1"}, (TYPES, "0, 1 or 2")),
    "too many": ({"layer_types": "2_1_2_1_0"}, (TYPES, "found 5 entries", "num_hidden_layers = 4")),
}
BAD_BY_FAMILY = {"llama": BAD, "lckv-llama": BAD_LCKV, "opt-llama": BAD_OPT, "cla-llama": BAD_CLA}


@pytest.mark.parametrize(
    ("model_type", "case"),
    [(model_type, case) for model_type, cases in BAD_BY_FAMILY.items() for case in cases],
)
def test_a_bad_config_is_refused_by_field(model_type: str, case: str) -> None:
    fields, says = BAD_BY_FAMILY[model_type][case]
    with pytest.raises(CheckpointError) as caught:
        spec_of(model_type, **fields)
    for words in says:
        assert words in str(caught.value), str(caught.value)
    assert isinstance(caught.value, UnsupportedError) is (case == "an unknown type")


@pytest.mark.parametrize("field", ["forward_passes", "backward_passes"])
def test_a_bad_number_of_passes_is_refused(tmp_path: Path, field: str) -> None:
    twin = random_twin(kv_spec(placement("sandwich", "top", 5, 3)))
    folder = written(twin, tmp_path / "lckv", **{field: -1})
    with pytest.raises(CheckpointError, match=f"{field}: found -1"):
        load_twin(str(folder))


def edited(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> str:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def test_a_checkpoint_may_hold_unused_kv_projections(tmp_path: Path) -> None:
    own = random_twin(kv_spec(identity_kv_map(5), qkv_bias=True))
    shared = Twin(replace(own.spec, kv_map=placement("sandwich", "top", 5, 3))).eval()
    shared.load_state_dict(own.state_dict(), strict=False)
    folder = written(own, tmp_path / "dead", kv_map=list(shared.spec.kv_map))
    again = load_twin(str(folder)).eval()
    ids = random_ids()
    assert torch.equal(again(ids), shared(ids))
    assert again.state_dict().keys() == shared.state_dict().keys()


def test_a_checkpoint_must_not_hold_other_unused_tensors(tmp_path: Path) -> None:
    twin = random_twin(kv_spec(placement("sandwich", "top", 5, 3)))
    folder = written(twin, tmp_path / "extra")
    source = edited(folder, lambda t: t.update({"model.layers.1.self_attn.k_norm.weight": torch.ones(8)}))
    with pytest.raises(CheckpointError, match=r"1 extra \(model\.layers\.1\.self_attn\.k_norm\.weight\)"):
        load_twin(source)


def test_a_producer_without_its_projection_is_refused(tmp_path: Path) -> None:
    twin = random_twin(kv_spec(placement("sandwich", "top", 5, 3)))
    source = edited(written(twin, tmp_path / "missing"), lambda t: t.pop("model.layers.3.self_attn.k_proj.weight"))
    with pytest.raises(CheckpointError, match=r"1 missing \(model\.layers\.3\.self_attn\.k_proj\.weight\)"):
        load_twin(source)


@pytest.mark.parametrize("layer", [1, 4])
def test_queries_wider_than_the_shared_keys_are_refused_by_both_layers(tmp_path: Path, layer: int) -> None:
    twin = random_twin(kv_spec((0, 3, 3, 3, 0)))  # heads 8 wide
    query = f"model.layers.{layer}.self_attn.q_proj.weight"
    source = edited(written(twin, tmp_path / "wide"), lambda t: t.update({query: torch.ones(64, 32)}))
    with pytest.raises(CheckpointError) as caught:
        load_twin(source)
    reads = f"layer {layer} reads K,V of layer {twin.spec.kv_map[layer]}, whose heads are 8 wide"
    for words in (f"{query} is [64, 32], not [32, 32]", f"{reads}: {query} must have 4 x 8 = 32 rows and has 64"):
        assert words in str(caught.value), str(caught.value)


def test_keys_wider_than_the_queries_of_consumers_are_refused_by_consumer(tmp_path: Path) -> None:
    twin = random_twin(kv_spec((0, 3, 3, 3, 4)))
    key = "model.layers.3.self_attn.k_proj.weight"
    source = edited(written(twin, tmp_path / "wide"), lambda t: t.update({key: torch.ones(32, 32)}))
    with pytest.raises(CheckpointError) as caught:
        load_twin(source)
    for layer in (1, 2):
        assert f"layer {layer} reads K,V of layer 3, whose heads are 16 wide" in str(caught.value)
    assert "2 with queries that do not fit the shared K,V" in str(caught.value)
    assert "must have 4 x 16 = 64 rows and has 32" in str(caught.value)


@pytest.mark.parametrize("shape", [(), (0, 32), (15, 32)])
def test_keys_without_a_size_are_reported_as_misshapen_only(tmp_path: Path, shape: tuple[int, ...]) -> None:
    twin = random_twin(kv_spec((0, 3, 3, 3, 4)))
    key = "model.layers.3.self_attn.k_proj.weight"
    source = edited(written(twin, tmp_path / "odd"), lambda t: t.update({key: torch.ones(shape)}))
    with pytest.raises(CheckpointError, match=r"describes: 1 misshapen \([^;]*k_proj[^;]*\)\. Check"):
        load_twin(source)
