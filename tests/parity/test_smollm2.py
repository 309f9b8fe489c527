"""SmolLM2-135M-Instruct: transformers' reading of its GGUF file against the bundle that `shortstack export` makes."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from helpers import tolerances
from shortstack.export.parity.compare import compare
from shortstack.export.parity.reference import Reference
from shortstack.graphs.texts.prompts import prompts
from shortstack.runtime import DraftPolicy, Model, SamplingParams
from shortstack.runtime.request import Plain, Speculate, Strategy

EXITS = (4, 8, 15)
LAYERS = 30
DRAFT_TOKENS = range(1, 7)
# What `make test` decodes: each pair of exit and drafted tokens once, the last token drafted too at every other pair.
# Drafts of an untrained exit are nearly all rejected, so a token costs k draft steps.
FORMS = [(exit_layer, k, (k + i) % 2 == 0) for i, exit_layer in enumerate(EXITS) for k in DRAFT_TOKENS]
FEW_PROMPTS, FEW_TOKENS = 5, 64
DRAFTED_TOKENS = 24
# What the slow tests decode.
GREEDY_PROMPTS, GREEDY_TOKENS = 10, 128
PROMPTS, TOKENS = 30, 64


@pytest.fixture(scope="module")
def texts(model: Model) -> list[list[int]]:
    """The shipped prompts as chats, in token ids."""
    return [model.encode([{"role": "user", "content": text}]) for text in prompts(PROMPTS)]


class PlainOutputs:
    """Plain continuations of the texts, decoded when they are first asked for, and again when more is asked for."""

    def __init__(self, model: Model, texts: list[list[int]]) -> None:
        self._model, self._texts = model, texts
        self._tokens: dict[int, tuple[int, ...]] = {}

    def __call__(self, text: int, count: int) -> tuple[int, ...]:
        if len(self._tokens.get(text, ())) < count:
            result = self._model.generate(self._texts[text], max_new_tokens=count, ignore_eos=True)
            assert len(result.tokens) == count
            self._tokens[text] = result.tokens
        return self._tokens[text][:count]


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
    """One teacher-forced run over our own text replaces its steps: its best token must be our next one everywhere.

    By induction that is transformers' own greedy continuation; after a near tie, the one from the token we took.
    """
    for index, text in enumerate(texts[:FEW_PROMPTS]):
        ours = plain(index, FEW_TOKENS)
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
    ours = plain(index, GREEDY_TOKENS)
    theirs, gaps = smollm2_reference.greedy(texts[index], GREEDY_TOKENS)
    fork = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
    if fork is not None:
        print(f"fork: prompt {index}, new token {fork}, transformers' lead {gaps[fork]:.1e}")
        assert gaps[fork] < tolerances.SMOLLM2.tie


@pytest.mark.parametrize(("index", "exit_layer", "k", "bonus"), [(i, *form) for i, form in enumerate(FORMS)])
def test_self_speculation_equals_plain_decoding(
    model: Model, texts: list[list[int]], plain: PlainOutputs, index: int, exit_layer: int, k: int, bonus: bool
) -> None:
    speculate(model, texts[index], plain(index, DRAFTED_TOKENS), exit_layer, DraftPolicy(k, has_bonus=bonus))


@pytest.mark.slow
@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize(("exit_layer", "k"), list(product(EXITS, DRAFT_TOKENS)))
def test_self_speculation_equals_plain_decoding_in_the_full_grid(
    model: Model, texts: list[list[int]], plain: PlainOutputs, exit_layer: int, k: int, bonus: bool
) -> None:
    for index, text in enumerate(texts):
        speculate(model, text, plain(index, TOKENS), exit_layer, DraftPolicy(k, has_bonus=bonus))


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


@pytest.mark.parametrize("strategy", [Plain(), Speculate(draft=DraftPolicy(3))], ids=["plain", "self-speculative"])
def test_sampling_with_a_seed_runs_and_repeats_itself(model: Model, strategy: Strategy) -> None:
    chat = [{"role": "user", "content": prompts(1)[0]}]
    texts = [
        model.generate(
            chat,
            max_new_tokens=8,
            strategy=strategy,
            sampling=SamplingParams(temperature=1.0, top_p=0.95, seed=seed),
        ).text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.strip() for text in texts)
