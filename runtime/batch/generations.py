"""From requests to jobs of an engine, and from the engine's steps to texts."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from shortstack.graphs.errors import ShortstackError
from shortstack.runtime.batch.engine import Engine, EngineStats, Job
from shortstack.runtime.decode.runs import Loop
from shortstack.runtime.decode.sequence import TokenSequence
from shortstack.runtime.decode.step import Stats, Step
from shortstack.runtime.decode.stream import Stream
from shortstack.runtime.engine.slot import Slot
from shortstack.runtime.loops import Loops
from shortstack.runtime.request import Request

MakeStream = Callable[[Request, Iterator[Step], Stats, int], Stream]
"""Makes the stream of a request from its steps, its counts and the most tokens that it emits."""
Prepared = tuple[Request, Sequence[int], tuple[int, ...]]
"""A request, the token ids of its prompt, and the exits that its strategy uses."""


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

    def check_ready(self) -> None:
        """Refuse to run the engine from within a run; errors as in :meth:`Engine.check_not_running`."""
        if not self._steps and self.job is not None and not self.job.is_done:
            self._engine.check_not_running()

    def close(self) -> None:
        """End the job now; from within a run, after it."""
        with self._lock:
            if self.job is not None and not self.job.is_done:
                self._engine.cancel(self.job)


class Generations:
    """Starts generations on one engine.

    Args:
        engine: The engine.
        loops: Makes their loops, and learns from them.
        check_open: Refuses where the model is closed.
    """

    def __init__(self, engine: Engine, loops: Loops, check_open: Callable[[], None]) -> None:
        self._engine = engine
        self._loops = loops
        self._check_open = check_open
        self._lock = threading.RLock()
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._streams_lock = threading.Lock()  # never held for as long as a run

    def close(self, set_closed: Callable[[], bool]) -> None:
        """End all generations; any thread may call it.

        Args:
            set_closed: Closes the model, and returns whether it was open.
        """
        with self._streams_lock:
            streams = list(self._streams)
        for stream in streams:  # first: the thread that takes their tokens may not let go of the lock for long
            stream.cancel()
        with self._lock:
            self._engine.cancel_all()
            set_closed()

    @property
    def stats(self) -> EngineStats:
        """What the engine did."""
        return self._engine.stats

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
        held = weakref.ref(stream), weakref.ref(steps)  # a stream that its caller has dropped is not run to its end

        def receive(step: Step) -> bool:
            reader, wanted = held[0](), held[1]()
            return reader is not None and wanted is not None and wanted.receive(step) and not reader.is_cancelled

        steps.job = self._job(request, ids, exit_layers, stats, receive)
        with self._streams_lock:
            self._streams.add(stream)
        self._submit(steps.job)
        return stream

    def run_all(
        self, requests: Iterator[Prepared | ShortstackError], make: MakeStream, ahead: int
    ) -> Iterator[tuple[int, Stream | Exception]]:
        """Run many generations to their ends.

        Args:
            requests: Requests with prompts and exits, or why one cannot start; read as they are needed.
            make: Makes the stream of each.
            ahead: How many may wait for a slot.

        Yields:
            The number of a generation, and its stream or its error, in the order in which they end.
        """
        running: dict[int, tuple[Job, Stream]] = {}
        numbered = enumerate(requests)
        try:
            while True:
                ended: list[tuple[int, Stream | Exception]] = []
                while len(running) + len(ended) < self._engine.cache.slots + ahead:
                    number, found = next(numbered, (-1, None))  # without the lock: whoever writes them may take long
                    if found is None:
                        break
                    try:
                        if isinstance(found, ShortstackError):
                            raise found
                        running[number] = self._begin(found, make)
                    except ShortstackError as error:
                        ended.append((number, error))
                if not running and not ended:
                    return
                with self._lock:
                    if running:
                        self._engine.run_once()
                    for number in [number for number, (job, _) in running.items() if job.is_done]:
                        job, stream = running.pop(number)
                        ended.append((number, job.error or stream))
                yield from ended
        finally:
            with self._lock:
                for job, _ in running.values():
                    self._engine.cancel(job)

    def _submit(self, job: Job) -> None:
        with self._lock:
            self._check_open()
            self._engine.check_not_running()
            self._engine.submit(job)

    def _begin(self, prepared: Prepared, make: MakeStream) -> tuple[Job, Stream]:
        """Start a generation whose tokens its stream takes as they come."""
        request, ids, exit_layers = prepared
        steps = Generation(self._engine, self._lock)
        stats = Stats(prompt=len(ids))
        stream = make(request, steps, stats, self._limit(request, ids))

        def receive(step: Step) -> bool:
            steps.receive(step)
            next(stream)
            return stream.finish_reason is None

        steps.job = self._job(request, ids, exit_layers, stats, receive)
        self._submit(steps.job)
        return steps.job, stream

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
