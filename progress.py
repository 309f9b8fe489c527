"""Progress of long work, on stderr: the stage, a bar and the time left. Silent where stderr is no terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[[float], None]
Stage = Callable[[str, float], Advance]


@contextlib.contextmanager
def progress_stages() -> Iterator[Stage]:
    """Yield a function ``stage(title, total) -> advance(amount)`` that starts the next stage."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def stage(title: str, total: float) -> Advance:
            task = progress.add_task(title, total=total)
            return lambda amount: progress.advance(task, amount)

        yield stage
