"""When to measure again the way that lost: after 8, 16, 32, ... and then every 256 choices.

So neither one slow run nor one hard passage decides a whole generation, and a verdict that stays costs less and less.
"""

from __future__ import annotations

_FIRST_WAIT = 8
_LAST_WAIT = 256


class Remeasure:
    """Counts the choices between two ways."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Wait as briefly as at the beginning, since another way has won."""
        self._left = self._wait = _FIRST_WAIT

    def is_due(self) -> bool:
        """Count one choice; return whether the loser should be taken this time."""
        if self._left:
            self._left -= 1
            return False
        self._wait = min(2 * self._wait, _LAST_WAIT)
        self._left = self._wait
        return True
