"""Runs something in a forked process, with limits on memory and time, and sees what a user would see."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from helpers.forked import fork

TIME_LIMIT_S = 30
"""Processor time of one child. A sound input takes about a second."""

MEMORY_LIMIT_BYTES = 4 << 30
"""Address space that a child may add to what it was forked with."""


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
    pid = fork(work, out, error, partial(_limit, time_limit_s))
    _, status, usage = os.wait4(pid, 0)
    return Outcome(
        code=os.waitstatus_to_exitcode(status),
        out=out.read_text(encoding="utf-8", errors="replace"),
        error=error.read_text(encoding="utf-8", errors="replace"),
        elapsed_s=time.monotonic() - started,
        peak_bytes=usage.ru_maxrss * 1024,
    )


def _limit(time_limit_s: int) -> None:
    """Bounds the memory and the time of this process."""
    limit = _address_space() + MEMORY_LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (time_limit_s, time_limit_s + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(2 * time_limit_s)  # one that waits for ever uses no processor time


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()
