"""The files of :mod:`shortstack.samples.recipes.self_data`: prompts in, rows out, one by one and never half of one.

::

    OUT.jsonl                  one JSON object a line, only ever appended to
    OUT.jsonl.settings.json    what its rows depend on, written before the first of them
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from shortstack.graphs.errors import RequestError

FIELDS = ("prompt", "question", "turns", "utterance")
_START_AGAIN = "name another file, or begin again with --overwrite"


class RowFile:
    """A file of rows that a killed run leaves readable, but for at most one torn line, which is dropped.

    Use it as a context manager.

    Args:
        path: The file.
        settings: What its rows depend on; those of a file that is there must be the same.
        overwrite: Begin again, whatever is there.

    Attributes:
        rows: Complete rows in the file.

    Raises:
        RequestError: The file was begun with other settings, was not made here, or is damaged.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self._path = path
        self._settings_file = path.with_name(f"{path.name}.settings.json")
        self.rows = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if overwrite:
                path.unlink(missing_ok=True)
                self._settings_file.unlink(missing_ok=True)
            if path.exists() or self._settings_file.exists():
                self._compare(settings)
            if path.exists():
                self.rows = self._recover()
            self._write_settings(settings)
            self._stream = path.open("ab")
        except OSError as error:
            raise RequestError(f"{path} cannot be written ({error})", remedy="name another file") from None

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row, on the disk before this returns."""
        self._stream.write(json.dumps(row, separators=(",", ":")).encode() + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.rows += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stream.close()

    def _compare(self, settings: Mapping[str, Any]) -> None:
        if not self._settings_file.exists():
            raise RequestError(
                f"{self._path} has no {self._settings_file.name} next to it, so it was not made here",
                remedy=_START_AGAIN,
            )
        try:
            before = json.loads(self._settings_file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            before = None
        if not isinstance(before, dict):
            raise RequestError(f"{self._settings_file} is damaged", remedy=_START_AGAIN)
        differences = [
            f"{key} was {before.get(key)} and is {settings.get(key)}"
            for key in sorted(before.keys() | settings.keys())
            if before.get(key) != settings.get(key)
        ]
        if differences:
            raise RequestError(
                f"{self._path} was begun with other settings: {'; '.join(differences)}", remedy=_START_AGAIN
            )

    def _recover(self) -> int:
        """Count the rows and cut off what follows the last complete line."""
        rows, end = 0, 0
        with self._path.open("r+b") as stream:
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                if not _is_row(line):
                    raise RequestError(f"{self._path}, line {rows + 1} is damaged", remedy=_START_AGAIN)
                rows, end = rows + 1, end + len(line)
            stream.truncate(end)
        return rows

    def _write_settings(self, settings: Mapping[str, Any]) -> None:
        partial = self._settings_file.with_name(f"{self._settings_file.name}.partial")
        partial.write_text(json.dumps(dict(settings), indent=2) + "\n", encoding="utf-8")
        partial.replace(self._settings_file)


def _is_row(line: bytes) -> bool:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and row.keys() == {"p", "o", "k"}


def read_prompts(path: Path, field: str | None = None) -> list[str]:
    """Read prompts: one JSON object a line, or one line of plain text each. Empty lines are left out.

    Args:
        path: The file; JSON if it begins with a brace.
        field: The field of a row that holds its prompt, a string or a list whose first string is taken (``turns`` and
            ``turns[0]`` are the same); None takes the first of ``FIELDS`` that the row has.

    Raises:
        RequestError: The file cannot be read, holds nothing, or a row has no such field.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--prompts {path} cannot be read ({error})", remedy="give a UTF-8 text file") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise RequestError(f"--prompts {path} holds no prompt", remedy="write one prompt per line")
    if not numbered[0][1].lstrip().startswith("{"):
        if field is not None:
            raise RequestError(f"--field names a field of JSON lines, and {path} is plain text", remedy="drop --field")
        return [line.strip() for _, line in numbered]
    wanted = FIELDS if field is None else (field.removesuffix("[0]"),)
    return [_prompt_of(line, wanted, f"--prompts {path}, line {number}") for number, line in numbered]


def _prompt_of(line: str, wanted: tuple[str, ...], where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is not JSON ({error})", remedy="write one JSON object per line") from None
    value = next((row[name] for name in wanted if name in row), None) if isinstance(row, dict) else None
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str) or not value.strip():
        raise RequestError(
            f"{where} holds no prompt", expected=f"text in {' or '.join(wanted)}", remedy="name the field with --field"
        )
    return value
