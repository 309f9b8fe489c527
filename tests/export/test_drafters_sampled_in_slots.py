"""Sampling with a real drafter draws as plain sampling does, one text at a time and three side by side.

The first three tokens are counted jointly, against probabilities that are enumerated from the model's own logits; level
and sample sizes are those of tests/unit/test_sampled_speculation.py.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from helpers.chi_square import p_value, samples_for
from helpers.drafters import Eagle3, residual_streams
from helpers.tiny_models import TinyBundles, TinyModel
from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec
from shortstack.runtime import DraftPolicy, Model, Request, SamplingParams, Speculate, load
from shortstack.runtime.decode.sampling import distribution

TARGET = TinyModel("sampled with a drafter")
PROMPT = [9, 120, 33, 71]
LEVEL, POWER, EFFECT = 1e-4, 0.99, 0.35
PARAMS = SamplingParams(temperature=1.5, top_k=3, top_p=0.98, min_p=0.02, repetition_penalty=1.1)
COUNTED, NEW = 3, 5
Cells = dict[tuple[int, ...], float]


@pytest.fixture(scope="module", params=["fitted", "garbage"])
def bundle(request: pytest.FixtureRequest, tiny_bundles: TinyBundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, folder = str(tiny_bundles.checkpoint(TARGET)), tmp_path_factory.mktemp("sampled")
    head = Eagle3(draft_vocab=150)
    weights = head.tensors()
    if request.param == "fitted":
        with load(tiny_bundles.bundle(TARGET)) as model:
            own = {"max_new_tokens": 12, "ignore_eos": True}
            texts = [PROMPT + list(model.generate(PROMPT, sampling=seeded(n), **own).tokens) for n in range(900, 920)]
        torch_model = AutoModelForCausalLM.from_pretrained(source).eval()
        embedding = torch_model.model.embed_tokens.weight.detach()
        weights = head.fitted(texts, [residual_streams(torch_model, text) for text in texts], embedding)
    drafter = str(head.write(folder / "d", weights))
    return export_bundle(ExportSpec(source, folder / "b", drafter=drafter)).folder


def seeded(seed: int) -> SamplingParams:
    return SamplingParams(1.5, 3, 0.98, 0.02, 1.1, seed)


def enumerated(model: Model) -> Cells:
    """Return the probability of each text of three tokens after the prompt."""
    top = model.bundle.manifest.spec.num_hidden_layers

    def grown(text: list[int], mass: float) -> Cells:
        if len(text) == len(PROMPT) + COUNTED:
            return {tuple(text[len(PROMPT) :]): mass}
        found = distribution(model.activations(text).heads[top][-1], PARAMS, text)
        cells: Cells = {}
        for token, probability in zip(found.ids.tolist(), found.probs.tolist(), strict=True):
            cells |= grown([*text, token], mass * probability)
        return cells

    return grown(list(PROMPT), 1.0)


@pytest.mark.parametrize("slots", [1, 3])
def test_drafts_leave_the_distribution_of_plain_sampling(bundle: Path, slots: int) -> None:
    with load(bundle) as model:
        expected = enumerated(model)
    samples = samples_for(POWER, EFFECT, len(expected) - 1, LEVEL)
    wanted = Speculate(draft=DraftPolicy(3))
    own = {"strategy": wanted, "max_new_tokens": NEW, "ignore_eos": True}
    with load(bundle, slots=slots) as model:
        if slots == 1:
            results = [model.generate(PROMPT, sampling=seeded(seed), **own) for seed in range(samples)]
        else:
            results = model.generate_batch([Request(PROMPT, sampling=seeded(seed), **own) for seed in range(samples)])
    counts = Counter(result.tokens[:COUNTED] for result in results)
    drafted = sum(result.stats.drafted for result in results)
    assert drafted > samples
    cells = sorted(expected | counts)
    assert p_value([counts[cell] for cell in cells], [expected.get(cell, 0.0) for cell in cells]) > LEVEL
