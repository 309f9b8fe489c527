"""Completion in shells: commands, options and values appear, and completing a command's name imports none of them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from shortstack.__main__ import COMMANDS, run

HEAVY = ("numpy", "onnxruntime", "tokenizers", "torch", "onnx", "rich")


def complete(words: str, position: int, program: str = "sys.exit(run())") -> subprocess.CompletedProcess[str]:
    environment = {"_SHORTSTACK_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(position)}
    script = f"import sys; from shortstack.__main__ import run; sys.argv[1:] = []; {program}"
    return subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def values(words: str, position: int) -> list[str]:
    done = complete(words, position)
    assert (done.returncode, done.stderr) == (0, "")
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_the_first_word_completes_to_commands() -> None:
    assert values("shortstack ", 1) == list(COMMANDS)
    assert values("shortstack c", 1) == ["calibrate", "completion"]


def test_a_dash_completes_to_options() -> None:
    assert values("shortstack --l", 1) == ["--log-level"]
    assert values("shortstack --log-level ", 2) == ["debug", "info", "warning"]
    assert {"--exit-layer", "--exits"} <= set(values("shortstack export --ex", 2))
    assert values("shortstack generate --strategy s", 3) == ["self-speculative"]


def test_completing_a_command_imports_nothing_heavy() -> None:
    program = (
        "import atexit; modules = [target.partition(':')[0] for target, _ in m.COMMANDS.values()]; "
        f"names = [*{HEAVY!r}, *modules]; "
        "atexit.register(lambda: print('imported', [n for n in names if n in sys.modules])); run()"
    )
    done = complete("shortstack ", 1, f"import shortstack.__main__ as m; {program}")
    assert done.stdout.splitlines() == [*(f"plain,{name}" for name in COMMANDS), "imported []"]


def test_a_command_whose_packages_are_missing_completes_to_nothing_without_a_message() -> None:
    done = complete("shortstack generate --st", 2, "sys.modules['onnxruntime'] = None; sys.exit(run())")
    assert (done.stdout, done.stderr) == ("", "")
    assert done.returncode == 2


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_asks_shortstack(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"_SHORTSTACK_COMPLETE={shell}_complete" in script
    assert "shortstack" in script


def test_bash_completes_with_the_script_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", "bash"]) == 0
    # A function stands in for the console script, which need not be installed here.
    script = f"""
        {capsys.readouterr().out}
        env() {{ local set=(); while [[ $1 == *=* ]]; do set+=("$1"); shift; done
                 command env "${{set[@]}}" {sys.executable} -m shortstack; }}
        COMP_WORDS=(shortstack generate --rep); COMP_CWORD=2
        _shortstack_completion shortstack generate --rep
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["--repetition-penalty", "--report"], done.stderr


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", "cmd"]) == 2
    assert "'cmd' is not one of 'bash', 'zsh', 'fish'" in capsys.readouterr().err
