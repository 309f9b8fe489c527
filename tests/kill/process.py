"""Runs a command in a forked process, whole or until it is killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from helpers.forked import fork

KILLED = -signal.SIGKILL


def run_forked(work: Callable[[], int], log: Path, kill_after_s: float | None = None) -> int:
    """Run something in a forked process.

    Args:
        work: Returns the exit code.
        log: Where its output goes.
        kill_after_s: When to kill it with all of its children; None waits for its end.

    Returns:
        Its exit code; :data:`KILLED` if it was killed before its end.
    """
    pid = fork(work, log, log)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:  # it has ended, or is not yet a group of its own
            os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)
