"""A checkpoint and an adapter to damage, for the tests of bad input, and the quantized folders of two files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from helpers.adapters import lora
from helpers.tiny_models import BASE, TinyBundles

if TYPE_CHECKING:  # every family is imported only when a test asks for them
    from helpers.quantized_cases import Folders


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


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Quantized folders and their bundles; not to be changed."""
    from helpers.quantized_cases import Folders

    return Folders(tmp_path_factory.mktemp("quantized-folders"))
