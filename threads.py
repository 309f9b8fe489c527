"""The threads of onnxruntime's sessions.

The rule: the first load of a process decides how many threads there are. Later loads leave ``threads`` out or repeat
the number; another number needs another process.

Why: sessions take turns, and pools of their own would spin and fight for cores. So the process has one pool for all of
them, and onnxruntime makes it once. Sessions that run at the same time may want a pool each. Then the process has no
common pool, since onnxruntime knows either the one or the other, and each load decides for its own sessions.
"""

from __future__ import annotations

import onnxruntime as ort

from shortstack.cores import usable_cores
from shortstack.graphs.arguments import expect, is_whole
from shortstack.graphs.errors import RequestError

_MOST_THREADS = 1024
_pool_threads: int | None = None
_has_own_pools = False


def make_thread_pool(threads: int | None = None) -> None:
    """Make the process's pool of threads if it has none yet; must come before the first session of any graph.

    Nothing happens in a process whose sessions have pools of their own.

    Args:
        threads: How many. None takes the pool as it is, or makes one with a thread for each usable core.

    Raises:
        RequestError: The pool has another size already, or the number is not valid.
    """
    global _pool_threads
    _check_count(threads)
    if _has_own_pools:
        return
    if _pool_threads is None:
        _pool_threads = threads or usable_cores()
        ort.set_global_thread_pool_sizes(_pool_threads, 1)
    elif threads is not None and threads != _pool_threads:
        raise RequestError(
            "threads: the first load of this process has decided how many there are",
            found=threads,
            expected=_pool_threads,
            remedy=f"leave threads out, give {_pool_threads} again, or start another process",
        )


def common_threads() -> int | None:
    """Return the size of the process's pool; None before it is made, and where sessions have pools of their own."""
    return _pool_threads


def use_own_pools() -> None:
    """Give each session of this process its own pool from now on; must come before the first session of any graph.

    Raises:
        RequestError: The process has a common pool already.
    """
    global _has_own_pools
    if _pool_threads is not None:
        raise RequestError(
            "threads of the upper segments: the first load of this process has made one pool for all sessions",
            remedy="ask for them in the first load, or start another process",
        )
    _has_own_pools = True


def session_options(threads: int | None = None) -> ort.SessionOptions:
    """Return options for a session on the process's pool, or on a pool of its own.

    Args:
        threads: Threads of its own pool; None: all usable cores.

    Raises:
        RequestError: The number is not valid.
    """
    _check_count(threads)
    options = ort.SessionOptions()
    options.use_per_session_threads = _has_own_pools
    if _has_own_pools:
        options.intra_op_num_threads = threads or usable_cores()
        options.inter_op_num_threads = 1
    return options


def describe_threads(lower: int | None, upper: int | None) -> str:
    """Return what threads the sessions of a load have, for the log; arguments as for :func:`session_options`."""
    if not _has_own_pools:
        return str(_pool_threads)
    return f"{lower or usable_cores()} below, {upper or usable_cores()} above"


def _check_count(threads: int | None) -> None:
    is_right = threads is None or is_whole(threads, 1, _MOST_THREADS)
    expect(is_right, "threads", threads, f"1..{_MOST_THREADS}", "give --threads (threads=) the number of cores to use")
