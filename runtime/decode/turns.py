"""A lock that lets one generation at a time run on a model, in the order in which threads asked."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class Turns:
    """A lock. Threads get it in the order in which they asked, and a thread that has it may take it again.

    Python's own locks know no order: a thread that releases one and takes it again at once may keep all others waiting.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[int] = deque()  # threads by their idents; the first one has the lock
        self._depth = 0  # how often the first one has taken it

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._changed:
            if me not in self._queue:
                self._queue.append(me)
                try:
                    self._changed.wait_for(lambda: self._queue[0] == me)
                except BaseException:  # such as Ctrl-C
                    self._queue.remove(me)
                    self._changed.notify_all()
                    raise
            self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._depth -= 1
            if not self._depth:
                self._queue.popleft()
                self._changed.notify_all()
