"""A checkpoint and an adapter to damage, for the tests of bad input."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from helpers.adapters import lora
from helpers.tiny_models import BASE, TinyBundles


@pytest.fixture
def checkpoint(tiny_bundles: TinyBundles, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(tiny_bundles.checkpoint(BASE), tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def base(tiny_bundles: TinyBundles) -> Path:
    """A checkpoint to adapt."""
    return tiny_bundles.checkpoint(BASE)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """A valid adapter of every linear layer, to damage."""
    return lora(tmp_path / "adapter", base)
