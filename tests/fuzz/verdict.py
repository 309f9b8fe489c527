"""Judges an outcome: refused in one line, right, or a fault."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from fuzz.child import Outcome

MAX_PEAK_BYTES = 1 << 30
"""Resident memory that a tiny model may need beyond that of the imported packages."""

REFUSED, ACCEPTED = "refused", "accepted"
_AFTER_TOKENS = "error: the model's output is not valid"
_OUR_LINES = ("warning:", "note:")
_LEAKS = re.compile(r"Traceback|\[[EW]:onnxruntime|Warning:|thread '.*' panicked|Segmentation|^\S*Error:", re.MULTILINE)


def judge(outcome: Outcome, folder: Path, base_bytes: int, *, streams: bool = False) -> str:
    """Return ``refused``, ``accepted``, or what is wrong with how a command ended.

    Args:
        outcome: How it ended.
        folder: The folder of the input, with ``in`` and what the command left.
        base_bytes: Resident memory of the process that it was forked from.
        streams: It prints tokens as they come, so that damaged weights may show after some.
    """
    lines = [line for line in outcome.error.splitlines() if line.strip()]
    errors = [line for line in lines if not line.startswith(_OUR_LINES)]
    left = sorted(p.name for p in folder.iterdir() if not p.name.startswith(("in", "out")))
    if outcome.code in (-signal.SIGXCPU, -signal.SIGALRM):
        return "hangs"
    if outcome.code < 0:
        return f"killed by {signal.Signals(-outcome.code).name}"
    if outcome.peak_bytes - base_bytes > MAX_PEAK_BYTES:
        return f"takes {(outcome.peak_bytes - base_bytes) >> 20} MB"
    if left:
        return f"leaves {', '.join(left)}"
    if _LEAKS.search(outcome.error):
        return "shows a traceback or a library's own lines"
    if outcome.code == 0:
        return ACCEPTED
    if outcome.code != 2:
        return f"exit code {outcome.code}"
    if len(errors) != 1 or not errors[0].startswith("error: "):
        return f"{len(errors)} lines for an error"
    if outcome.out and not (streams and errors[0].startswith(_AFTER_TOKENS)):
        return "refused, and wrote to stdout"
    if (folder / "out").exists():
        return "refused, and left its output"
    return REFUSED
