"""The one thread pool of a process, shared by all its onnxruntime sessions.

Pools of their own would spin and fight for cores. onnxruntime makes the pool once: whoever asks first decides its size.
"""

from __future__ import annotations

import os

import onnxruntime as ort

from shortstack.graphs.errors import RequestError

_MOST_THREADS = 1024
_pool_threads: int | None = None


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def make_thread_pool(threads: int | None = None) -> None:
    """Make the process's pool of threads; before its first session of whatever graph.

    Raises:
        RequestError: Another size than the process already has, or none that can be.
    """
    global _pool_threads
    if threads is not None and not 1 <= threads <= _MOST_THREADS:
        raise RequestError("threads", found=threads, expected=f"1..{_MOST_THREADS}", remedy="give the cores to use")
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
