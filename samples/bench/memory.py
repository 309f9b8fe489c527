"""Memory of this process, as the kernel counts it. Standard library only: the other engine's process imports it too."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_PROC = Path("/proc/self")


def memory_now() -> dict[str, int]:
    """Return bytes: resident now, resident with shared pages divided by their users, the peak so far, and anonymous.

    The peak is VmHWM where there is one: ``ru_maxrss`` starts at the size of the process that forked this one.
    """
    status = _fields(_PROC / "status")
    rollup = _fields(_PROC / "smaps_rollup")
    maxrss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = status.get("VmHWM", maxrss if sys.platform == "darwin" else maxrss * 1024)
    rss = rollup.get("Rss", status.get("VmRSS", 0))
    anonymous = status.get("RssAnon", rss)
    found = {"rss_bytes": rss, "pss_bytes": rollup.get("Pss", rss), "peak_bytes": max(peak, rss)}
    return {**found, "anonymous_bytes": anonymous}


def _fields(path: Path) -> dict[str, int]:
    """Return the ``Name:  123 kB`` lines of a file in bytes; nothing where there is no such file."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    parts = [line.split() for line in lines if line.endswith(" kB")]
    return {name.rstrip(":"): int(value) * 1024 for name, value, _ in (p for p in parts if len(p) == 3)}
