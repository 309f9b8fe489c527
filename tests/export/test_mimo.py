"""MiMo is read as Qwen2, and what is left out of it is named."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from helpers.family_configs import fields_of, read
from shortstack.export.arch import ARCHITECTURES
from shortstack.graphs.errors import CheckpointError

FEW = {"num_key_value_heads": 2}


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"rope_theta": 640000.0, "head_dim": 16}])
def test_mimo_is_qwen2_by_another_name(changes: dict[str, object]) -> None:
    spec = read(fields_of("mimo", **FEW, **changes))
    assert spec == replace(read(fields_of("qwen2", **FEW, **changes)), model_type="mimo")
    written = ARCHITECTURES["mimo"].write_config(spec)
    assert (written["model_type"], written["architectures"]) == ("mimo", ["MiMoForCausalLM"])
    assert read(written) == spec


@pytest.mark.parametrize("count", [0, 1, 3])
def test_layers_that_predict_further_tokens_are_named_in_one_line(count: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "shortstack"):
        read(fields_of("mimo", **FEW, num_nextn_predict_layers=count))
    says = f"num_nextn_predict_layers is {count}: model.mtp_layers, which predict further tokens, are left out"
    assert [says in message for message in caplog.messages] == [True] * (count > 0)


def test_a_negative_number_of_such_layers_is_refused() -> None:
    with pytest.raises(CheckpointError, match="num_nextn_predict_layers: found -1, expected 0 or more"):
        read(fields_of("mimo", **FEW, num_nextn_predict_layers=-1))
