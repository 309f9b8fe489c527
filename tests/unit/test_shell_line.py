"""Words of a printed command, quoted so that a shell reads them back."""

from __future__ import annotations

import subprocess

import pytest

from shortstack.graphs.path_kind import shell_line


@pytest.mark.parametrize("word", ["plain", "two words", "it's", "a\nb\t'c' \\ d", "é$HOME`x`", "\x1b[0m'\\''"])
def test_a_printed_command_reads_back_as_the_same_words(word: str) -> None:
    line = shell_line("generate", word)
    assert "\n" not in line
    done = subprocess.run(
        ["bash", "-c", f"shortstack() {{ printf '%s\\0' \"$@\"; }}; {line}"], capture_output=True, check=True
    )
    assert done.stdout.decode().split("\0")[:-1] == ["generate", word]
