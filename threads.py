"""The threads of onnxruntime's sessions: one pool of the process for all of them, or a pool for each.

Pools of their own would spin and fight for cores where sessions take turns, so the process has one; onnxruntime makes
it once, and whoever asks first decides its size. Sessions that run at the same time may want a pool each; then the
process has none: onnxruntime knows either the one or the other.
"""

from __future__ import annotations

import os

import onnxruntime as ort

from shortstack.graphs.errors import RequestError

_MOST_THREADS = 1024
_pool_threads: int | None = None
_has_own_pools = False


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def make_thread_pool(threads: int | None = None) -> None:
    """Make the process's pool of threads; before its first session of whatever graph.

    Nothing happens in a process whose sessions have pools of their own.

    Raises:
        RequestError: Another size than the process already has, or none that can be.
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
            "threads: onnxruntime's pool is made once per process",
            found=threads,
            expected=_pool_threads,
            remedy="start another process for another thread count",
        )


def use_own_pools() -> None:
    """Give the sessions of this process a pool each from now on; before its first session of whatever graph.

    Raises:
        RequestError: The process has a common pool already.
    """
    global _has_own_pools
    if _pool_threads is not None:
        raise RequestError(
            "threads of the upper segments: this process has one pool for all of onnxruntime already",
            remedy="ask for them before anything else is loaded, or start another process",
        )
    _has_own_pools = True


def session_options(threads: int | None = None) -> ort.SessionOptions:
    """Return options for a session on the process's pool, or on one of its own of so many threads (None: all cores).

    Raises:
        RequestError: A number of threads that cannot be.
    """
    _check_count(threads)
    options = ort.SessionOptions()
    options.use_per_session_threads = _has_own_pools
    if _has_own_pools:
        options.intra_op_num_threads = threads or usable_cores()
        options.inter_op_num_threads = 1
    return options


def _check_count(threads: int | None) -> None:
    if threads is not None and not 1 <= threads <= _MOST_THREADS:
        raise RequestError("threads", found=threads, expected=f"1..{_MOST_THREADS}", remedy="give the cores to use")
