"""SmolLM2-135M-Instruct: transformers' reading of its GGUF file against the bundle that `shortstack export` makes."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from helpers import tolerances
from shortstack.export.parity.compare import compare
from shortstack.export.parity.reference import Reference
from shortstack.graphs.texts.prompts import prompts
from shortstack.runtime import DraftPolicy, Model, SamplingParams, load

EXITS = (4, 8, 15)
LAYERS = 30
DRAFT_TOKENS = range(1, 7)
# Each pair once, then the pairs with the fewest rows again: drafts of an untrained exit are nearly all rejected, so a
# token costs k draft steps. Short drafts come in both forms.
PAIRS = [*product(EXITS, DRAFT_TOKENS), *product(EXITS, (1, 2)), *product(EXITS, (1, 2))]
GREEDY_PROMPTS, GREEDY_TOKENS = 10, 128
PROMPTS, TOKENS = 30, 64


@pytest.fixture(scope="module")
def model(smollm2_bundle: Path) -> Model:
    return load(smollm2_bundle)


@pytest.fixture(scope="module")
def texts(model: Model) -> list[list[int]]:
    """The shipped prompts as chats, in token ids."""
    return [model.encode([{"role": "user", "content": text}]) for text in prompts(PROMPTS)]


class PlainOutputs:
    """Plain continuations of the texts, decoded when they are first asked for."""

    def __init__(self, model: Model, texts: list[list[int]]) -> None:
        self._model, self._texts = model, texts
        self._tokens: dict[int, tuple[int, ...]] = {}

    def __call__(self, text: int) -> tuple[int, ...]:
        if text not in self._tokens:
            count = GREEDY_TOKENS if text < GREEDY_PROMPTS else TOKENS
            result = self._model.generate(self._texts[text], max_new_tokens=count, ignore_eos=True)
            assert len(result.tokens) == count
            self._tokens[text] = result.tokens
        return self._tokens[text]


@pytest.fixture(scope="module")
def plain(model: Model, texts: list[list[int]]) -> PlainOutputs:
    return PlainOutputs(model, texts)


def test_logits_of_every_head_at_every_position_equal_transformers(
    model: Model, texts: list[list[int]], smollm2_reference: Reference
) -> None:
    report = compare(model, smollm2_reference, texts[:5], greedy_tokens=0)
    assert [head.depth for head in report.heads] == [*EXITS, LAYERS]
    assert report.positions == sum(map(len, texts[:5]))
    assert not report.problems()
    for head in report.heads:
        print(f"after {head.depth} layers: max {head.max_abs:.2e}, mean {head.mean_abs:.2e}, worst at {head.worst}")
        assert head.max_abs <= tolerances.SMOLLM2.max_abs
        assert head.mean_abs <= tolerances.SMOLLM2.mean_abs
    assert max(layer.relative for layer in report.layers) <= tolerances.SMOLLM2.relative


def test_greedy_decoding_chooses_the_tokens_of_transformers(
    texts: list[list[int]], plain: PlainOutputs, smollm2_reference: Reference
) -> None:
    """One teacher-forced run over our own text replaces 128 steps: its best token must be our next one everywhere.

    By induction that is transformers' own greedy continuation; after a near tie, the one from the token we took.
    """
    for index, text in enumerate(texts[:GREEDY_PROMPTS]):
        ours = plain(index)
        logits = smollm2_reference.run_text([*text, *ours[:-1]], [LAYERS]).heads[LAYERS][len(text) - 1 :]
        for position in np.flatnonzero(logits.argmax(-1) != np.array(ours)):
            lead = float(logits[position].max() - logits[position, ours[position]])
            print(f"fork: prompt {index}, new token {position}, transformers' lead {lead:.1e}")
            assert lead < tolerances.SMOLLM2.tie


@pytest.mark.slow
@pytest.mark.parametrize("index", range(GREEDY_PROMPTS))
def test_greedy_decoding_equals_transformers_step_by_step(
    texts: list[list[int]], plain: PlainOutputs, smollm2_reference: Reference, index: int
) -> None:
    theirs, gaps = smollm2_reference.greedy(texts[index], GREEDY_TOKENS)
    fork = next((i for i, (a, b) in enumerate(zip(plain(index), theirs, strict=True)) if a != b), None)
    if fork is not None:
        print(f"fork: prompt {index}, new token {fork}, transformers' lead {gaps[fork]:.1e}")
        assert gaps[fork] < tolerances.SMOLLM2.tie


@pytest.mark.parametrize(("index", "exit_layer", "k"), [(i, *pair) for i, pair in enumerate(PAIRS)])
def test_self_speculation_equals_plain_decoding(
    model: Model, texts: list[list[int]], plain: PlainOutputs, index: int, exit_layer: int, k: int
) -> None:
    count = TOKENS if k <= 2 else TOKENS // 2  # for the same reason as in PAIRS; the slow test below cuts nothing
    speculate(model, texts[index], plain(index)[:count], exit_layer, DraftPolicy(k, has_bonus=index >= 24))


@pytest.mark.slow
@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize(("exit_layer", "k"), list(product(EXITS, DRAFT_TOKENS)))
def test_self_speculation_equals_plain_decoding_in_the_full_grid(
    model: Model, texts: list[list[int]], plain: PlainOutputs, exit_layer: int, k: int, bonus: bool
) -> None:
    for index, text in enumerate(texts):
        speculate(model, text, plain(index)[:TOKENS], exit_layer, DraftPolicy(k, has_bonus=bonus))


def speculate(model: Model, text: list[int], expected: tuple[int, ...], exit_layer: int, policy: DraftPolicy) -> None:
    result = model.generate(
        text,
        max_new_tokens=len(expected),
        strategy="self-speculative",
        exit_layer=exit_layer,
        draft=policy,
        ignore_eos=True,
    )
    assert result.tokens == expected
    assert result.stats.is_balanced


@pytest.mark.parametrize("strategy", ["plain", "self-speculative"])
def test_sampling_with_a_seed_runs_and_repeats_itself(model: Model, strategy: str) -> None:
    chat = [{"role": "user", "content": prompts(1)[0]}]
    texts = [
        model.generate(
            chat,
            max_new_tokens=16,
            strategy=strategy,
            draft=DraftPolicy(3),
            sampling=SamplingParams(temperature=1.0, top_p=0.95, seed=seed),
        ).text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.strip() for text in texts)
