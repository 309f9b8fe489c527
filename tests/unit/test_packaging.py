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
from shortstack.missing import ONLY_IN_THE_REPOSITORY

# Not part of the package, or made by tools.
OUTSIDE = {"tests", "build", "dist", "__pycache__"}
# Is next to the code, for those who work on it.
FOR_DEVELOPERS = {".pyc", ".toml", ".md"}
# Compressed. The wheel grows with each family and command; what it must not get by accident is data, or a module that
# nobody would read. Today texts, templates and metadata take 105 kB and the longest module 5.6.
MAX_BYTES_BESIDES_CODE = 110_000
MAX_BYTES_OF_A_MODULE = 6_000


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
    wheel: Path, repository: Path, package_folders: dict[str, Path], pyproject: dict[str, Any]
) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    left_out = set(pyproject["tool"]["shortstack"]["not-in-the-wheel"])
    needed = {
        f"{name.replace('.', '/')}/{path.name}"
        for name, folder in package_folders.items()
        for path in folder.iterdir()
        if path.suffix == ".py" or (folder != repository and path.is_file() and path.suffix not in FOR_DEVELOPERS)
        if name not in left_out
    }
    assert needed <= packed, "add the missing ones to packages or package-data in pyproject.toml"
    assert "shortstack/py.typed" in packed
    assert not [name for name in packed if name.startswith(("shortstack/tests", "tests"))]


def test_what_a_device_does_not_need_stays_out_of_the_wheel(
    wheel: Path, package_folders: dict[str, Path], pyproject: dict[str, Any]
) -> None:
    packed = zipfile.ZipFile(wheel).namelist()
    left_out = pyproject["tool"]["shortstack"]["not-in-the-wheel"]
    assert not set(left_out) & set(pyproject["tool"]["setuptools"]["packages"])
    assert all(package_folders[name].is_dir() for name in left_out)
    assert {name.split(".")[2] for name in left_out} == set(ONLY_IN_THE_REPOSITORY)
    assert not [name for name in packed if name.startswith(tuple(f"{n.replace('.', '/')}/" for n in left_out))]
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.compress_size for entry in archive.infolist()}
    modules = {name: size for name, size in sizes.items() if name.endswith(".py")}
    assert {name: size for name, size in modules.items() if size > MAX_BYTES_OF_A_MODULE} == {}
    assert sum(sizes.values()) - sum(modules.values()) < MAX_BYTES_BESIDES_CODE


@pytest.mark.parametrize("command", ["bench", "recipes.layerskip", "showcase.answers"])
def test_a_command_that_is_not_in_the_wheel_says_where_it_is(wheel: Path, tmp_path: Path, command: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    line = [sys.executable, "-S", "-m", f"shortstack.samples.{command}", "--help"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=tmp_path, env={})
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"error: shortstack.samples.{command} is in the repository and not in the wheel. Run "
    )
    assert done.stderr.count("\n") == 1


def test_the_wheel_carries_version_and_licence(wheel: Path, pyproject: dict[str, Any]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"shortstack-{__version__}.dist-info/METADATA").decode()
        assert f"shortstack-{__version__}.dist-info/licenses/LICENSE" in archive.namelist()
    assert f"\nVersion: {__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata


def test_the_wheel_starts_with_click_as_its_only_neighbour(wheel: Path, tmp_path: Path) -> None:
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
