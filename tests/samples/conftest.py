"""A tiny model's bundles and small settings for the tests of the benchmark, and its answers for those of recipes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.answers import greedy_answers, write_answers
from helpers.tiny_models import SPECULATOR, TinyBundles
from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec
from shortstack.export.twin.folder import load_twin
from shortstack.export.twin.model import Twin
from shortstack.samples.bench.artifacts import Artifacts, open_artifacts
from shortstack.samples.bench.settings import Settings
from shortstack.samples.recipes.training.data import Example
from shortstack.samples.recipes.training.features import Features, extract_features

EXIT_LAYER, DRAFT_VOCAB = 3, 64


@pytest.fixture(scope="session")
def small() -> Settings:
    return Settings(
        prompt_lengths=(5,),
        repeats=2,
        chunks=2,
        chunk_tokens=3,
        rest_s=0.0,
        draft_prompts=1,
        draft_prompt_tokens=12,
        draft_lengths=(1, 3),
        draft_vocabs=(None, DRAFT_VOCAB),
        verify_rows=(1, 2),
        cost_repeats=2,
        memory_prompt=4,
        memory_tokens=4,
        load_repeats=2,
    )


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """A tiny model's bundles where the benchmark looks for them."""
    folder = tmp_path_factory.mktemp("bench")
    checkpoint = SPECULATOR.write(folder / "checkpoint")
    found = open_artifacts(checkpoint, folder / "cache")
    for name, exits, vocab in (
        ("uncut", (), None),
        (f"exit-{EXIT_LAYER}", (EXIT_LAYER,), None),
        (f"exit-{EXIT_LAYER}-vocab-{DRAFT_VOCAB}", (EXIT_LAYER,), DRAFT_VOCAB),
    ):
        export_bundle(ExportSpec(str(checkpoint), found.folder / name, exits, vocab))
    return found


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On tiny models torch's threads only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tiny_bundles: TinyBundles) -> Path:
    return tiny_bundles.checkpoint(SPECULATOR)


@pytest.fixture(scope="module")
def twin(checkpoint: Path) -> Twin:
    return load_twin(str(checkpoint)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def rows(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    """The tiny model's greedy answers."""
    return greedy_answers(checkpoint, tmp_path_factory.mktemp("plain") / "b")


@pytest.fixture(scope="module")
def features(twin: Twin, rows: list[Example], tmp_path_factory: pytest.TempPathFactory) -> Features:
    """What the tiny model computes over its answers, at all depths; the last few are held out."""
    held = [index >= 34 for index in range(len(rows))]
    depths = range(1, SPECULATOR.layers)
    return extract_features(twin, rows, held, tmp_path_factory.mktemp("f") / "f", depths, use_bf16=False)


@pytest.fixture(scope="module")
def data(rows: list[Example], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """These answers as a file."""
    return write_answers(rows, tmp_path_factory.mktemp("data") / "answers.jsonl")
