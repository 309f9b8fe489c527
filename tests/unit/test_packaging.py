"""What is shipped: the list of packages, and a wheel built from these sources."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from shortstack import __version__

# Not part of the package, or made by tools.
OUTSIDE = {"tests", "build", "dist", "__pycache__"}
# Stands beside the code, for those who work on it.
FOR_DEVELOPERS = {".pyc", ".toml", ".md"}


def folders_with_code(repository: Path) -> set[str]:
    """Names of all packages that the folders hold, whatever pyproject.toml says."""
    names = set()
    for folder, subfolders, files in os.walk(repository):
        subfolders[:] = [name for name in subfolders if name not in OUTSIDE and not name.startswith(".")]
        if "__init__.py" in files:
            names.add(".".join(["shortstack", *Path(folder).relative_to(repository).parts]))
    return names


@pytest.fixture(scope="module")
def wheel(package_folders: dict[str, Path], repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline from a copy: in the checkout, setuptools would pack what an earlier build left."""
    folder = tmp_path_factory.mktemp("wheel")
    for package in package_folders.values():
        target = folder / "source" / package.relative_to(repository)
        target.mkdir(parents=True, exist_ok=True)
        for path in package.iterdir():
            if path.is_file():
                shutil.copy(path, target)
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(folder), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_every_folder_with_code_is_listed_as_a_package(repository: Path, package_folders: dict[str, Path]) -> None:
    ours = {name for name in package_folders if name.startswith("shortstack")}
    assert ours == folders_with_code(repository)


def test_the_wheel_holds_every_module_and_data_file(
    wheel: Path, repository: Path, package_folders: dict[str, Path], package_sources: list[Path]
) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    data = [
        path
        for folder in package_folders.values()
        for path in folder.iterdir()
        if folder != repository and path.is_file() and path.suffix not in FOR_DEVELOPERS
    ]
    folder_names = {folder: name.replace(".", "/") for name, folder in package_folders.items()}
    needed = {f"{folder_names[path.parent]}/{path.name}" for path in [*package_sources, *data]}
    assert needed <= packed, "add the missing ones to packages or package-data in pyproject.toml"
    assert "shortstack/py.typed" in packed
    assert not [name for name in packed if name.startswith(("shortstack/tests", "tests"))]


def test_the_wheel_carries_version_and_licence(wheel: Path, pyproject: dict[str, Any]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"shortstack-{__version__}.dist-info/METADATA").decode()
        assert f"shortstack-{__version__}.dist-info/licenses/LICENSE" in archive.namelist()
    assert f"\nVersion: {__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata


def test_the_wheel_starts_with_click_alone_beside_it(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    click = importlib.util.find_spec("click")
    assert click is not None
    assert click.origin is not None
    shutil.copytree(Path(click.origin).parent, tmp_path / "click")
    # -I -S: no site-packages, no environment; only the standard library and this folder.
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import shortstack.__main__ as m; sys.exit(m.run())"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout
