"""From requests to jobs of an engine, and from the engine's steps to texts."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from shortstack.runtime.batch.engine import Engine, Job
from shortstack.runtime.decode.runs import Loop
from shortstack.runtime.decode.sequence import TokenSequence
from shortstack.runtime.decode.step import Stats, Step
from shortstack.runtime.decode.stream import Stream
from shortstack.runtime.engine.slot import Slot
from shortstack.runtime.loops import Loops
from shortstack.runtime.request import Request

MakeStream = Callable[[Request, Iterator[Step], Stats, int], Stream]
"""Makes the stream of a request from its steps, its counts and the most tokens that it emits."""


class Generation(Iterator[Step]):
    """The steps of one job. Whoever asks for one that is not there yet runs the engine, which serves all jobs.

    Args:
        engine: The engine.
        lock: Held while it runs.
    """

    def __init__(self, engine: Engine, lock: threading.RLock) -> None:
        self._engine = engine
        self._lock = lock
        self._steps: deque[Step] = deque()
        self.job: Job | None = None

    def receive(self, step: Step) -> bool:
        """Take a step from the engine."""
        self._steps.append(step)
        return True

    def __next__(self) -> Step:
        assert self.job is not None
        while not self._steps:
            with self._lock:
                if self._steps:
                    break
                if self.job.error is not None:
                    raise self.job.error
                if self.job.is_done:
                    raise StopIteration
                self._engine.run_once()
        return self._steps.popleft()

    def close(self) -> None:
        """End the job now."""
        with self._lock:
            if self.job is not None and not self.job.is_done:
                self._engine.cancel(self.job)


class Generations:
    """Starts generations on one engine.

    Args:
        engine: The engine.
        loops: Makes their loops, and learns from them.
    """

    def __init__(self, engine: Engine, loops: Loops) -> None:
        self._engine = engine
        self._loops = loops
        self._lock = threading.RLock()

    def start(self, request: Request, ids: Sequence[int], exit_layers: tuple[int, ...], make: MakeStream) -> Stream:
        """Start a generation whose tokens the caller takes one by one.

        Args:
            request: The request.
            ids: Its prompt.
            exit_layers: The exits that its strategy uses.
            make: Makes the stream.
        """
        steps = Generation(self._engine, self._lock)
        stats = Stats(prompt=len(ids))
        stream = make(request, steps, stats, self._limit(request, ids))
        steps.job = self._job(request, ids, exit_layers, stats, steps.receive)
        with self._lock:
            self._engine.submit(steps.job)
        return stream

    def run_all(
        self, requests: Iterator[tuple[Request, Sequence[int], tuple[int, ...]]], make: MakeStream, ahead: int
    ) -> Iterator[tuple[int, Stream]]:
        """Run many generations to their ends.

        Args:
            requests: Requests with prompts and exits; read as they are needed.
            make: Makes the stream of each.
            ahead: How many may wait for a slot.

        Yields:
            The number of a generation, and its stream, in the order in which they end.
        """
        ended: deque[tuple[int, Stream]] = deque()
        running: dict[int, Stream] = {}
        count = 0

        def submit(request: Request, ids: Sequence[int], exit_layers: tuple[int, ...], number: int) -> None:
            steps = Generation(self._engine, self._lock)
            stats = Stats(prompt=len(ids))
            stream = running[number] = make(request, steps, stats, self._limit(request, ids))

            def receive(step: Step) -> bool:
                steps.receive(step)
                next(stream)
                return stream.finish_reason is None

            steps.job = self._job(request, ids, exit_layers, stats, receive)
            self._engine.submit(steps.job)
            jobs[number] = steps.job

        jobs: dict[int, Job] = {}
        try:
            while True:
                with self._lock:
                    while len(jobs) < self._engine.cache.slots + ahead and (found := next(requests, None)) is not None:
                        submit(*found, count)
                        count += 1
                    if not jobs:
                        return
                    self._engine.run_once()
                    for number in [number for number, job in jobs.items() if job.is_done]:
                        if (error := jobs.pop(number).error) is not None:
                            raise error
                        ended.append((number, running.pop(number)))
                while ended:
                    yield ended.popleft()
        finally:
            with self._lock:
                for job in jobs.values():
                    self._engine.cancel(job)

    def _limit(self, request: Request, ids: Sequence[int]) -> int:
        return min(request.max_new_tokens, self._engine.cache.max_length - len(ids))

    def _job(
        self,
        request: Request,
        ids: Sequence[int],
        exit_layers: tuple[int, ...],
        stats: Stats,
        receive: Callable[[Step], bool],
    ) -> Job:
        limit = self._limit(request, ids)

        def make_loop(slot: Slot, sequence: TokenSequence, stats: Stats) -> Loop:
            return self._loops.loop(request, slot, sequence, stats, limit)

        return Job(ids, exit_layers, make_loop, receive, stats, reuses=request.reuse_cache)
