"""Rotary tables compared with transformers' own rotary embedding."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from shortstack.export.arch.llama import read_spec
from shortstack.export.checkpoint.config import Config
from shortstack.export.rope import inverse_frequencies, rope_tables
from shortstack.graphs.errors import CheckpointError

LENGTH = 9000
COS_SIN_TOLERANCE = 1e-7  # one unit in the last place: torch's vector and scalar code may round a cosine differently
BASE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 100,
    "max_position_embeddings": LENGTH,
}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "smollm2": {"rope_theta": 100000.0},
    "odd_head": {"head_dim": 22},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "llama3.2": {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "llama3.1": {"rope_theta": 500000.0, "head_dim": 128, "rope_scaling": {**LLAMA3, "factor": 8.0}},
    "llama3_other": {"rope_scaling": {**LLAMA3, "low_freq_factor": 2.0, "original_max_position_embeddings": 300}},
}


@pytest.mark.parametrize("case", CASES)
def test_tables_equal_those_of_transformers(case: str) -> None:
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    fields = copy.deepcopy({**BASE, **CASES[case]})  # transformers writes into the objects
    spec = read_spec(Config(fields, "config.json"))
    theirs = LlamaRotaryEmbedding(LlamaConfig(**fields))
    np.testing.assert_array_equal(inverse_frequencies(spec.ropes[0]), theirs.inv_freq.numpy())
    cos, sin = rope_tables(spec.ropes[0], LENGTH)
    their_cos, their_sin = theirs(torch.zeros(1), torch.arange(LENGTH)[None])
    half = spec.ropes[0].head_dim // 2
    for ours, other in ((cos, their_cos), (sin, their_sin)):
        assert ours.dtype == np.float32
        assert ours.shape == (LENGTH, half)
        np.testing.assert_allclose(ours, other[0, :, :half].numpy(), rtol=0, atol=COS_SIN_TOLERANCE)


def test_a_shorter_table_is_the_beginning_of_a_longer_one() -> None:
    (rope,) = read_spec(Config(BASE, "config.json")).ropes
    np.testing.assert_allclose(rope_tables(rope, 10)[0], rope_tables(rope, 100)[0][:10], rtol=0, atol=COS_SIN_TOLERANCE)


def factors_rope() -> Any:
    return read_spec(Config({**BASE, "rope_scaling": {"rope_type": "factors"}}, "m.gguf")).ropes[0]


def test_factors_taken_from_llama3_scaling_give_the_same_frequencies() -> None:
    plain = read_spec(Config(BASE, "config.json"))
    llama3 = read_spec(Config({**BASE, "rope_scaling": LLAMA3}, "config.json"))
    factors = inverse_frequencies(plain.ropes[0]) / inverse_frequencies(llama3.ropes[0])
    assert factors.min() == 1.0
    assert factors.max() == pytest.approx(32.0)
    np.testing.assert_allclose(
        inverse_frequencies(factors_rope(), factors),
        inverse_frequencies(llama3.ropes[0]),
        rtol=2 * np.finfo(np.float32).eps,
    )


@pytest.mark.parametrize(
    "factors", [None, np.ones(31, np.float32), np.zeros(32, np.float32), np.full(32, np.nan, np.float32)]
)
def test_bad_factors_are_refused(factors: Any) -> None:
    with pytest.raises(CheckpointError, match="factors"):
        rope_tables(factors_rope(), 4, factors)


def test_factors_are_refused_by_a_model_that_does_not_use_them() -> None:
    with pytest.raises(ValueError, match="takes no factors"):
        rope_tables(read_spec(Config(BASE, "config.json")).ropes[0], 4, np.ones(32, np.float32))


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 1e-300}},
        {"rope_scaling": {**LLAMA3, "factor": 1e-42}},
    ],
)
def test_angles_that_no_float_can_hold_are_refused(fields: dict[str, Any]) -> None:
    spec = read_spec(Config({**BASE, **fields}, "config.json"))
    with pytest.raises(CheckpointError, match="rotary frequencies are too large for float32: found rope_theta"):
        rope_tables(spec.ropes[0], LENGTH)


@pytest.mark.parametrize("theta", [1e-300, 0.5, 1])
def test_a_base_that_rotates_no_column_more_slowly_is_refused(theta: float) -> None:
    with pytest.raises(CheckpointError, match=r"rope_theta: found .*, expected a number above 1"):
        read_spec(Config({**BASE, "rope_theta": theta}, "config.json"))


def test_a_base_that_no_float32_can_hold_gives_the_tables_of_transformers() -> None:
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    fields = {**BASE, "rope_theta": 1e300}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**fields)).inv_freq
    assert torch.equal(torch.from_numpy(rope_tables(read_spec(Config(fields, "f")).ropes[0], 2)[0][1]), theirs.cos())
