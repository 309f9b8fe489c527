"""Fixtures for every test: seeds, the files of this repository, and the models that tests run."""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import shutil
import sys
import tomllib
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pytest

from helpers.bad_input import MAX_LENGTH, Refused
from shortstack.__main__ import run
from shortstack.graphs.errors import ShortstackError
from shortstack.samples.fetch_model import default_model_path

if TYPE_CHECKING:  # fixtures import torch and transformers only when a test asks for them
    from helpers.kv_bundles import KVBundles
    from helpers.quantized import QuantizedBundles
    from helpers.tiny_models import TinyBundles
    from shortstack.export.parity.reference import Reference


def pytest_configure() -> None:
    """Gives each of several test processes cores of its own.

    onnxruntime and torch then start one thread a core: threads that share a core spin and wait for each other.
    """
    worker, count = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if worker is not None and hasattr(os, "sched_setaffinity"):  # Linux only
        index, cores = int(worker.removeprefix("gw")), sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[index::count] or [cores[index % len(cores)]])


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
    """Package name -> folder, for every package that pyproject.toml lists, in the wheel or not."""
    setuptools, own = pyproject["tool"]["setuptools"], pyproject["tool"]["shortstack"]
    return {
        name: repository / setuptools["package-dir"].get(name, "/".join(name.split(".")[1:]))
        for name in [*setuptools["packages"], *own["not-in-the-wheel"]]
    }


@pytest.fixture(scope="session")
def package_sources(package_folders: dict[str, Path]) -> list[Path]:
    """Every .py file of the packages, in the wheel or not."""
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


@pytest.fixture(scope="session")
def tiny_bundles(tmp_path_factory: pytest.TempPathFactory) -> TinyBundles:
    from helpers.tiny_models import TinyBundles

    return TinyBundles(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def kv_bundles(tmp_path_factory: pytest.TempPathFactory) -> KVBundles:
    from helpers.kv_bundles import KVBundles

    return KVBundles(tmp_path_factory.mktemp("kv"))


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> QuantizedBundles:
    from helpers.quantized import QuantizedBundles

    return QuantizedBundles(tmp_path_factory.mktemp("quantized"))


@pytest.fixture(scope="module")
def sound(tiny_bundles: TinyBundles) -> Path:
    from helpers.tiny_models import BASE

    return tiny_bundles.bundle(BASE, 1, 3, draft_vocab=64, max_length=MAX_LENGTH)


@pytest.fixture
def bundle(sound: Path, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(sound, tmp_path / "bundle"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command line that must be refused: exit code 2, nothing on stdout, one line on stderr with these words."""

    def refused(arguments: list[str | Path], *says: str) -> str:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        out, error = capsys.readouterr()
        assert code == 2, error
        assert out == ""
        # Before it, a slow machine may have said how far it was.
        *progress, line = error.splitlines()
        assert line.startswith("error: "), error
        assert all("elapsed" in each for each in progress), error
        assert "Traceback" not in error
        for words in says:
            assert words in error, error
        return error

    return refused


@pytest.fixture
def one_torch_thread() -> Iterator[Callable[[], None]]:
    """Call it after making a Reference: on tiny models torch's threads only wait, and fight those of onnxruntime."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda: torch.set_num_threads(1)
    torch.set_num_threads(before)


class Kept(Protocol):
    """Makes a bundle once and keeps it in .cache/ until a source file in one of the rooms, or a setting, changes."""

    def __call__(self, name: str, rooms: tuple[str, ...], settings: object, make: Callable[[Path], object]) -> Path: ...


@pytest.fixture(scope="session")
def kept(package_sources: list[Path], repository: Path) -> Kept:
    def kept(name: str, rooms: tuple[str, ...], settings: object, make: Callable[[Path], object]) -> Path:
        digest = hashlib.sha256(repr(settings).encode())
        for path in package_sources:
            if path.relative_to(repository).as_posix().startswith(rooms):
                digest.update(path.read_bytes())
        home = repository / ".cache" / "tests"
        out = home / f"{name}-{digest.hexdigest()[:16]}"
        home.mkdir(parents=True, exist_ok=True)
        with (home / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one of several test processes makes it, the others wait
            if not (out / "bundle.json").is_file():
                for old in home.glob(f"{name}-*"):  # 100 to 540 MB each
                    shutil.rmtree(old, ignore_errors=True)
                make(out)
        return out

    return kept


@pytest.fixture(scope="session")
def smollm2_bundle(smollm2_gguf: Path, kept: Kept) -> Path:
    """SmolLM2-135M-Instruct in float32, cut at 4, 8 and 15."""
    from shortstack.export.assemble import export_bundle
    from shortstack.export.spec import ExportSpec

    exits = (4, 8, 15)
    return kept(
        "smollm2-float",
        ("graphs/", "export/"),
        (smollm2_gguf.name, exits, "genai"),
        lambda out: export_bundle(ExportSpec(str(smollm2_gguf), out, exits, overwrite=True, genai=True)),
    )


@pytest.fixture(scope="session")
def smollm2_reference(smollm2_gguf: Path) -> Reference:
    """transformers' own model of the same file."""
    from shortstack.export.parity.reference import Reference

    return Reference(str(smollm2_gguf))
