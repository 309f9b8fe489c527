"""What stderr says besides the progress of work that took longer than usual, as it may on a busy machine."""

from __future__ import annotations

import re

_LINE = re.compile(r"done in [\d:]+\n|[^\n]+: \d+%, [\d:]+ elapsed[^\n]*\n")


def without_progress(error: str) -> str:
    return _LINE.sub("", error)
