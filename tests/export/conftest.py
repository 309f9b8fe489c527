"""Fixtures for the tests of bad input: a command line that must be refused, and files to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from helpers.adapters import lora
from helpers.bad_input import MAX_LENGTH, Refused
from helpers.kv_bundles import KVBundles
from helpers.quantized import QuantizedBundles
from helpers.tiny_models import BASE, TinyBundles
from shortstack.__main__ import run
from shortstack.runtime import Model, load


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command line that must be refused: exit code 2, nothing on stdout, one line on stderr with these words."""

    def refused(arguments: list[str | Path], *says: str) -> str:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        out, error = capsys.readouterr()
        assert code == 2, error
        assert out == ""
        assert error.startswith("error: ")
        assert error.count("\n") == 1, error
        assert "Traceback" not in error
        for words in says:
            assert words in error, error
        return error

    return refused


@pytest.fixture
def checkpoint(tiny_bundles: TinyBundles, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(tiny_bundles.checkpoint(BASE), tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> QuantizedBundles:
    return QuantizedBundles(tmp_path_factory.mktemp("quantized"))


@pytest.fixture(scope="session")
def kv_bundles(tmp_path_factory: pytest.TempPathFactory) -> KVBundles:
    return KVBundles(tmp_path_factory.mktemp("kv"))


@pytest.fixture(scope="module")
def sound(tiny_bundles: TinyBundles) -> Path:
    return tiny_bundles.bundle(BASE, 1, 3, draft_vocab=64, max_length=MAX_LENGTH)


@pytest.fixture
def bundle(sound: Path, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(sound, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def model(sound: Path) -> Model:
    return load(sound)


@pytest.fixture(scope="module")
def base(tiny_bundles: TinyBundles) -> Path:
    """A checkpoint to adapt."""
    return tiny_bundles.checkpoint(BASE)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """A valid adapter of every linear layer, to damage."""
    return lora(tmp_path / "adapter", base)
