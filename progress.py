"""Progress of long work, on stderr.

On a terminal each stage has a bar with the time it took and the time left. Elsewhere, such as in the log of a CI job,
there is a line every 30 seconds::

    Writing weights: 40%, 1:10 elapsed, about 1:45 left
    Building graphs: 0%, 0:20 elapsed

Both end with the total time, unless the work failed or was over in a few seconds.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

Advance = Callable[[float], None]
Stage = Callable[[str, float], Advance]
Clock = Callable[[], float]

SPEAK_EVERY_S = 30.0
QUICK_S = 2.0  # work that took less ends without its total time
_TIMES_WIDTH = len("12:34, 12:34 left")  # so that the bar keeps its length


@dataclass(slots=True)
class Pace:
    """How far one stage is, and how long the rest will take at the mean speed of the whole stage.

    The mean never forgets: a stage whose steps take minutes has an estimate as soon as one step is done, and between
    two steps the estimate counts down.

    Attributes:
        title: What the stage does.
        total: The amount of work.
        clock: Seconds that only go up.
        done: The work done so far.
        started_s: When the stage began.
        advanced_s: When it last got on.
        ended_s: When the next stage began; None while it runs.
    """

    title: str
    total: float
    clock: Clock
    done: float = 0.0
    started_s: float = field(init=False)
    advanced_s: float = field(init=False)
    ended_s: float | None = None

    def __post_init__(self) -> None:
        self.started_s = self.advanced_s = self.clock()

    def advance(self, amount: float) -> None:
        """Count work that was done."""
        self.done += amount
        self.advanced_s = self.clock()

    @property
    def share(self) -> float:
        """The part that is done, from 0 to 1."""
        return min(1.0, self.done / self.total) if self.total > 0 else 1.0

    def elapsed_s(self) -> float:
        """Return the seconds since the stage began, or those that it took."""
        return (self.clock() if self.ended_s is None else self.ended_s) - self.started_s

    def left_s(self) -> float | None:
        """Return the seconds that are left; None before the first step is done."""
        if self.share >= 1.0:
            return 0.0
        if self.done <= 0:
            return None
        at_last_step_s = (self.advanced_s - self.started_s) * (1.0 - self.share) / self.share
        return max(0.0, at_last_step_s - (self.clock() - self.advanced_s))

    def line(self) -> str:
        """Return where the stage is, for a log."""
        left_s = self.left_s()
        left = f", about {duration(left_s)} left" if left_s else ""
        return f"{self.title}: {self.share:.0%}, {duration(self.elapsed_s())} elapsed{left}"


def duration(seconds: float) -> str:
    """Return a time as ``0:42``, ``12:05`` or ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextlib.contextmanager
def progress_stages(*, clock: Clock = time.monotonic, every_s: float = SPEAK_EVERY_S) -> Iterator[Stage]:
    """Yield a function ``stage(title, total) -> advance(amount)`` that starts the next stage.

    Args:
        clock: Seconds that only go up.
        every_s: How often a line is written where stderr is not a terminal.
    """
    console = Console(stderr=True)
    started_s = clock()
    with _bars(console, clock) if _is_animated(console) else _lines(clock, every_s) as stage:
        yield stage
    took_s = clock() - started_s
    if took_s >= QUICK_S:
        say(f"done in {duration(took_s)}")


def _is_animated(console: Console) -> bool:
    """Whether bars can be redrawn; FORCE_COLOR asks for colours in a log, not for bars."""
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    return is_terminal and console.is_terminal and not console.is_dumb_terminal


@contextlib.contextmanager
def _bars(console: Console, clock: Clock) -> Iterator[Stage]:
    """Draw a bar for each stage."""
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        _Times(),
    )
    with Progress(*columns, console=console) as progress:
        current: Pace | None = None

        def stage(title: str, total: float) -> Advance:
            nonlocal current
            if current is not None:
                current.ended_s = clock()
            pace = current = Pace(title, total, clock)
            task = progress.add_task(title, total=total, pace=pace)

            def advance(amount: float) -> None:
                pace.advance(amount)
                progress.advance(task, amount)

            return advance

        yield stage
        if current is not None:
            current.ended_s = clock()


class _Times(ProgressColumn):
    """The time that a stage took so far, and the time left."""

    def render(self, task: Task) -> Text:
        pace: Pace = task.fields["pace"]
        left_s = pace.left_s() if pace.ended_s is None else None
        left = f", {duration(left_s)} left" if left_s else ""
        return Text(f"{duration(pace.elapsed_s())}{left}".ljust(_TIMES_WIDTH))


@contextlib.contextmanager
def _lines(clock: Clock, every_s: float) -> Iterator[Stage]:
    """Write a line every so often, also while a stage makes one long call and never gets on."""
    current = Pace("Preparing", 1, clock)  # until the first stage begins
    is_over = threading.Event()

    def speak() -> None:
        while not is_over.wait(every_s):
            say(current.line())

    def stage(title: str, total: float) -> Advance:
        nonlocal current
        current = Pace(title, total, clock)
        return current.advance

    speaker = threading.Thread(target=speak, name="shortstack-progress", daemon=True)
    speaker.start()
    try:
        yield stage
    finally:
        is_over.set()
        speaker.join()


def say(line: str) -> None:
    """Write a line about the work to stderr as it is now; without a reader there is nothing to say."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a closed pipe, a closed file, no stderr at all
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
