"""The one line about a package that is not installed, and the command in it that installs the package."""

from __future__ import annotations

import shlex
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from shortstack import missing
from shortstack.missing import install_command, missing_dependency

RECORDED = [
    "numpy>=1.26",
    "onnxruntime>=1.29; extra == 'cpu'",
    'torch>=2.6; extra == "export"',
    "ml_dtypes>=0.4; extra == 'export'",
    "peft>=0.15 ; python_version >= '3.11' and extra == 'train'",
]


@pytest.fixture(autouse=True)
def pip_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: str(Path(sys.executable).parent / name))


def in_a_wheel(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(missing, "_ROOT", folder)
    monkeypatch.setattr(missing, "requires", lambda name: RECORDED)


def test_a_checkout_is_installed_with_its_extra(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    assert install_command(("export",)) == "pip install -e '.[export]'"
    assert install_command(("",)) == "pip install -e '.'"
    monkeypatch.chdir(repository.parent)
    assert shlex.split(install_command(("cpu", "train"))) == ["pip", "install", "-e", f"{repository}[cpu,train]"]


def test_an_installed_wheel_names_the_packages_themselves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    in_a_wheel(monkeypatch, tmp_path)
    assert install_command(("export",)) == "pip install 'torch>=2.6' 'ml_dtypes>=0.4'"
    assert install_command(("cpu", "train")) == "pip install 'onnxruntime>=1.29' 'peft>=0.15'"
    assert install_command(("",)) == "pip install 'numpy>=1.26'"


def test_a_copy_without_records_names_the_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unknown(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    in_a_wheel(monkeypatch, tmp_path)
    monkeypatch.setattr(missing, "requires", unknown)
    assert install_command(("export",)) == "pip install 'shortstack-VERSION-py3-none-any.whl[export]'"


def test_the_pip_of_another_interpreter_is_not_named(monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    monkeypatch.chdir(repository)
    for found in (None, "/somewhere/else/pip"):
        monkeypatch.setattr("shutil.which", lambda name, found=found: found)
        words = shlex.split(install_command(("cpu",)))
        assert words == [sys.executable, "-m", "pip", "install", "-e", ".[cpu]"]


def test_any_one_of_two_extras_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, repository: Path) -> None:
    monkeypatch.chdir(repository)
    error = missing_dependency("shortstack generate", ModuleNotFoundError(name="onnxruntime.capi"), also=("cpu",))
    assert str(error) == (
        "`shortstack generate` needs 'onnxruntime', which is not installed. "
        "Run: pip install -e '.[cpu]' or pip install -e '.[gpu,cpu]'"
    )


def test_a_module_of_no_extra_is_a_bug_and_not_explained() -> None:
    assert missing_dependency("shortstack export", ModuleNotFoundError(name="shortstack.nowhere")) is None
    assert missing_dependency("shortstack export", ModuleNotFoundError()) is None
