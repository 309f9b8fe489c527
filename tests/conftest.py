"""Fixtures for every test: seeds, the files of this repository, and the models that tests run."""

from __future__ import annotations

import os
import random
import sys
import tomllib
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shortstack.graphs.errors import ShortstackError
from shortstack.samples.fetch_model import default_model_path


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seeds every global generator from the test's name, so a test gives the same numbers alone and among others."""
    value = zlib.crc32(request.node.name.encode())
    random.seed(value)
    np.random.seed(value)  # libraries under test may use the global generator
    torch = sys.modules.get("torch")  # not imported here: most tests do without it
    if torch is not None:
        torch.manual_seed(value)
    return value


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout, which is also the folder of the package."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def pyproject(repository: Path) -> dict[str, Any]:
    return tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def package_folders(repository: Path, pyproject: dict[str, Any]) -> dict[str, Path]:
    """Package name -> folder, for every package that pyproject.toml lists."""
    setuptools = pyproject["tool"]["setuptools"]
    return {
        name: repository / setuptools["package-dir"].get(name, "/".join(name.split(".")[1:]))
        for name in setuptools["packages"]
    }


@pytest.fixture(scope="session")
def package_sources(package_folders: dict[str, Path]) -> list[Path]:
    """Every .py file that is shipped."""
    return sorted(path for folder in package_folders.values() for path in folder.glob("*.py"))


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a Q4_1 GGUF, fetched if need be. At home a missing network skips; in CI it fails."""
    try:
        return default_model_path()
    except ShortstackError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


# Fixtures made from the model (bundles, loaded models) go below.
