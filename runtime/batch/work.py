"""A run that a loop has asked for, on its way up through the segments.

A run over rows of a round goes up one segment at a time, so that it can meet others there. A run over a prompt goes up
in chunks, each through all of its segments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from shortstack.runtime.decode.runs import DraftRow, DraftRows, LevelRun, OwnRun, Prefill, PrefillLevel, Run, Verify
from shortstack.runtime.engine.packed_segment import Part
from shortstack.runtime.engine.slot import Chunk, Slot


class RoundWork:
    """A level's run over rows of a round.

    Args:
        slot: The sequence's rows.
        run: The run.

    Attributes:
        segment: The segment that it waits for.
        waited: How many runs of other segments it has waited for.
        has_seen_chunk: Whether it has waited for a chunk of a prompt.
    """

    def __init__(self, slot: Slot, run: LevelRun) -> None:
        self._slot = slot
        self._run = run
        self._segments = slot.levels.segments[run.level]
        self.segment = self._segments.start
        self.waited = 0
        self.has_seen_chunk = False

    def part(self) -> Part:
        """Return the part for the segment that it waits for."""
        run = self._run
        return self._slot.part(self.segment, range(run.start, run.end), run.past, run.num_rows, run.with_logits)

    def advance(self) -> bool:
        """Record that the segment has run; return whether the whole run is done."""
        self.segment += 1
        return self.segment == self._segments.stop


class PromptWork:
    """A run over a prompt, through all levels or through one of them.

    Args:
        slot: The sequence's rows.
        run: The run.
        kept: What the level below left of the prompt, chunk by chunk; replaced by what this one leaves. Prompts that
            run level by level need it.
    """

    def __init__(self, slot: Slot, run: Prefill | PrefillLevel, kept: list[Chunk]) -> None:
        slot.reserve(run.past + len(run.tokens), run.past)
        self._slot = slot
        self._run = run
        self._kept = kept
        self._done = 0  # tokens
        level = run.level if isinstance(run, PrefillLevel) else None
        self._level = level
        levels = slot.levels.segments
        self._segments = range(levels[-1].stop) if level is None else levels[level]
        self._with_head = run.with_head if isinstance(run, PrefillLevel) else True
        self._below = list(kept) if level else None
        kept.clear()

    @property
    def left(self) -> int:
        """How many tokens have not run yet."""
        if self._below is not None:
            return sum(chunk.rows for chunk in self._below)
        return max(len(self._run.tokens) - self._done, 0)

    def run_chunk(self, most: int, perform: Callable[[int, Part], None]) -> bool:
        """Run the next chunk through the segments; return whether the prompt is done.

        Args:
            most: The most rows of the chunk; those of a longer chunk of the level below run in several.
            perform: Runs one segment on a part.
        """
        chunk: Chunk | None = self._next_chunk(most)
        for segment in self._segments:
            assert chunk is not None
            run = self._slot.prompt_part(segment, chunk, with_head=self._with_head, with_logits=self._run.with_logits)
            if run is None:  # segments without a cache have nothing to do before the end
                break
            part, chunk = run
            perform(segment, part)
        self._done += most
        if self._below is not None:  # last, so that an interrupted chunk runs again
            self._below.pop(0)
        is_last = self.left == 0
        if self._level is not None and self._level < len(self._slot.levels) - 1:
            assert chunk is not None
            self._kept.append(chunk)
            if is_last:
                self._slot.keep_hidden(self._level, chunk)
        return is_last

    def _next_chunk(self, most: int) -> Chunk:
        if self._below is not None:
            if self._below[0].rows > most:
                self._below[:1] = self._below[0].split(most)
            return self._below[0]
        tokens: Sequence[int] = self._run.tokens[self._done : self._done + most]
        ids = np.asarray([tokens], np.int64)
        is_end = self._done + len(tokens) == len(self._run.tokens)
        return Chunk(ids, self._run.past + self._done, is_end, ids)


Work = RoundWork | PromptWork


def work_of(run: Run, slot: Slot, kept: list[Chunk]) -> Work | None:
    """Return the work that a run is; None where there is nothing to do.

    Args:
        run: What a loop asks for.
        slot: The sequence's rows.
        kept: See :class:`PromptWork`.
    """
    levels = len(slot.levels)
    match run:
        case Prefill() | PrefillLevel():
            return PromptWork(slot, run, kept)
        case DraftRow(row, past, with_head, with_logits):
            if levels == 1:
                return None
            return RoundWork(slot, LevelRun(0, row, row + 1, past, int(with_head), with_logits))
        case DraftRows(start, end, past):
            return None if levels == 1 else RoundWork(slot, LevelRun(0, start, end, past, 0, False))
        case Verify(rows, past, with_logits):
            return RoundWork(slot, LevelRun(levels - 1, 0, rows, past, rows, with_logits))
        case LevelRun():
            return RoundWork(slot, run)
        case OwnRun():
            raise AssertionError("a run of a sequence's own is not merged")
