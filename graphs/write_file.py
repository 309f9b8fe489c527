"""Writes a file that the user named: whole or not at all, through links, and straight into a pipe or a device."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

from shortstack.graphs.errors import ShortstackError


def write_whole(path: Path, content: bytes, error: type[ShortstackError], called: str) -> None:
    """Write a file under another name first, then rename it; a link stays one, and its target is replaced.

    A pipe or a device, such as ``/dev/stdout``, is written to as it is and never replaced.

    Args:
        path: The file.
        content: What it will hold.
        error: The class of the error for a file that cannot be written.
        called: What messages call it: an option and the file.

    Raises:
        ShortstackError: Of class ``error``: it is a folder, or it cannot be written; nothing half-written is left.
    """
    try:
        if _is_stream(path):
            with open(path, "wb", buffering=0) as stream:
                stream.write(content)
        else:
            replace_file(Path(os.path.realpath(path)), content)
    except (OSError, ValueError) as reason:  # ValueError: a null byte in the name
        why = (reason.strerror if isinstance(reason, OSError) else None) or str(reason)
        raise error(f"{called} cannot be written ({why})", remedy="choose another file") from None


def replace_file(path: Path, content: bytes) -> None:
    """Write a regular file under another name first, so that its own name never stands for half of it.

    The other name can be guessed, so what has it already is removed and never written through. A link at ``path`` is
    replaced, and not followed.

    Raises:
        OSError: It cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.unlink(missing_ok=True)  # of a killed process, or a planted link: a link is removed, not its target
    try:
        with open(partial, "xb", opener=_open_new) as file:
            file.write(content)
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _open_new(path: str, flags: int) -> int:
    """Open a file as the mode x does (O_CREAT | O_EXCL), and refuse links where a file system forgets to."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _is_stream(path: Path) -> bool:
    """Whether a path is written to as it is: a pipe, a device, or an open file of this process.

    Raises:
        OSError: It is a folder, or cannot be looked at.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    return not stat.S_ISREG(mode) or os.path.abspath(path).startswith(("/dev/", "/proc/"))
