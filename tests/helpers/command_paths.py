"""What the tests of wrong paths share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Says = Callable[..., str]


def make_folder(name: str, *files: str) -> None:
    """Make a folder in the current one, with files that hold an empty JSON object."""
    Path(name).mkdir(parents=True)
    for file in files:
        Path(name, file).write_text("{}", encoding="utf-8")
