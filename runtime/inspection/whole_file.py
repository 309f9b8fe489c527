"""Writes a page, whole or not at all: under another name first, then renamed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from shortstack.graphs.errors import RequestError


def write_whole(text: str, path: Path, option: str) -> None:
    """Write a text file.

    Args:
        text: What it holds.
        path: The file; what is there is replaced.
        option: Of the command line, which named it.

    Raises:
        RequestError: It cannot be written; nothing half-written is left.
    """
    staging = path.parent / f".{path.name}.partial-{os.getpid()}"
    try:
        staging.write_text(text, encoding="utf-8")
        staging.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            staging.unlink()
        raise RequestError(f"{option} {path} cannot be written: {error}", remedy="choose another file") from None
