"""Runs something in a forked process, with limits on memory and time, and sees what a user would see.

The parent has imported the heavy packages once, so that an input costs a fork and not an import.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TIME_LIMIT_S = 30
"""Processor time of one child. A sound input takes about a second."""

MEMORY_LIMIT_BYTES = 4 << 30
"""Address space that a child may add to what it was forked with."""

_UNCAUGHT = 70


@dataclass(frozen=True)
class Outcome:
    """How a forked process ended.

    Attributes:
        code: Its exit code; minus the signal that ended it.
        out: What it wrote to file descriptor 1.
        error: What it wrote to file descriptor 2, native libraries included.
        elapsed_s: Time until it ended, in seconds.
        peak_bytes: Its largest resident memory, in bytes.
    """

    code: int
    out: str
    error: str
    elapsed_s: float
    peak_bytes: int


def run_in_child(work: Callable[[], int], folder: Path, name: str, *, time_limit_s: int = TIME_LIMIT_S) -> Outcome:
    """Fork, call ``work`` with its output going to files, and wait for it.

    Args:
        work: Returns the exit code.
        folder: Where the output goes: ``NAME.out`` and ``NAME.err``.
        name: Stem of these files.
        time_limit_s: Processor time, and half of the waiting time, that it gets.
    """
    out, error = folder / f"{name}.out", folder / f"{name}.err"
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _become(out, error, time_limit_s)
        code = _UNCAUGHT
        try:
            code = work()
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status, usage = os.wait4(pid, 0)
    return Outcome(
        code=os.waitstatus_to_exitcode(status),
        out=out.read_text(encoding="utf-8", errors="replace"),
        error=error.read_text(encoding="utf-8", errors="replace"),
        elapsed_s=time.monotonic() - started,
        peak_bytes=usage.ru_maxrss * 1024,
    )


def _become(out: Path, error: Path, time_limit_s: int) -> None:
    """Turns this process into the child: its streams, its limits."""
    for path, descriptor in ((out, 1), (error, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    limit = _address_space() + MEMORY_LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (time_limit_s, time_limit_s + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(2 * time_limit_s)  # one that waits for ever uses no processor time


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()
