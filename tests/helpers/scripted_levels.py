"""A scripted LeveledDecoder for tests of early exit: any number of levels, and no neural net.

It is like :class:`helpers.scripted.ScriptedDecoder`, but with one cache per level. A run of a level reads all rows of
its own cache before its first one, and the rows that the level below left. It fails with "hole" if one is missing, and
with "stale" if one belongs to another text. Levels may run in different threads, and sleep for a random time now and
then.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from helpers.scripted import Prefix, ScriptedError, ScriptedModel, say
from shortstack.runtime.engine.head import Head

HIDDEN = 4


class ScriptedLevels:
    """See the module's docstring.

    Args:
        model: The final head's predictions, and how often an exit agrees with them.
        exits: How many exits there are.
        window: The most rows that one round may have.
        max_length: Positions of the longest context.
        naps: Seed of the random naps; None for no naps.
        has_gate: Whether the exits have gates.

    Attributes:
        runs: (level, start, end, num_rows) of each run, in the order in which the runs ended.
        fails: Called with the level and the rows before each run; if it returns true, the run raises
            :class:`ScriptedError`.
    """

    def __init__(
        self,
        model: ScriptedModel,
        exits: int = 1,
        *,
        window: int = 8,
        max_length: int = 64,
        naps: int | None = None,
        has_gate: bool = False,
    ) -> None:
        self.model = model
        self.clock = time.perf_counter
        self.window = window
        self.max_length = max_length
        self.filling_levels = exits + 1
        self.sees_state = False
        self.has_drafter = False
        self.depths = tuple(2 * (level + 1) for level in range(exits + 1))
        self.num_layers = self.depths[-1]
        self.exit_layer = self.depths[0]
        vocab, ids = model.vocab_size, model.draft_ids
        rows = vocab if ids is None else len(ids)
        self.heads = [Head(window, rows, np.dtype(np.float32), ids, has_gate) for _ in range(exits)]
        self.final = Head(window, vocab, np.dtype(np.float32), None)
        self.heads.append(self.final)
        self.exit = self.heads[0]
        self.caches: list[dict[int, Prefix]] = [{} for _ in self.heads]
        self.runs: list[tuple[int, int, int, int]] = []
        self.fails: Callable[[int, int, int], bool] = lambda level, start, end: False
        self._left: list[dict[int, Prefix]] = [{} for _ in self.heads]  # by level and row
        self._ids = np.zeros(window + 1, np.int64)
        self._running = [threading.Lock() for _ in self.heads]
        self._naps = None if naps is None else random.Random(naps)
        self._prompt: list[Prefix] | None = None
        self._root = model.root

    def prefill(self, tokens: Sequence[int], past: int, with_logits: bool) -> None:
        for level in range(len(self.heads)):
            self.prefill_level(level, tokens, past, True, with_logits)

    def prefill_level(self, level: int, tokens: Sequence[int], past: int, with_head: bool, with_logits: bool) -> None:
        text = self._read(level, past)
        below = self._prompt if level else None
        self._prompt = []
        for index, token in enumerate(tokens):
            text = text.then(token)
            assert below is None or below[index] is text, "the levels hold different prompts"
            self.caches[level][past + index] = text
            self._prompt.append(text)
        self._left[level][0] = text
        self._forget(self.heads[level])
        if with_head:
            self._say(level, 0, text, with_logits)
            if level == 0:  # as in a stack, the lowest head writes where the next row's token is read
                self._ids[1] = self.heads[0].token[0]

    def put(self, row: int, token: int) -> None:
        self._ids[row] = token

    def draft(self, row: int, past: int, with_head: bool, with_logits: bool) -> None:
        self.run(0, row, row + 1, past, int(with_head), with_logits)

    def draft_rows(self, start: int, end: int, past: int) -> None:
        self.run(0, start, end, past, 0, False)

    def verify(self, rows: int, past: int, with_logits: bool) -> None:
        self.run(len(self.heads) - 1, 0, rows, past, rows, with_logits)

    def run(self, level: int, start: int, end: int, past: int, num_rows: int, with_logits: bool) -> None:
        assert self._running[level].acquire(blocking=False), f"level {level} runs twice at the same time"
        try:
            assert 0 <= start < end <= self.window, f"rows {start}..{end} of a window of {self.window}"
            assert past + end <= self.max_length, f"{past + end} positions in a context of {self.max_length}"
            assert num_rows <= end - start
            if self.fails(level, start, end):
                raise ScriptedError(level, start, end)
            self._nap()
            text = self._read(level, past + start)
            self._forget(self.heads[level])
            for row in range(start, end):
                if level:
                    left = self._left[level - 1].get(row)
                    assert left is not None, f"hole: level {level - 1} left nothing in row {row}"
                    assert left.parent is text, f"stale row {row} below level {level}"
                    text = left
                else:
                    text = text.then(int(self._ids[row]))
                self.caches[level][past + row] = text
                if row >= end - num_rows:
                    self._say(level, row, text, with_logits)
                self._left[level][row] = text
            self._nap()
            self.runs.append((level, start, end, num_rows))
        finally:
            self._running[level].release()

    def reserve(self, positions: int, keep: int) -> None:
        assert positions <= self.max_length
        assert not any(lock.locked() for lock in self._running), "the cache grows while a level runs"
        self._left = [{} for _ in self.heads]  # rows of the round before are gone

    def hidden(self, level: int, row: int) -> np.ndarray:
        text = self._left[level][row]
        noise = np.frombuffer(text.digest[: 2 * HIDDEN], np.uint16).astype(np.float32)
        return noise if level == 0 else noise + np.float32(2**14)

    def keep_state(self, row: int) -> None:
        assert 0 <= row <= self.window

    def assert_holds(self, tokens: Sequence[int]) -> None:
        """Assert that every level's cache holds exactly this text from position 0 on."""
        for level in range(len(self.heads)):
            text = self._root
            for position, token in enumerate(tokens):
                text = text.then(token)
                assert position in self.caches[level], f"hole in level {level} at position {position}"
                assert self.caches[level][position].digest == text.digest, f"stale: level {level}, position {position}"

    def _say(self, level: int, row: int, text: Prefix, with_logits: bool) -> None:
        head = self.heads[level]
        if level == len(self.heads) - 1:
            logits = self.model.final(text)
        else:  # a higher exit is surer of the same token, or predicts another
            logits = self.model.exit(text) * np.float32(1 + level)
            if text.digest[level] % 4 == 0:
                logits = np.roll(logits, level)
        say(head, row, logits, with_logits)
        if head.gate is not None:
            head.gate[row] = head.margin[row]

    def _read(self, level: int, past: int) -> Prefix:
        text = self._root
        for position in range(past):
            found = self.caches[level].get(position)
            assert found is not None, f"hole in level {level} at position {position} of {past}"
            assert found.parent is text, f"stale row in level {level} at position {position} of {past}"
            text = found
        return text

    def _forget(self, head: Head) -> None:
        """Spoil a head's rows, so that a loop which reads a row that the next run does not write fails."""
        head.token[:] = -1
        head.top_prob[:] = np.nan

    def _nap(self) -> None:
        if self._naps is not None and (nap := self._naps.random()) < 0.5:
            time.sleep(nap * 2e-4)
