"""How long engines take to load a model, each time in a fresh process, in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shortstack.samples.bench.pipe import WorkerProcess


@dataclass(slots=True)
class Loads:
    """What loading took one engine, round by round.

    Attributes:
        load_s: Seconds from imported modules to a model, and its tokenizer, that could answer.
        first_token_s: The same and the first token of a prompt: what was put off until the first run counts here.
    """

    load_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)


def measure_loads(engines: Sequence[Callable[[], WorkerProcess]], prompt: Sequence[int], repeats: int) -> list[Loads]:
    """Start every engine once per round, one at a time; who goes first changes.

    Args:
        engines: Each starts a worker.
        prompt: Token ids.
        repeats: Rounds, without the first one, which reads files into the kernel's page cache.
    """
    accounts = [Loads() for _ in engines]
    pairs = list(zip(engines, accounts, strict=True))
    for repeat in range(repeats + 1):
        for start, account in pairs if repeat % 2 else reversed(pairs):
            with start() as worker:
                first = worker.ask("start", prompt=list(prompt), tokens=1)
            if repeat:
                account.load_s.append(worker.ready["load_s"])
                account.first_token_s.append(worker.ready["load_s"] + first["elapsed_s"])
    return accounts
