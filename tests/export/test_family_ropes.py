"""Rotary embeddings of all families: old spellings are read as new ones, and tables equal those of transformers."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch

from helpers.family_configs import FAMILIES, fields_of, read, their_config, their_fields
from shortstack.export.arch import ARCHITECTURES
from shortstack.export.rope import inverse_frequencies, rope_tables
from shortstack.graphs.errors import CheckpointError, UnsupportedError
from shortstack.graphs.layer_spec import Rope

COS_SIN_TOLERANCE = 2.5e-7  # two units in the last place of a cosine that is multiplied by attention_factor
PARTIAL = {"phi3": "partial_rotary_factor", "glm4": "partial_rotary_factor", "stablelm": "partial_rotary_factor"}
NESTED = {"gemma3_text", "olmo3"}
CONTEXT, ORIGINAL = 96, 24
FULL, SLIDING = "full_attention", "sliding_attention"

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": ORIGINAL}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "proportional": {"rope_type": "proportional", "factor": 2.0},
    "yarn": YARN,
    "yarn without an original length": {"rope_type": "yarn", "factor": 2.0},
    "yarn, a small factor": {**YARN, "factor": 0.5},
    "yarn, another attention factor": {**YARN, "attention_factor": 0.7},
    "yarn, other bounds": {**YARN, "beta_fast": 4, "beta_slow": 0.5},
    "yarn, bounds of 0": {**YARN, "beta_fast": 0, "beta_slow": 0},
    "yarn, mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn, one mscale": {**YARN, "mscale": 0.7},
    "yarn, not truncated": {**YARN, "truncate": False},
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": ORIGINAL},
    "longrope, a factor": {"rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": ORIGINAL},
    "longrope, a factor of 1": {"rope_type": "longrope", "factor": 1.0},
    "longrope, another attention factor": {"rope_type": "longrope", "factor": 8.0, "attention_factor": 1.3},
}
PHI3 = ("default", "longrope")  # its class refuses all others; "yarn" is an older name of longrope


def parameters(model_type: str, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the object of one kind, with as many divisors as the family has frequencies."""
    found = {**KINDS[kind], "rope_theta": 500.0}
    if kind.startswith("longrope"):
        count = read(fields).ropes[0].dims // 2
        found |= {"short_factor": [1.0 + i / 8 for i in range(count)], "long_factor": [2.0 + i for i in range(count)]}
    return grown(model_type, found)


def grown(model_type: str, rope: dict[str, Any]) -> dict[str, Any]:
    """Add what Ministral 3 says in the same object: how queries grow."""
    if model_type != "ministral3" or not rope:
        return rope
    has_length = rope.get("rope_type") in ("yarn", "longrope")
    return {**({} if has_length else {"original_max_position_embeddings": 32}), "llama_4_scaling_beta": 0.2, **rope}


def with_rope(model_type: str, kind: str, **changes: Any) -> dict[str, Any]:
    fields = fields_of(model_type, max_position_embeddings=CONTEXT, **changes)
    own = parameters(model_type, kind, fields)
    if model_type == "phi3":
        fields["original_max_position_embeddings"] = ORIGINAL
    by_type = {FULL: own, SLIDING: {"rope_type": "default", "rope_theta": 70.0}}
    return {**fields, "rope_parameters": by_type if model_type in NESTED else own}


def their_tables(fields: dict[str, Any], length: int, kind: str) -> tuple[np.ndarray, ...]:
    """Return the frequencies, cos and sin [length, dims / 2] of transformers' module, for one type of layer."""
    name = fields["model_type"].removesuffix("_text")
    module = import_module(f"transformers.models.{name}.modeling_{name}")
    (own,) = (value for key, value in vars(module).items() if key.endswith("RotaryEmbedding") and "Scaled" not in key)
    rotary = own(their_config(fields))
    layer_type = (kind,) if fields["model_type"] in NESTED else ()
    cos, sin = (table[0] for table in rotary(torch.zeros(1), torch.arange(length)[None], *layer_type))
    frequencies = getattr(rotary, f"{kind}_inv_freq" if layer_type else "inv_freq")
    half = cos.shape[-1] // 2
    step = slice(half) if torch.equal(cos[:, :half], cos[:, half:]) else slice(0, None, 2)  # halves or neighbours
    return frequencies.numpy(), cos[:, step].numpy(), sin[:, step].numpy()


def rope_of(fields: dict[str, Any], kind: str) -> Rope:
    """Return our rotary embedding of the first layer of a type that has one."""
    spec = read(fields)
    attentions = [layer.attention for layer in spec.layers if layer.attention.rope is not None]
    chosen = [own for own in attentions if (own.window > 0) == (kind == SLIDING)]
    return spec.ropes[(chosen or attentions)[0].rope or 0]


CASES = [
    (model_type, kind)
    for model_type in FAMILIES
    for kind in KINDS
    if not (model_type == "phi3" and not kind.startswith(PHI3))
    if not (model_type in NESTED and kind == "yarn, not truncated")
    if not (model_type in ("ministral", "gpt_neox") and kind == "proportional")
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("length", [ORIGINAL, CONTEXT])
@pytest.mark.parametrize(("model_type", "kind"), CASES)
def test_tables_of_every_kind_equal_those_of_transformers(model_type: str, kind: str, length: int) -> None:
    fields = with_rope(model_type, kind)
    for layer_type in (FULL, SLIDING) if model_type in NESTED else (FULL,):
        rope = rope_of(fields, layer_type)
        frequencies, cos, sin = their_tables(fields, length, layer_type)
        np.testing.assert_array_equal(inverse_frequencies(rope, context=length), frequencies[: rope.dims // 2])
        for ours, theirs in zip(rope_tables(rope, length), (cos, sin), strict=True):
            np.testing.assert_allclose(ours[:, : theirs.shape[1]], theirs, rtol=0, atol=COS_SIN_TOLERANCE)


@pytest.mark.parametrize(("model_type", "kind"), CASES)
def test_a_rotary_embedding_is_written_so_that_both_read_it(model_type: str, kind: str) -> None:
    spec = read(with_rope(model_type, kind))
    written = ARCHITECTURES[model_type].write_config(spec)
    assert read(written) == spec
    assert read(their_fields(written)) == spec


def old(model_type: str, theta: float = 500.0, **scaling: Any) -> dict[str, Any]:
    """Return the fields of transformers 4."""
    name = "rotary_emb_base" if model_type == "gpt_neox" else "rope_theta"
    return {name: theta, **({"rope_scaling": grown(model_type, scaling)} if scaling else {})}


SPELLINGS: dict[str, dict[str, Any]] = {
    "a base": {},
    "linear": {"type": "linear", "factor": 4.0},
    "rope_type and type": {"rope_type": "linear", "type": "linear", "factor": 4.0},
    "dynamic": {"type": "dynamic", "factor": 4.0},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "yarn": {**YARN, "attention_factor": 1.2, "beta_fast": 16.0},
    "no original length": {"rope_type": "yarn", "factor": 2.0},
    "a base in the scaling": {"rope_type": "linear", "factor": 4.0, "rope_theta": 900.0},
}
OLD = [
    (name, spelling)
    for name in FAMILIES
    for spelling, scaling in SPELLINGS.items()
    if name != "phi3" or not scaling  # its class refuses all but longrope
    if name not in NESTED or "type" not in scaling or "rope_type" in scaling
]


@pytest.mark.parametrize("top", [{}, {"original_max_position_embeddings": 17}])
@pytest.mark.parametrize(("model_type", "spelling"), OLD)
def test_old_spellings_are_read_as_transformers_5_reads_them(
    model_type: str, spelling: str, top: dict[str, Any]
) -> None:
    fields = fields_of(model_type, max_position_embeddings=CONTEXT, **old(model_type, **SPELLINGS[spelling]), **top)
    assert read(fields) == read(their_fields(fields))


@pytest.mark.parametrize("top", [{}, {"original_max_position_embeddings": 17}])
@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_phi3_reads_older_names_of_longrope_and_a_length_at_the_top(kind: str, top: dict[str, Any]) -> None:
    divisors = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [4.0, 5.0, 6.0, 7.0]}
    fields = fields_of("phi3", max_position_embeddings=CONTEXT, rope_theta=500.0, **top)
    fields["rope_scaling"] = {"type": kind, "original_max_position_embeddings": ORIGINAL, **divisors}
    spec = read(fields)
    assert spec == read(their_fields(fields))
    assert spec.ropes[0].scaling.original_max_position_embeddings == top.get("original_max_position_embeddings", 4096)


@pytest.mark.parametrize("share", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("place", ["top", "rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("model_type", [*PARTIAL, "gpt_neox"])
def test_a_share_of_each_head_is_read_from_the_object_first(model_type: str, place: str, share: float) -> None:
    at_top = PARTIAL.get(model_type, "rotary_pct")
    fields = fields_of(model_type, head_dim=16) if model_type in ("phi3", "glm4") else fields_of(model_type)
    if place == "top":
        fields[at_top] = share
    else:
        fields |= {at_top: 0.25, place: {"rope_type": "default", "partial_rotary_factor": share}}
    spec = read(fields)
    assert spec.ropes[0].dims == 16 * share
    assert spec == read(their_fields(fields))
    _, cos, _ = their_tables(fields, 10, FULL)
    np.testing.assert_allclose(rope_tables(spec.ropes[0], 10)[0][:, : cos.shape[1]], cos, atol=COS_SIN_TOLERANCE)


@pytest.mark.parametrize("head_dim", [16, 80, 96, 154, 246, 256])
def test_every_share_is_written_so_that_it_gives_the_same_columns(head_dim: int) -> None:
    spec = read(fields_of("glm4", head_dim=head_dim, partial_rotary_factor=1.0))
    for dims in range(2, head_dim + 1, 2):
        rotated = replace(spec, ropes=(replace(spec.ropes[0], dims=dims),))
        assert read(ARCHITECTURES["glm4"].write_config(rotated)) == rotated


NESTING: dict[str, dict[str, Any]] = {
    "no base in the objects": {"rope_theta": 500.0, "rope_parameters": {FULL: {"rope_type": "default"}, SLIDING: {}}},
    "one object": {"rope_theta": 500.0, "rope_parameters": {SLIDING: {"rope_type": "default", "rope_theta": 30.0}}},
    "the other object": {"rope_parameters": {FULL: {"rope_type": "linear", "factor": 2.0, "rope_theta": 30.0}}},
    "a null object": {"rope_parameters": {FULL: None, SLIDING: {"rope_type": "linear", "factor": 2.0}}},
    "a base beside the objects": {"rope_parameters": {"rope_theta": 30.0, FULL: {"rope_type": "default"}}},
    "a length at the top": {
        "original_max_position_embeddings": 17,
        "rope_parameters": {FULL: {"rope_type": "yarn", "factor": 4.0}},
    },
}


@pytest.mark.parametrize("model_type", sorted(NESTED))
@pytest.mark.parametrize("nesting", NESTING)
def test_an_object_for_each_type_of_layer_is_read_as_transformers_reads_it(model_type: str, nesting: str) -> None:
    fields = fields_of(model_type, max_position_embeddings=CONTEXT, **NESTING[nesting])
    assert read(fields) == read(their_fields(fields))


@pytest.mark.parametrize("model_type", sorted(NESTED))
def test_fields_that_transformers_does_not_read_there_are_refused(model_type: str) -> None:
    flat = {"rope_type": "default", "rope_theta": 30.0}
    with pytest.raises(CheckpointError, match=r"rope_parameters\.rope_theta says nothing of the layers") as caught:
        read(fields_of(model_type, rope_parameters=flat))
    assert "an object for each type of layer" in str(caught.value)
    with pytest.raises(UnsupportedError, match=rf"rope_parameters\.{FULL}\.truncate: transformers does not read it"):
        read(with_rope(model_type, "yarn, not truncated"))
    with pytest.raises(CheckpointError, match=r"rope_scaling\.type: transformers 5 does not read this name"):
        read(fields_of(model_type, rope_scaling={"type": "linear", "factor": 2.0}))
    with pytest.raises(CheckpointError, match="contradict each other"):
        read(fields_of(model_type, rope_parameters=flat, rope_scaling={"rope_type": "linear", "factor": 2.0}))


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - NESTED))
def test_an_object_for_each_type_of_layer_is_refused_by_other_families(model_type: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"rope_parameters\.{FULL}: a rotary embedding for some layers"):
        read(fields_of(model_type, rope_parameters={FULL: {"rope_type": "default"}}))


@pytest.mark.parametrize(
    ("model_type", "changes", "said"),
    [
        (
            "qwen3",
            {"rope_theta": 123.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_theta, 123",
        ),
        (
            "gpt_neox",
            {"rotary_pct": 0.5, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
            "rotary_pct, 0.5",
        ),
        (
            "qwen3",
            {"rope_parameters": {"rope_type": "linear", "type": "default", "factor": 2.0, "rope_theta": 1e4}},
            "rope_parameters.type, 'default'",
        ),
    ],
)
def test_a_field_that_does_not_count_is_named(
    model_type: str, changes: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    read(fields_of(model_type) | changes)
    (message,) = {message for message in caplog.messages if "takes its place" in message}
    assert said in message
    caplog.clear()
    read(fields_of(model_type))
    assert not caplog.messages
