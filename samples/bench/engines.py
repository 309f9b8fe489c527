"""Plain decoding, engine against engine, in alternating chunks of tokens; and the host's share of our own steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from shortstack.samples.bench.figures import Spread, ratios, spread
from shortstack.samples.bench.pipe import WorkerProcess
from shortstack.samples.bench.settings import Settings


@dataclass(slots=True)
class Account:
    """What one engine did.

    Attributes:
        tokens: Token ids of each generation.
        prefill_s: Seconds to the first token of each generation.
        step_s: Seconds per token of each chunk.
        cpu_s: Seconds of CPU time per token of each chunk, spinning threads included.
        overhead: Share of each chunk's time spent outside graph runs; empty for an engine that does not tell.
    """

    tokens: list[list[int]] = field(default_factory=list)
    prefill_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    overhead: list[float] = field(default_factory=list)

    def decode_chunk(self, worker: WorkerProcess, count: int) -> None:
        """Let the worker decode one chunk, and note what it took."""
        answer = worker.ask("chunk", count=count)
        self.tokens[-1] += answer["tokens"]
        self.step_s.append(answer["elapsed_s"] / count)
        self.cpu_s.append(answer["cpu_s"] / count)
        if "run_s" in answer:
            self.overhead.append(1.0 - answer["run_s"] / answer["elapsed_s"])


def take_turns(workers: Sequence[WorkerProcess], prompt: Sequence[int], settings: Settings) -> list[Account]:
    """Decode the same prompt with every worker; who goes first, and behind whom, changes from chunk to chunk.

    Returns:
        One account per worker, without the warm-up.
    """
    accounts: list[Account] = []
    total = 1 + settings.chunks * settings.chunk_tokens
    for repeat in range(settings.repeats):
        if repeat <= 1:  # the first generation builds bindings and warms caches up: forget it
            accounts = [Account() for _ in workers]
        pairs = list(zip(workers, accounts, strict=True))
        for index in turn_order(len(pairs), repeat):
            worker, account = pairs[index]
            time.sleep(settings.rest_s)
            answer = worker.ask("start", prompt=list(prompt), tokens=total)
            account.tokens.append(answer["tokens"])
            account.prefill_s.append(answer["elapsed_s"])
        for chunk in range(settings.chunks):
            for index in turn_order(len(pairs), repeat * settings.chunks + chunk):
                worker, account = pairs[index]
                time.sleep(settings.rest_s)
                account.decode_chunk(worker, settings.chunk_tokens)
    return accounts


def turn_order(workers: int, chunk: int) -> list[int]:
    """Return who goes when: each is first equally often, and follows each of the others equally often."""
    first = chunk % workers
    order = [(first + i) % workers for i in range(workers)]
    return order if chunk // workers % 2 else order[::-1]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two engines over one prompt.

    Attributes:
        speed: Their time per token over ours, pair by pair; above 1 we are faster.
        cpu_speed: The same in CPU time, which other processes disturb less; with one thread it is the truer figure.
        prefill_speed: The same in time to the first token.
        ours_s: Our seconds per token.
        theirs_s: Their seconds per token.
        same_tokens: How many tokens the two have in common from the start on, in the worst generation.
        tokens: Tokens of a generation.
    """

    speed: Spread
    cpu_speed: Spread
    prefill_speed: Spread
    ours_s: Spread
    theirs_s: Spread
    same_tokens: int
    tokens: int


def compare(ours: Account, theirs: Account) -> Comparison:
    """Set two accounts of the same chunks against each other."""
    pairs = list(zip(ours.tokens, theirs.tokens, strict=True))
    return Comparison(
        speed=ratios(theirs.step_s, ours.step_s),
        cpu_speed=ratios(theirs.cpu_s, ours.cpu_s),
        prefill_speed=ratios(theirs.prefill_s, ours.prefill_s),
        ours_s=spread(ours.step_s),
        theirs_s=spread(theirs.step_s),
        same_tokens=min(common_prefix(a, b) for a, b in pairs),
        tokens=min(len(a) for a, _ in pairs),
    )


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many leading elements are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
