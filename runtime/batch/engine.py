"""Runs the loops of several sequences over one model, and merges what they ask for.

::

    a    Draft  Draft  Verify ...        each loop asks for a run and waits
    b    Verify              ...
    run  layers 0-3: a            (drafts first: they are short, and others may join above)
         layers 0-3: a, b         (b's run over all layers meets a's second draft)
         layers 4-29: a, b

The lowest segment that any sequence waits for runs next, with the rows of all that wait for it. So the upper segments
run when nobody wants a lower one, over as many rows as there are. Some sequences never want an upper one, so a run that
has waited for as many others as a round has rows goes first. Prompts run alone in their slot, in chunks between rounds;
no run waits for two of them.

Everything here happens in the thread that calls :meth:`Engine.run_once`. What it calls, such as a criterion of the
caller's own, may end jobs, which happens after the run. It may not ask for another run.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shortstack.graphs.errors import RequestError
from shortstack.runtime.batch.prefixes import Slots
from shortstack.runtime.batch.work import PromptWork, RoundWork, Work, work_of
from shortstack.runtime.decode.runs import Loop, OwnRun, Run
from shortstack.runtime.decode.sequence import TokenSequence
from shortstack.runtime.decode.step import Stats, Step
from shortstack.runtime.decode.stream import step_error
from shortstack.runtime.engine.open_graphs import OpenGraphs
from shortstack.runtime.engine.packed_segment import PackedSegment, Part
from shortstack.runtime.engine.slot import Chunk, Slot
from shortstack.runtime.engine.slot_cache import SlotCache
from shortstack.runtime.engine.stack import PREFILL_ROWS, WINDOW_ROWS

MakeLoop = Callable[[Slot, TokenSequence, Stats], Loop]
_FEWEST_CHUNK_ROWS = 16
_CHUNK_ROUNDS = 2  # how many rounds of the others a chunk of a prompt may take
_WEIGHT = 0.2  # of one measurement in a running cost


@dataclass(slots=True)
class Job:
    """One generation of many.

    Attributes:
        ids: The prompt.
        exit_layers: The exits that its loop uses.
        make_loop: Makes the loop when there is a slot for it.
        receive: Called with each step; returns whether the generation goes on.
        stats: Its counts.
        is_done: It is over, one way or another.
        error: Why it failed; None if it did not.
    """

    ids: Sequence[int]
    exit_layers: tuple[int, ...]
    make_loop: MakeLoop
    receive: Callable[[Step], bool]
    stats: Stats
    reuses: bool = True
    is_done: bool = False
    error: Exception | None = None
    slot: Slot | None = None
    loop: Loop | None = None
    work: Work | None = None
    kept: list[Chunk] = field(default_factory=list)


@dataclass(slots=True)
class EngineStats:
    """What an engine did.

    Attributes:
        runs: Merged runs by segment.
        rows: Rows of these.
        prompt_rows: Rows of prompts that ran.
        reused: Positions of prompts that were in the cache already.
    """

    runs: list[int]
    rows: list[int]
    prompt_rows: int = 0
    reused: int = 0


class Engine:
    """Runs jobs over the slots of one cache.

    Args:
        graphs: The bundle's graphs, in the packed form.
        slots: How many sequences run at once.
        fewest_rows: See :class:`PackedSegment`.
    """

    def __init__(self, graphs: OpenGraphs, slots: int, fewest_rows: int) -> None:
        manifest = graphs.bundle.manifest
        self.cache: SlotCache = graphs.new_slots(slots, WINDOW_ROWS)
        segments = range(len(manifest.plan.segments))
        self._segments = [PackedSegment(graphs, index, self.cache, fewest_rows) for index in segments]
        self._slots = Slots(graphs, self.cache)
        self._waiting: deque[Job] = deque()
        self._active: list[Job] = []
        self._round_s = 0.0  # of the others, since the last chunk of a prompt
        self._usual_round_s: float | None = None
        self._prompt_row_s: float | None = None
        self._has_emitted = True
        self._runner: int | None = None  # the thread that is in a run, by its ident
        self._cancelled: list[Job] = []  # from within a run, which goes on to its end
        self.stats = EngineStats([0] * len(segments), [0] * len(segments))

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._active)

    @property
    def num_waiting(self) -> int:
        """How many jobs wait for a slot."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Add a job; it starts when its turn comes and a slot is free."""
        self._waiting.append(job)

    def cancel(self, job: Job) -> None:
        """End a job now; from within a run, after it."""
        if job in self._waiting:
            self._waiting.remove(job)
            job.is_done = True
        elif self._runner is not None:
            self._cancelled.append(job)
        elif not job.is_done:
            self._finish(job)

    def cancel_all(self) -> None:
        """End all jobs now; from within a run, after it."""
        for job in [*self._waiting, *self._active]:
            self.cancel(job)

    def check_not_running(self) -> None:
        """Refuse a call from within a run.

        Raises:
            RequestError: The engine is in the middle of one, on this thread.
        """
        if self._runner == threading.get_ident():
            raise step_error()

    def run_once(self) -> None:
        """Admit jobs, and perform one merged run or one chunk of a prompt.

        Raises:
            RequestError: See :meth:`check_not_running`.
        """
        self.check_not_running()
        self._runner = threading.get_ident()
        try:
            self._admit()
            rounds = [(job, job.work) for job in self._active if isinstance(job.work, RoundWork)]
            prompts = [(job, job.work) for job in self._active if isinstance(job.work, PromptWork)]
            may_wait = self._has_emitted and not any(work.has_seen_chunk for _, work in rounds)
            if prompts and (not rounds or may_wait):
                for _, work in rounds:
                    work.has_seen_chunk = True
                self._run_chunk(*prompts[0], most=self._chunk_rows() if rounds else PREFILL_ROWS)
            elif rounds:
                self._run_round(rounds)
        finally:
            self._runner = None
            while self._cancelled:
                self.cancel(self._cancelled.pop())

    def _admit(self) -> None:
        while self._waiting and self._slots.has_free:
            job = self._waiting.popleft()
            self._active.append(job)
            self._resume(job, None)

    def _start(self, job: Job) -> Loop:
        """Give a job a slot and a loop."""
        job.slot, sequence = self._slots.take(job.ids, job.exit_layers, reuses=job.reuses)
        job.stats.reused = sequence.cached
        self.stats.reused += sequence.cached
        job.loop = job.make_loop(job.slot, sequence, job.stats)
        return job.loop

    def _run_round(self, waiting: Sequence[tuple[Job, RoundWork]]) -> None:
        longest = max((work for _, work in waiting), key=lambda work: work.waited)
        is_due = longest.waited >= WINDOW_ROWS
        chosen = longest.segment if is_due else min(work.segment for _, work in waiting)
        group = [(job, work) for job, work in waiting if work.segment == chosen]
        for _, work in waiting:
            work.waited += work.segment != chosen
        started = time.perf_counter()
        parts = [work.part() for _, work in group]
        try:
            self._segments[chosen].run(parts)
        except Exception as error:
            for job, _ in group:
                self._resume(job, error)
            return
        elapsed_s = time.perf_counter() - started
        rows = sum(part.count for part in parts)
        self._round_s += elapsed_s
        self.stats.runs[chosen] += 1
        self.stats.rows[chosen] += rows
        for (job, work), part in zip(group, parts, strict=True):
            assert job.slot is not None
            job.slot.charge(elapsed_s * part.count / rows)
            if work.advance():
                self._resume(job, None)

    def _run_chunk(self, job: Job, work: PromptWork, most: int) -> None:
        assert job.slot is not None
        started, left = time.perf_counter(), work.left
        if self._round_s:
            self._usual_round_s = _running(self._usual_round_s, self._round_s)
        self._round_s, self._has_emitted = 0.0, False

        def perform(segment: int, part: Part) -> None:
            self._segments[segment].run([part])

        try:
            is_done = work.run_chunk(most, perform)
        except Exception as error:
            self._resume(job, error)
            return
        elapsed_s, rows = time.perf_counter() - started, left - work.left
        job.slot.charge(elapsed_s)
        self._prompt_row_s = _running(self._prompt_row_s, elapsed_s / max(rows, 1))
        self.stats.prompt_rows += rows
        if is_done:
            self._resume(job, None)

    def _chunk_rows(self) -> int:
        """Return how many rows of a prompt may run while others wait."""
        if not self._prompt_row_s or self._usual_round_s is None:
            return _FEWEST_CHUNK_ROWS
        rows = int(_CHUNK_ROUNDS * self._usual_round_s / self._prompt_row_s)
        return min(max(rows, _FEWEST_CHUNK_ROWS), PREFILL_ROWS)

    def _resume(self, job: Job, error: Exception | None) -> None:
        """Let a loop begin, or go on, until it asks for the next run; an error of its run is thrown into it."""
        job.work = None
        try:
            loop = job.loop or self._start(job)
            assert job.slot is not None
            item: Run | Step | None = next(loop, None) if error is None else loop.throw(error)
            while item is not None and job.work is None:
                if isinstance(item, Step):
                    self._has_emitted = True
                    if not job.receive(item):
                        break
                elif isinstance(item, OwnRun):
                    self._run_own(job.slot, item)
                else:
                    job.work = work_of(item, job.slot, job.kept)
                if job.work is None:
                    item = next(loop, None)
        except StopIteration:
            pass
        except Exception as failure:  # of this job alone
            job.error = failure
            job.work = None
        except BaseException:  # Ctrl-C ends the loop that it came into; the others go on when somebody asks them to
            job.error, job.work = RequestError("the generation was interrupted", remedy="start it again"), None
            self._finish(job)
            raise
        if job.work is None:
            self._finish(job)

    def _run_own(self, slot: Slot, run: OwnRun) -> None:
        """Perform a run that no other sequence can share."""
        started = time.perf_counter()
        run.perform()
        elapsed_s = time.perf_counter() - started
        self._round_s += elapsed_s
        slot.charge(elapsed_s)

    def _finish(self, job: Job) -> None:
        if job.loop is not None:
            job.loop.close()
        job.work, job.loop = None, None
        job.kept.clear()
        self._active.remove(job)
        if job.slot is not None:
            self._slots.give_back(job.slot)
        job.is_done = True


def _running(known: float | None, measured: float) -> float:
    return measured if known is None else known + _WEIGHT * (measured - known)
