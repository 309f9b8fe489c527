"""A tiny model that the examples and the Python blocks of the docs run on."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.tiny_models import TinyBundles, TinyModel

TWELVE_LAYERS = TinyModel("twelve-layers", layers=12, hidden=32, intermediate=48)
"""Deep enough for the exits that the docs name."""


@pytest.fixture(scope="session")
def bundle_for_examples(tiny_bundles: TinyBundles) -> Path:
    return tiny_bundles.bundle(TWELVE_LAYERS, 4, 8)
