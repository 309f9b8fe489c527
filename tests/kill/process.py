"""Runs a command in a forked process, whole or until it is killed.

The parent has imported the heavy packages once and has no threads, so a run costs a fork and not an import.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

KILLED = -signal.SIGKILL


def run_forked(work: Callable[[], int], log: Path, kill_after_s: float | None = None) -> int:
    """Run something in a forked process with a process group of its own.

    Args:
        work: Returns the exit code.
        log: Where its output goes.
        kill_after_s: When to kill it with all of its children; None waits for its end.

    Returns:
        Its exit code; :data:`KILLED` if it was killed before its end.
    """
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, 1)
        os.dup2(opened, 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        code = 70
        try:
            code = work()
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:  # it has ended, or is not yet a group of its own
            os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)
