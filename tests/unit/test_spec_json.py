"""The object `model` of bundle.json: it gives the same model back, and hostile values give one line with the field."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from shortstack.graphs.errors import BundleError
from shortstack.graphs.layer_spec import Attention, Ends, Layer, Mlp, Norm, QueryScale, Rope, RopeScaling
from shortstack.graphs.spec import ModelSpec
from shortstack.graphs.spec_json import llama_spec, spec_from_json, spec_to_json

NORM = Norm("layer", 1e-5, has_bias=True)
LONG = RopeScaling(
    "longrope", 4.0, original_max_position_embeddings=16, short_factors=(1.0,) * 4, long_factors=(2.0,) * 4
)
YARN = RopeScaling("yarn", 4.0, original_max_position_embeddings=16, attention_factor=1.1, truncate=False)
LAYER = Layer(
    Attention(4, 2, 16, scale=0.2, window=8, softcap=50.0, qkv_bias=True, qk_norm=Norm(), qk_norm_over="width"),
    Mlp(48, "gelu_tanh", is_gated=False, has_bias=True),
    before_attention=NORM,
    after_mlp=NORM,
    is_parallel=True,
    residual_scale=0.5,
)
FULL = replace(LAYER, attention=replace(LAYER.attention, window=0, rope=1, query_scale=QueryScale(0.1, 8)))
SPEC = ModelSpec(
    model_type="exotic",
    hidden_size=32,
    vocab_size=100,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    layers=(LAYER, FULL, LAYER, FULL),
    ends=Ends(NORM, 5.0, logit_scale=0.5, logit_softcap=30.0),
    ropes=(Rope(10000.0, 16, 8, LONG), Rope(500.0, 16, 16, YARN)),
    kv_map=(0, 1, 0, 3),
)
FLAT: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 100,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "rope_scaling": {"kind": "linear", "factor": 2.0},
    "qkv_bias": False,
    "attention_out_bias": False,
    "mlp_bias": False,
    "kv_map": [0, 1],
}
FILE = "bundle.json: model"
HOSTILE = (
    None, True, 0, -1, 1.5, 10**9, 2**31, 10**400, 1e308, -1e308, float("nan"), float("inf"), "", "4", "\n\x1b[2J",
    [], [0], [[]], {}, {"a": 1}, [10**9], [-1], [float("nan")],
)  # fmt: skip


RENAMED = ("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta", "windows")


def as_file(spec: ModelSpec = SPEC) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(spec_to_json(spec)))
    return data


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value."""
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from places(value, (*path, key))


def put(data: dict[str, Any], path: tuple[Any, ...], value: object) -> dict[str, Any]:
    changed = copy.deepcopy(data)
    inner: Any = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


def named(path: tuple[Any, ...]) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)


def test_a_model_is_read_back_as_it_was_written() -> None:
    assert spec_from_json(as_file(), FILE) == SPEC
    llama = llama_spec(**{**FLAT, "rope_scaling": RopeScaling("linear", 2.0), "kv_map": (0, 1)})
    assert spec_from_json(as_file(llama), FILE) == llama
    assert spec_from_json(FLAT, FILE, is_flat=True) == llama


@pytest.mark.parametrize("is_flat", [False, True])
def test_a_hostile_value_is_refused_in_one_line_or_gives_a_model_of_the_right_types(is_flat: bool) -> None:
    data = FLAT if is_flat else as_file()
    for path in places(data):
        for value in HOSTILE:
            try:
                spec = spec_from_json(put(data, path, value), FILE, is_flat=is_flat)
            except BundleError as error:
                text = str(error)
                assert text.isprintable(), (path, value, text)
                assert text.startswith(FILE), (path, value, text)
                assert path[0] in RENAMED or any(key in text for key in path if isinstance(key, str)), (path, text)
                assert text.endswith("."), (path, value, text)
            else:
                assert spec_from_json(as_file(spec), FILE) == spec, (path, value)
                assert all(0 < layer.attention.head_dim < 2**31 for layer in spec.layers)


BAD: dict[str, tuple[tuple[Any, ...], object, str]] = {
    "a width that is no number": (("hidden_size",), float("nan"), "hidden_size: found nan, expected an integer"),
    "a huge width": (("hidden_size",), 10**30, "hidden_size: found 1000.*, expected 0..2147483647"),
    "a negative width": (
        ("layer_kinds", 0, "mlp", "width"),
        -1,
        r"layer_kinds\[0\]\.mlp\.width: found -1, expected 0..",
    ),
    "no width": (("layer_kinds", 0, "mlp", "width"), 0, r"layer_kinds\[0\]\.mlp: width is 0, not 1 or more"),
    "a width as a bool": (("layer_kinds", 0, "mlp", "width"), True, r"mlp\.width: found True, expected an integer"),
    "heads not divided": (
        ("layer_kinds", 0, "attention", "kv_heads"),
        3,
        r"attention: kv_heads 3 does not divide heads 4",
    ),
    "odd dims": (("ropes", 1, "dims"), 7, r"ropes\[1\]: dims 7 is not even"),
    "dims beyond the head": (("ropes", 1, "dims"), 18, r"ropes\[1\]: dims 18 is not even, or more than head_dim 16"),
    "too few divisors": (("ropes", 0, "dims"), 6, r"ropes\[0\]: scaling\.short_factors has 4 entries"),
    "a divisor of 0": (("ropes", 0, "scaling", "long_factors", 1), 0, r"scaling: short_factors or long_factors has 0"),
    "a rope that does not exist": (
        ("layer_kinds", 0, "attention", "rope"),
        2,
        "model: layer 0 has rope 2, and ropes has 2 entries",
    ),
    "a rope of other heads": (("ropes", 0, "head_dim"), 8, "layer 0 has head_dim 16, and entry 0 of ropes has 8"),
    "a kind that does not exist": (("layers", 2), 2, r"layers: found 2, expected 0..1, one of layer_kinds"),
    "no layers": (("layers",), [], r"layers: found 0 entries, expected 1..10000"),
    "too many layers": (("layers",), [0] * 10_001, r"layers: found 10001 entries, expected 1..10000"),
    "a count of layers": (("layers",), 10**9, "layers: found 1000000000, expected a list"),
    "a short map": (("kv_map",), [0, 1], r"kv_map: found 2 entries, expected one for each of layers, 4"),
    "a layer that does not exist": (("kv_map", 2), 9, r"model\.kv_map: kv_map\[2\] = 9 is not a layer in 0..3"),
    "a consumer of a consumer": (("kv_map", 3), 2, r"kv_map\[3\] = 2, but layer 2 owns no K,V itself"),
    "a map of other heads": (("kv_map", 2), 1, r"kv_map\[2\] = 1, but the heads or ropes of these two layers differ"),
    "eps of 0": (("ends", "final_norm", "eps"), 0, r"ends\.final_norm: eps is 0.0, not a number above 0"),
    "a negative softcap": (("ends", "logit_softcap"), -1, r"ends: logit_softcap is -1.0, not 0 or more"),
    "a scale of no number": (("ends", "logit_scale"), float("nan"), r"ends\.logit_scale: found nan, expected a finite"),
    "a scale beyond floats": (("ends", "embed_scale"), 10**400, r"ends\.embed_scale: found 1000.*, expected a finite"),
    "scores times 0": (("layer_kinds", 0, "attention", "scale"), 0, r"attention: scale is 0.0, not a number above 0"),
    "a base below 1": (("ropes", 0, "theta"), 0.5, r"ropes\[0\]: theta is 0.5, not 1 or more"),
    "an unknown norm": (
        ("ends", "final_norm", "kind"),
        "batch",
        r"final_norm\.kind: found 'batch', expected rms or layer",
    ),
    "an unknown activation": (
        ("layer_kinds", 0, "mlp", "activation"),
        [],
        r"mlp\.activation: found \[\], expected silu or",
    ),
    "an unknown field": (("layer_kinds", 0, "mlp", "experts"), 8, r"layer_kinds\[0\]\.mlp does .*unknown: experts"),
    "a flag as a number": (("tie_word_embeddings",), 1, "tie_word_embeddings: found 1, expected true or false"),
    "a name as a number": (("model_type",), 3, "model_type: found 3, expected a string"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_value_that_export_never_writes_is_refused_by_field(case: str) -> None:
    path, value, says = BAD[case]
    with pytest.raises(BundleError, match=rf"^bundle\.json: .*{says}"):
        spec_from_json(put(as_file(), path, value), FILE)


@pytest.mark.parametrize("value", [None, [], "model", 3])
def test_a_model_that_is_no_object_is_refused(value: Any) -> None:
    for is_flat in (False, True):
        with pytest.raises(BundleError, match=r"bundle\.json: model: found .*, expected an object"):
            spec_from_json(value, FILE, is_flat=is_flat)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("num_hidden_layers", 10**9, r"num_hidden_layers is 1000000000, not 1\.\.10000"),
        ("num_hidden_layers", 3, "kv_map has 2 entries, not num_hidden_layers = 3"),
        ("num_key_value_heads", 3, "kv_heads 3 does not divide heads 4"),
        ("head_dim", 7, "dims 7 is not even"),
        ("windows", [4], "windows has 1 entries for 2 layers"),
        ("windows", [4, -4], r"windows\[1\]: found -4, expected 0\.\."),
        ("rope_scaling", {"kind": "linear", "factor": 0}, "rope_scaling: factor is 0.0, not a number above 0"),
        ("rope_scaling", {"flavour": "sweet"}, "unknown: flavour"),
    ],
)
def test_a_model_of_formats_1_to_3_is_refused_by_field(field: str, value: object, says: str) -> None:
    with pytest.raises(BundleError, match=rf"^bundle\.json: model.*{says}"):
        spec_from_json({**FLAT, field: value}, FILE, is_flat=True)
