"""What one row costs: a plain step, a draft row, and verifying M rows, in turns on one model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from shortstack.graphs.errors import RequestError
from shortstack.runtime import Model
from shortstack.runtime.engine.stack import Stack


def measure_costs(model: Model, prompt: Sequence[int], rows: Sequence[int], repeats: int) -> dict[str, Any]:
    """Measure at the context that ``prompt`` makes; every round takes each measurement once.

    Args:
        model: A bundle with an exit; its lowest one drafts.
        prompt: Token ids.
        rows: The row counts to verify.
        repeats: Rounds.

    Returns:
        Seconds, one list over the rounds each: ``plain`` (all layers, one row), ``draft`` (lower segments with the exit
        head), ``lower`` (without it), ``verify`` by row count as a string (upper segments, final head on every row).

    Raises:
        RequestError: The bundle has no exit.
    """
    if not model.exit_layers:
        raise RequestError("costs of drafting need an exit, and this bundle has none", remedy="name a bundle with one")
    stack = Stack(model.graphs, model.cache, model.exit_layers[:1])
    stack.prefill(prompt, 0, with_logits=False)
    past = len(prompt)
    for row in range(stack.window):
        stack.put(row, prompt[row % past])

    def lower(row: int, with_head: bool) -> None:
        stack.draft(row, past, with_head=with_head, with_logits=False)

    def plain() -> None:
        lower(0, with_head=False)
        stack.verify(1, past, with_logits=False)

    # Verifying reads hidden rows that the lower segments left; any rows will do for a time.
    for row in range(max(rows)):
        lower(row, with_head=False)
    jobs: dict[str, Callable[[], None]] = {
        "plain": plain,
        "draft": lambda: lower(0, with_head=True),
        "lower": lambda: lower(0, with_head=False),
    }
    for count in rows:
        jobs[str(count)] = lambda count=count: stack.verify(count, past, with_logits=False)  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(repeats + 1):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            if repeat:  # the first round builds bindings
                seconds[name].append(time.perf_counter() - started)
    return {name: seconds.pop(name) for name in ("plain", "draft", "lower")} | {"verify": seconds}
