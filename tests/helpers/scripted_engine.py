"""The engine of several sequences, with checks of the order in which it admits jobs and serves their runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shortstack.runtime.batch import engine as engine_file
from shortstack.runtime.batch.engine import Engine
from shortstack.runtime.batch.work import PromptWork, RoundWork
from shortstack.runtime.engine.packed_segment import Part
from shortstack.runtime.engine.stack import WINDOW_ROWS


class ScriptedEngine(Engine):
    """The engine, which checks the order in which jobs are admitted and served."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.submitted: list[engine_file.Job] = []
        self._waited: dict[RoundWork, int] = {}  # runs of other segments
        self._chunks: set[RoundWork] = set()  # that have waited for a chunk of a prompt
        self.copies = {"from a busy slot": 0, "from a slot that is drafted in": 0}
        copy = self.cache.copy

        def counted(source: int, target: int, positions: int) -> None:
            works = {job.slot.number: job.work for job in self._active if job.slot is not None}
            busy = "from a slot that is drafted in" if isinstance(works.get(source), RoundWork) else "from a busy slot"
            assert source in works, "a free slot shares more than the slot that was chosen"
            self.copies[busy] += 1
            copy(source, target, positions)

        self.cache.copy = counted  # type: ignore[method-assign]

    def check_order(self, segment: int, parts: Sequence[Part]) -> bool:
        """Check that a run is that of the lowest segment that is wanted, with all who want it, and waits are bounded.

        A run that has waited for as many others as a round has rows goes first. It waits for one chunk at most.

        Returns:
            Whether it is a chunk of a prompt.
        """
        works = {job.slot.number: job.work for job in self._active if job.slot is not None}
        rounds = {number: work for number, work in works.items() if isinstance(work, RoundWork)}
        self._waited = {work: self._waited.get(work, 0) for work in rounds.values()}
        if len(parts) == 1 and isinstance(works[parts[0].slot], PromptWork):
            self._check_chunk(segment, parts[0], set(rounds.values()))
            return True
        longest = max(self._waited.values())
        if longest < WINDOW_ROWS:
            lowest = min(work.segment for work in rounds.values())
            assert segment == lowest, f"segment {segment} runs where {lowest} is wanted"
        else:
            due = {work.segment for work, waited in self._waited.items() if waited == longest}
            assert segment in due, f"segment {segment} runs where {due} has waited for {longest} runs"
        here = {number for number, work in rounds.items() if work.segment == segment}
        assert here == {part.slot for part in parts}, f"slots {here} want segment {segment}"
        for work in rounds.values():
            self._waited[work] += work.segment != segment
        return False

    def _check_chunk(self, segment: int, part: Part, waiting: set[RoundWork]) -> None:
        if segment and self._last_chunk == (part.slot, part.past + part.count):  # a chunk's next segment
            return
        assert not waiting & self._chunks, "a run waits for a second chunk of a prompt"
        self._chunks = waiting
        self._last_chunk = part.slot, part.past + part.count

    _last_chunk = (-1, -1)

    def submit(self, job: engine_file.Job) -> None:
        super().submit(job)
        made = job.make_loop
        self.submitted.append(job)

        def make_loop(*arguments: Any) -> Any:
            assert self.submitted.pop(0) is job, "a job was admitted out of order"
            return made(*arguments)

        job.make_loop = make_loop

    def cancel(self, job: engine_file.Job) -> None:
        super().cancel(job)
        if job in self.submitted:
            self.submitted.remove(job)
