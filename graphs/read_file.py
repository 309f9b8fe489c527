"""Reads files that may be hostile: regular ones alone, of a bounded size, and JSON whatever its encoding or depth.

For every room: checkpoints, bundles and texts are read through here. What is wrong becomes the error that the caller
names, so that a damaged bundle is a BundleError and a damaged checkpoint a CheckpointError.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from shortstack.graphs.errors import ShortstackError

MAX_TEXT_BYTES = 256 << 20
"""The largest text file that is read. Tokenizers of 260,000 tokens take 35 MB."""

MAX_DEPTH = 64
"""The deepest JSON that is read. What Python's reader just survives, its writer and ``repr`` may not."""


def read_file(
    path: Path | str, error: type[ShortstackError], remedy: str | None = None, *, limit: int = MAX_TEXT_BYTES
) -> bytes:
    """Return the content of a regular file; links are followed, and nothing is read before the size is known.

    Args:
        path: The file.
        error: The class of the error for a file that cannot be read.
        remedy: What to do then.
        limit: The largest size in bytes.

    Raises:
        ShortstackError: Of class ``error``: it cannot be opened, is a folder, a pipe or a device, or is too large.
    """
    descriptor, size = _open_regular(path, error, remedy)
    with os.fdopen(descriptor, "rb") as file:
        if size > limit:
            raise error(f"{path} is too large", found=f"{size} bytes", expected=f"at most {limit}", remedy=remedy)
        try:
            content = file.read(limit + 1)
        except OSError as reason:
            raise error(f"{path} cannot be read ({reason.strerror})", remedy=remedy) from None
    if len(content) > limit:  # it grew
        raise error(f"{path} is too large", expected=f"at most {limit} bytes", remedy=remedy)
    return content


def read_text(
    path: Path | str, error: type[ShortstackError], remedy: str | None = None, *, called: str | None = None
) -> str:
    """Return the content of a text file that people write or pipe in: UTF-8, with or without a byte order mark.

    A pipe is read, too, up to the limit.

    Args:
        path: The file.
        error: The class of the error for a file that cannot be read.
        remedy: What to do then.
        called: What messages call it, such as an option and the file; by default the file.

    Raises:
        ShortstackError: Of class ``error``: the file cannot be read, is too large, or is not UTF-8.
    """
    where = path if called is None else called
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_TEXT_BYTES + 1)
    except (OSError, ValueError) as reason:  # ValueError: a null byte in the name
        raise error(f"{where} cannot be read ({_of(reason)})", remedy=remedy) from None
    if len(content) > MAX_TEXT_BYTES:
        raise error(f"{where} is too large", expected=f"at most {MAX_TEXT_BYTES} bytes of text", remedy=remedy)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        raise error(f"{where} is not UTF-8 text ({reason})", remedy=remedy) from None


def parse_json(content: bytes | str, where: Path | str, error: type[ShortstackError], remedy: str | None = None) -> Any:
    """Return the value of a JSON text in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Args:
        content: The text.
        where: What messages call it: its file, or a line of it.
        error: The class of the error for a text that is not JSON.
        remedy: What to do then.

    Raises:
        ShortstackError: Of class ``error``: it is not JSON, is nested too deeply, or holds half of a character.
    """
    try:
        if isinstance(content, bytes):
            content = content.decode(json.detect_encoding(content))
        value = json.loads(content.removeprefix("\ufeff"))
        if _is_deeper(value, MAX_DEPTH):
            raise RecursionError
        if "\\ud" in content or "\\uD" in content:  # may spell half of a character, which nothing could write again
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise error(f"{where} is nested too deeply", remedy=remedy) from None
    except UnicodeEncodeError:
        raise error(f"{where} holds half of a character, such as \\ud800", remedy=remedy) from None
    except ValueError as reason:
        raise error(f"{where} is not valid JSON ({reason})", remedy=remedy) from None
    return value


def parse_json_object(
    content: bytes | str, where: Path | str, error: type[ShortstackError], remedy: str | None = None
) -> dict[str, Any]:
    """Return the object of a JSON text; errors as in :func:`parse_json`, and for a text that holds no object."""
    value = parse_json(content, where, error, remedy)
    if not isinstance(value, dict):
        raise error(f"{where}", found=f"a JSON {type(value).__name__}", expected="a JSON object", remedy=remedy)
    return value


def read_json_object(path: Path | str, error: type[ShortstackError], remedy: str | None = None) -> dict[str, Any]:
    """Return the object of a JSON file; errors as in :func:`read_file` and :func:`parse_json_object`."""
    return parse_json_object(read_file(path, error, remedy), path, error, remedy)


def _is_deeper(value: object, limit: int) -> bool:
    """Return whether lists and objects are nested more deeply than a limit; without recursion."""
    level: list[object] = [value]
    for _ in range(limit):
        inner: list[object] = []
        for each in level:
            entries = each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
            inner.extend(entry for entry in entries if isinstance(entry, dict | list))
        level = inner
    return bool(level)


def _open_regular(path: Path | str, error: type[ShortstackError], remedy: str | None) -> tuple[int, int]:
    """Open a file, without waiting for one that is a pipe; return its descriptor and its size in bytes."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as reason:
        raise error(f"{path} cannot be read ({_of(reason)})", remedy=remedy) from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise error(f"{path}", found=kind, expected="a regular file", remedy=remedy)
    return descriptor, status.st_size


def _of(reason: OSError | ValueError) -> str:
    return (reason.strerror if isinstance(reason, OSError) else None) or str(reason)
