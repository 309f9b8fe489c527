"""The command that an error prints runs as it is printed."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

import shortstack
from shortstack.__main__ import run


@pytest.mark.parametrize("has_exits", [True, False])
def test_a_checkpoint_where_a_bundle_belongs_is_exported_and_decoded_by_the_printed_command(
    has_exits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shortstack.__file__).parent / "samples" / "checkpoints" / "commands-tiny"
    ignored = shutil.ignore_patterns() if has_exits else shutil.ignore_patterns("exits.*")
    shutil.copytree(source, tmp_path / "tiny", ignore=ignored)
    monkeypatch.chdir(tmp_path)
    assert run(["generate", "tiny", "turn on the light", "-n", "2", "--compare"]) == 2
    printed = capsys.readouterr().err.partition("Run: ")[2]
    commands = [shlex.split(line) for line in printed.split("&&")]
    assert [command[:2] for command in commands] == [["shortstack", "export"], ["shortstack", "generate"]]
    assert ("--exits" in commands[0]) is has_exits
    assert [run(command[1:]) for command in commands] == [0, 0]
    assert "identical output" in capsys.readouterr().out
