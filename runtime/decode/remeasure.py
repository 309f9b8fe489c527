"""When to measure the slower of two ways again: after 8, 16, 32, ... and then every 256 choices.

So neither one slow run nor one hard passage decides a whole generation. The longer a result stands, the less often
checking it costs time.
"""

from __future__ import annotations

_FIRST_WAIT = 8
_LAST_WAIT = 256


class Remeasure:
    """Counts the choices between two ways of decoding."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start over with the shortest wait, because the other way is faster now."""
        self._left = self._wait = _FIRST_WAIT

    def is_due(self) -> bool:
        """Count one choice; return whether to take the slower way this time."""
        if self._left:
            self._left -= 1
            return False
        self._wait = min(2 * self._wait, _LAST_WAIT)
        self._left = self._wait
        return True
