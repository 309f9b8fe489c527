"""A model whose output is NaN gives an error with a name, in every way of decoding, and never a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from helpers.bad_input import Refused
from shortstack.graphs import names
from shortstack.graphs.errors import ContractError
from shortstack.runtime import ExitPolicy, Model, load, parse_criterion
from shortstack.runtime.decode.choice import GreedyChoice, Proposal
from shortstack.runtime.early_exit.loop import judge_likely
from shortstack.runtime.engine.head import Head

ALWAYS = parse_criterion("always")
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "self-speculative": {"strategy": "self-speculative"},
    "early exit": {"exits": ExitPolicy(ALWAYS)},
    "early exit from the prompt": {"exits": ExitPolicy(ALWAYS, prefill_exit=True)},
    "early exit, pipeline": {"exits": ExitPolicy(ALWAYS, kv_policy="pipeline")},
    "early exit, rollback": {"exits": ExitPolicy(ALWAYS, verify="rollback")},
    "early exit, exact": {"exits": ExitPolicy(ALWAYS, verify="exact")},
}
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy with a penalty": {"repetition_penalty": 1.3},
    "sampled": {"temperature": 0.8, "top_k": 5, "seed": 1},
}

# Rollback is a rule for greedy decoding.
CASES = [(way, sampling) for way in WAYS for sampling in SAMPLINGS if "rollback" not in way or sampling == "greedy"]


def spoil(bundle: Path, *values: float) -> None:
    """Set the final norm's weights to these values, over and over."""
    for graph in sorted(bundle.glob("*.onnx")):
        for tensor in onnx.load(str(graph), load_external_data=False).graph.initializer:
            if tensor.name == names.FINAL_NORM:
                place = {entry.key: entry.value for entry in tensor.external_data}
                with (bundle / place["location"]).open("r+b") as file:
                    file.seek(int(place.get("offset", 0)))
                    file.write(np.resize(np.array(values, np.float32), tensor.dims).tobytes())


@pytest.mark.parametrize(("way", "sampling"), CASES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_every_way_of_decoding_names_it(bundle: Path, way: str, sampling: str, value: float) -> None:
    spoil(bundle, value, 1.0)
    model = load(bundle)
    for _ in range(2):  # the model stays usable, as far as it ever was
        with pytest.raises(ContractError, match=r"output is not valid: the .*--verify.*parity"):
            model.generate([5, 6, 7], **WAYS[way], **SAMPLINGS[sampling])


def test_the_command_line_prints_one_line(bundle: Path, refused: Refused) -> None:
    spoil(bundle, float("nan"))
    refused(["generate", bundle, "Hello", "--raw", "--json"], "output is not valid", "probability of the most likely")


def test_a_sound_model_next_to_it_is_not_affected(bundle: Path, model: Model) -> None:
    before = model.generate([5, 6, 7], max_new_tokens=8).tokens
    spoil(bundle, float("nan"))
    with pytest.raises(ContractError):
        load(bundle).generate([5, 6, 7])
    assert model.generate([5, 6, 7], max_new_tokens=8).tokens == before


def test_only_rows_that_decide_a_token_are_looked_at() -> None:
    """Behind the first rejected draft anything may stand."""
    head = Head(4, 8, np.dtype(np.float32), None)
    head.token[:] = (1, 2, 3, 4)
    head.logits = np.zeros((4, 8), np.float32)
    drafts = [Proposal(token, 0.5, 2) for token in (1, 7, 3)]
    for row, is_read in enumerate((True, True, False, False)):
        head.top_prob[:] = 0.5
        head.top_prob[row] = np.nan
        for judge in (
            lambda: GreedyChoice().judge(head, 4, drafts, [0]),
            lambda: judge_likely(head, 4, drafts, 0.9),
        ):
            if is_read:
                with pytest.raises(ContractError):
                    judge()
            else:
                assert judge().tokens == (1, 2)
