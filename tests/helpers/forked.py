"""Forks a process that runs one function, with its output in files; for the commands that damage inputs and kill runs.

The parent has imported the heavy packages once and has no threads, so that a run costs a fork and not an import.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

UNCAUGHT = 70
"""The exit code of a function that ended with an error."""


def fork(work: Callable[[], int], out: Path, error: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Run a function in a forked process and return the process's number at once.

    Args:
        work: Returns the exit code.
        out: Where file descriptor 1 goes, native libraries included.
        error: Where file descriptor 2 goes; the same file is shared.
        prepare: Called in the process first, such as to set limits. The process has a group of its own.
    """
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        _redirect(out, error)
        code = UNCAUGHT
        try:
            prepare()
            code = work()
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
        except BaseException:  # a panic of a native library is no Exception; all must be seen
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pid


def _redirect(out: Path, error: Path) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for path, descriptor, name in ((out, 1, "stdout"), (error, 2, "stderr")):
        if descriptor == 2 and error == out:
            os.dup2(1, 2)
        else:
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        setattr(sys, name, open(descriptor, "w", encoding="utf-8", errors="replace", closefd=False))  # noqa: SIM115
