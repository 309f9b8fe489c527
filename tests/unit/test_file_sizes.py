"""Rooms stay small: a file that outgrows the limit has more than one reason to change, and is split by reason."""

from __future__ import annotations

from pathlib import Path

MAX_LINES = 400


def test_no_file_of_the_package_is_longer_than_the_limit(repository: Path, package_sources: list[Path]) -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in package_sources}
    too_long = {str(path.relative_to(repository)): count for path, count in lines.items() if count > MAX_LINES}
    assert not too_long
