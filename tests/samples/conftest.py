"""A tiny model's bundles and small settings, for every test of the benchmark."""

from __future__ import annotations

import pytest

from helpers.tiny_models import SPECULATOR
from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec
from shortstack.samples.bench.artifacts import Artifacts, open_artifacts
from shortstack.samples.bench.settings import Settings

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
