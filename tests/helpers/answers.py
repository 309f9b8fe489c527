"""A tiny model's own greedy answers, of different lengths, for the recipes that train drafters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec
from shortstack.runtime import load
from shortstack.samples.recipes.training.data import Example


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
