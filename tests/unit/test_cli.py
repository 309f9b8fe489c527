"""The command line as a whole: the table, exit codes, one-line errors. Each command has tests of its own."""

from __future__ import annotations

import importlib
import platform
import subprocess
import sys
import types
from collections.abc import Callable

import click
import pytest

from shortstack import __main__, __version__
from shortstack.graphs.errors import BundleError, ContractError, ParityError
from shortstack.missing import install_command

AddCommand = Callable[[Callable[[], object]], None]


@pytest.fixture
def add_command(monkeypatch: pytest.MonkeyPatch) -> AddCommand:
    """Puts a command called ``probe`` into the table that calls the given function."""

    def add(action: Callable[[], object]) -> None:
        module = types.ModuleType("shortstack_probe")
        module.probe = click.command("probe")(action)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "shortstack_probe", module)
        monkeypatch.setitem(__main__.COMMANDS, "probe", ("shortstack_probe:probe", "A command for tests."))

    return add


def raising(error: BaseException) -> Callable[[], object]:
    def action() -> object:
        raise error

    return action


def test_version_names_shortstack_and_python(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.run(["--version"]) == 0
    assert capsys.readouterr().out == f"shortstack {__version__} (Python {platform.python_version()})\n"


def test_help_shows_the_summary_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.run(["--help"]) == 0
    help_text = " ".join(capsys.readouterr().out.split())
    for command, (_, summary) in __main__.COMMANDS.items():
        assert f"{command} {summary}" in help_text


def test_an_unknown_command_is_a_misuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.run(["exprot"]) == 2
    assert "no such command 'exprot'" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(BundleError("no bundle"), 2), (ParityError("they disagree"), 1)])
def test_an_error_is_one_line_on_stderr_and_sets_its_exit_code(
    error: Exception, code: int, add_command: AddCommand, capsys: pytest.CaptureFixture[str]
) -> None:
    add_command(raising(error))
    assert __main__.run(["probe"]) == code
    assert capsys.readouterr() == ("", f"error: {error}\n")


def test_an_error_of_several_lines_is_joined_into_one(
    add_command: AddCommand, capsys: pytest.CaptureFixture[str]
) -> None:
    add_command(raising(ContractError("two differences\n  missing  a\n  extra    b")))
    assert __main__.run(["probe"]) == 2
    assert capsys.readouterr().err == "error: two differences; missing  a; extra    b\n"


def test_debug_shows_the_traceback(add_command: AddCommand) -> None:
    add_command(raising(BundleError("no bundle")))
    with pytest.raises(BundleError):
        __main__.run(["--debug", "probe"])


def test_an_interrupt_has_the_exit_code_of_a_signal(add_command: AddCommand) -> None:
    add_command(raising(KeyboardInterrupt()))
    assert __main__.run(["probe"]) == 130


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (3, 3)])
def test_a_command_may_return_its_exit_code(result: int | None, code: int, add_command: AddCommand) -> None:
    add_command(lambda: result)
    assert __main__.run(["probe"]) == code


def test_a_missing_package_is_reported_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = __main__.COMMANDS["export"][0].partition(":")[0]
    monkeypatch.delitem(sys.modules, module, raising=False)
    original = importlib.import_module

    def import_module(name: str, package: str | None = None) -> types.ModuleType:
        if name == module:
            raise ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn")
        return original(name, package)

    monkeypatch.setattr(importlib, "import_module", import_module)
    assert __main__.run(["export", "checkpoint", "bundle"]) == 2
    expected = f"`shortstack export` needs 'torch', which is not installed. Run: {install_command(('export',))}"
    assert capsys.readouterr().err == f"error: {expected}\n"


def test_a_missing_package_that_a_command_imports_late_is_reported_too(
    add_command: AddCommand, capsys: pytest.CaptureFixture[str]
) -> None:
    add_command(raising(ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")))
    assert __main__.run(["probe"]) == 2
    said = capsys.readouterr().err
    assert "needs 'onnxruntime'" in said
    assert f"Run: {install_command(('cpu',))} or {install_command(('gpu',))}" in said


def test_a_missing_module_that_belongs_to_no_extra_is_a_bug_and_is_not_hidden(add_command: AddCommand) -> None:
    add_command(raising(ModuleNotFoundError("No module named 'shortstack.lost'", name="shortstack.lost")))
    with pytest.raises(ModuleNotFoundError, match="lost"):
        __main__.run(["probe"])


def test_python_m_shortstack_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "shortstack", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"shortstack {__version__} ")


def test_a_closed_pipe_prints_no_traceback() -> None:
    # `true` reads nothing: what is written after it has gone meets a closed pipe.
    shell = f'(sleep 0.3; "{sys.executable}" -m shortstack --help) | true'
    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True)
    assert done.stderr == ""
