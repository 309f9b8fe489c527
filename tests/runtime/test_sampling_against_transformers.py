"""The runtime samples from the same distribution as transformers' generate()."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from shortstack.runtime.decode.sampling import SamplingParams, distribution

# transformers computes in float32 throughout: a softmax over V terms, each rounded
FLOAT32_SOFTMAX = 2e-6

OPTIONS: list[dict[str, Any]] = [
    {},
    {"top_k": 50},
    {"top_k": 1},
    {"top_p": 0.95},
    {"top_p": 0.3},
    {"min_p": 0.05},
    {"top_k": 50, "top_p": 0.9},
    {"top_k": 40, "top_p": 0.95, "min_p": 0.1},
    {"top_p": 0.8, "min_p": 0.02},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7, "top_k": 20, "top_p": 0.7, "min_p": 0.2},
]


def processors(params: SamplingParams) -> LogitsProcessorList:
    """Build the processors in the order of ``GenerationMixin._get_logits_processor``."""
    chain = LogitsProcessorList()
    if params.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    chain.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        chain.append(MinPLogitsWarper(params.min_p))
    return chain


def theirs(logits: NDArray[np.float32], params: SamplingParams, context: list[int]) -> NDArray[np.float32]:
    scores = processors(params)(torch.tensor([context]), torch.from_numpy(logits.copy())[None])
    probs: NDArray[np.float32] = scores.softmax(dim=-1)[0].numpy()
    return probs


@pytest.mark.parametrize("temperature", [0.3, 0.8, 1.7])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("vocab", "spread"), [(37, 1.0), (4096, 3.0), (49152, 2.5)])
def test_support_and_probabilities_equal_those_of_transformers(
    vocab: int, spread: float, options: dict[str, Any], temperature: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=vocab) * spread).astype(np.float32)
    context = rng.integers(0, vocab, 64).tolist()
    params = SamplingParams(temperature=temperature, **options)
    expected, found = theirs(logits, params, context), distribution(logits, params, context)
    # A token at the very edge of the nucleus may fall on either side, since transformers sums in float32.
    different = np.setxor1d(found.ids, np.flatnonzero(expected))
    assert expected[different].sum() + found.probs_at(different).sum() <= 5e-4
    assert different.size <= (1 if params.top_p < 1 or params.min_p > 0 else 0)
    if different.size == 0:
        np.testing.assert_allclose(found.probs, expected[found.ids], atol=FLOAT32_SOFTMAX, rtol=1e-4)


@pytest.mark.parametrize(
    ("logits", "options", "support"),
    [
        ([0, 1, 1, 2], {"top_k": 2}, [1, 2, 3]),  # all tokens tied with the k-th stay
        ([0, 1, 1, 2], {"top_p": 0.0}, [3]),  # never empty
        ([0, 2, 1, 2], {"min_p": 1.0}, [1, 3]),  # a token at the limit is kept
        ([-9, 2, 2, 2], {"top_k": 1, "min_p": 1.0}, [1, 2, 3]),
    ],
)
def test_limits_and_ties_are_resolved_the_same_way(
    logits: list[int], options: dict[str, Any], support: list[int]
) -> None:
    row, params = np.array(logits, np.float32), SamplingParams(temperature=1.0, **options)
    assert np.flatnonzero(theirs(row, params, [0])).tolist() == support
    assert distribution(row, params, [0]).ids.tolist() == support


def test_a_sum_that_reaches_top_p_exactly_ends_the_nucleus() -> None:
    row, params = np.zeros(4, np.float32), SamplingParams(temperature=1.0, top_p=0.5)
    # Which of several equal tokens transformers keeps depends on its sort; the runtime keeps the lowest ids.
    assert np.count_nonzero(theirs(row, params, [0])) == 2
    assert distribution(row, params, [0]).ids.tolist() == [0, 1]


def test_generate_builds_the_same_processors_in_the_same_order() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=0
    )
    model = LlamaForCausalLM(config)
    options = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2}
    generation_config = GenerationConfig(do_sample=True, num_beams=1, **options)
    built = model._get_logits_processor(generation_config, input_ids_seq_length=3)
    assert [type(step) for step in built] == [type(step) for step in processors(SamplingParams(**options))]
