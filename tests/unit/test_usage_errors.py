"""A command line that is not valid ends in one line, in the form of every other error; closed streams harm nothing."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.bad_input import Refused
from shortstack.__main__ import run


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["exprot", "x", "y"], ("no such command 'exprot'", "Did you mean export?")),
        (["generate"], ("missing argument 'BUNDLE'", "`shortstack generate --help` shows")),
        (["generate", "x", "y", "--strategy", "planin"], ("'planin' is not one of", "Did you mean plain?")),
        (["generate", "x", "y", "--strateg", "plain"], ("no such option '--strateg'", "'--strategy'")),
        (["export", "x", "y", "-e", "one"], ("'one' is not a valid integer", "`shortstack export --help`")),
        (["inspect", "a", "b", "c"], ("unexpected extra arguments (b c)",)),
        (["generate", "x", "y", "-n"], ("'-n' requires an argument",)),
        (["--foo"], ("no such option '--foo'", "`shortstack --help`")),
    ],
)
def test_a_command_line_that_is_not_valid_is_refused_in_one_line(
    refused: Refused, command: list[str], says: tuple[str, ...]
) -> None:
    refused(list(command), *says)


def test_the_bare_name_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    assert capsys.readouterr().err.startswith("Usage: shortstack")


def test_an_interrupted_command_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sound: Path
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shortstack.graphs.bundle.open_bundle", interrupt)
    capsys.readouterr()
    assert run(["inspect", str(sound)]) == 130
    assert capsys.readouterr().err.strip() == "interrupted"  # click ends the line of a ^C first


def test_too_little_memory_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, sound: Path, refused: Refused) -> None:
    def allocate(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("shortstack.graphs.bundle.open_bundle", allocate)
    refused(["inspect", sound], "there is not enough memory")


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_streams_harm_nothing(closed: tuple[int, ...], sound: Path, tmp_path: Path) -> None:
    """The next file that is opened would take the number of a closed stream, and get what is printed."""
    closing = " ".join(f"{number}{'<' if number == 0 else '>'}&-" for number in closed)
    command = [
        sys.executable,
        "-m",
        "shortstack",
        "quantize",
        sound,
        tmp_path / "out",
        "--method",
        "rtn",
        "--no-report",
    ]
    shell = f"{shlex.join(map(str, command))} {closing}"
    assert subprocess.run(shell, shell=True, check=False).returncode == 0
    assert run(["inspect", str(tmp_path / "out"), "--verify"]) == 0


def test_a_sample_refuses_in_the_same_form(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from shortstack.samples.bench.__main__ import main

    monkeypatch.setattr(sys, "argv", ["bench", "--no-such-option"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no such option '--no-such-option'")
    assert error.count("\n") == 1
