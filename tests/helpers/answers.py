"""A tiny model's own greedy answers, of different lengths, for the recipes that train drafters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from helpers.drafters import Recorded
from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec
from shortstack.runtime import DraftPolicy, Speculate, load
from shortstack.samples.recipes.training.data import Example
from shortstack.samples.recipes.training.draft_cost import Drafts
from shortstack.samples.recipes.training.drafter_measure import alphas_of_rounds


def greedy_answers(checkpoint: Path, folder: Path, count: int = 40) -> list[Example]:
    """Let a model answer random prompts, through a bundle in a new folder."""
    prompts = [np.random.default_rng(seed).integers(3, 300, 2 + seed % 5).tolist() for seed in range(count)]
    bundle = export_bundle(ExportSpec(str(checkpoint), folder))
    with load(bundle.folder) as model:
        answers = [
            model.generate(prompt, max_new_tokens=8 + number % 7, ignore_eos=True).tokens
            for number, prompt in enumerate(prompts)
        ]
    return [Example((*prompt, *answer), len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]


def write_answers(rows: Sequence[Example], file: Path) -> Path:
    """Write answers as ``self_data`` does."""
    lines = [json.dumps({"p": row.ids[: row.start], "o": row.ids[row.start :], "k": "x"}) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def assert_decoded_as_measured(bundle: Path, rows: Sequence[Example], drafts: Drafts) -> None:
    """A bundle's drafter is right in its rounds exactly where training measured that it is.

    Args:
        bundle: The bundle with the drafter.
        rows: The model's greedy answers.
        drafts: What the drafter drafts from every position of these, as measured.
    """
    begins = np.concatenate([[0], drafts.answer_ends[:-1]])
    right, judged = np.zeros(4), np.zeros(4)
    with load(bundle) as model:
        for number, row in enumerate(rows):
            source, answer = Recorded(), list(row.ids[row.start :])
            strategy = Speculate(draft=DraftPolicy(4), source=source)
            before = list(row.ids[: row.start])
            result = model.generate(before, strategy=strategy, max_new_tokens=len(answer), ignore_eos=True)
            assert list(result.tokens) == answer
            for text, proposed in source.rounds:
                said = len(text) - row.start
                for draft, token in enumerate(proposed[: len(answer) - said]):
                    position = begins[number] + said - 1
                    assert drafts.is_usable[position, draft]
                    assert drafts.is_right[position, draft] == (token == answer[said + draft])
                    judged[draft] += 1
                    right[draft] += token == answer[said + draft]
                    if token != answer[said + draft]:
                        break
    assert judged.sum() > 150
    np.testing.assert_allclose(alphas_of_rounds(drafts), right / judged)
