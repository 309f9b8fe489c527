"""Runs the segments of one model over one cache: prefill, draft one position, verify several. Batch 1.

A stack uses some of the bundle's exits. They divide its segments into *levels*
(:mod:`shortstack.runtime.engine.levels`). The positions of a *round* are rows of small buffers that all graphs share
(:mod:`shortstack.runtime.engine.round_buffers`); row r is position ``past + r`` of the sequence. Drafting runs the
lowest level on one row. Verifying runs the highest level once on all rows. Nothing is copied between the graphs: each
one writes where the next one reads. A stack knows nothing about acceptance, sampling or text.

Some models have layers that use keys and values of layers above them (:mod:`shortstack.graphs.kv_map`). A segment with
such a group runs over its rows in several passes. In a round there are as many passes as rows, which is exact. Over a
prompt, :mod:`shortstack.runtime.engine.passes` runs them. The first token of a text then runs alone.

If the upper segments own no cache, they run on the last position of a prompt only.

If a row that runs alone is rounded differently from a row among others (:mod:`shortstack.runtime.engine.row_classes`),
no row runs alone. A *spare* row follows it, in segments and in heads. Its position is past the end of the text, and
its results are not read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np

from shortstack.runtime.engine.binder import SegmentBinder
from shortstack.runtime.engine.binding import Binding
from shortstack.runtime.engine.cache import KVCache
from shortstack.runtime.engine.drafting import Drafting
from shortstack.runtime.engine.head import Head
from shortstack.runtime.engine.levels import levels_of
from shortstack.runtime.engine.open_graphs import OpenGraphs
from shortstack.runtime.engine.passes import PrefillPasses, run_as_trained, run_passes
from shortstack.runtime.engine.round_buffers import RoundBuffers

WINDOW_ROWS = 16
PREFILL_ROWS = 256


class Stack:
    """The :class:`~shortstack.runtime.engine.decoder.LeveledDecoder` over a bundle's sessions.

    Args:
        graphs: The bundle's graphs.
        cache: The KV buffers.
        exit_layers: The exits in use, each by the number of layers run before it, ascending. Without exits the stack
            is uncut: drafting runs nothing, and verifying runs every segment.
        prefill_passes: How often a prompt runs through iterated groups, if the model has any.
        fewest_rows: The fewest rows that a run must have, 1 or 2.
    """

    def __init__(
        self,
        graphs: OpenGraphs,
        cache: KVCache,
        exit_layers: Sequence[int] = (),
        prefill_passes: PrefillPasses = "converged",
        fewest_rows: int = 1,
    ) -> None:
        manifest = graphs.bundle.manifest
        spec = manifest.spec
        self._cache = cache
        self._prefill_passes = prefill_passes
        self._fewest_rows = fewest_rows
        self._levels = levels_of(manifest, exit_layers)
        self._buffers = RoundBuffers(graphs, self._levels, WINDOW_ROWS, cache)
        # One binder per segment, since levels may run at the same time.
        self._binders = [SegmentBinder(graphs, segment.index, cache) for segment in manifest.plan.segments]
        self._first_alone = not all(spec.sees_itself(layer) for layer in range(spec.num_hidden_layers))
        self._bindings: dict[tuple[int, int, int, int, bool], Binding] = {}
        self._generation = -1  # of the cache buffers that the bindings hold
        self._prompt: list[np.ndarray] = []  # for prompts that may leave early: each chunk's residual stream so far
        self.clock = time.perf_counter
        self.window = WINDOW_ROWS
        self.max_length = manifest.max_length
        self.num_layers = spec.num_hidden_layers
        self.exit_layer = exit_layers[0] if exit_layers else 0
        self.depths = self._levels.depths
        self.filling_levels = self._levels.filling
        self.sees_state = self._levels.has_state
        self.heads: Sequence[Head] = self._buffers.heads
        self.has_drafter = manifest.plan.drafter is not None
        self.exit = self._buffers.exit
        self.final = self._buffers.heads[-1]

    @property
    def drafter(self) -> Drafting:
        """See :attr:`~State.drafter`."""
        return self._buffers.drafter

    def prefill(self, tokens: Sequence[int], past: int, with_logits: bool) -> None:
        """See :meth:`~Decoder.prefill`; long prompts run in chunks."""
        self.reserve(past + len(tokens), past)
        for chunk, start in self._chunks(tokens, past):
            is_end = start + chunk.shape[1] == past + len(tokens)
            self._prefill_chunk(range(len(self._binders)), chunk, chunk, start, is_end, with_logits)

    def prefill_level(self, level: int, tokens: Sequence[int], past: int, with_head: bool, with_logits: bool) -> None:
        """See :meth:`~LeveledDecoder.prefill_level`."""
        self.reserve(past + len(tokens), past + (len(tokens) if level else 0))
        kept = self._prompt if level else []
        self._prompt = []
        for index, (chunk, start) in enumerate(self._chunks(tokens, past)):
            below = kept[index] if level else chunk
            is_end = start + chunk.shape[1] == past + len(tokens)
            above = self._prefill_chunk(
                self._levels.segments[level], chunk, below, start, is_end, with_logits, with_head=with_head
            )
            if level < len(self._levels) - 1:
                self._prompt.append(above)
                if is_end:
                    self.hidden(level, 0)[:] = above[0, -1]

    def put(self, row: int, token: int) -> None:
        """See :meth:`~Decoder.put`."""
        self._buffers.put(row, token)

    def draft(self, row: int, past: int, with_head: bool, with_logits: bool) -> None:
        """See :meth:`~Decoder.draft`."""
        if len(self._levels) > 1:
            self.reserve(past + row + 1, past + row)
            self.run(0, row, row + 1, past, 1 if with_head else 0, with_logits)

    def draft_rows(self, start: int, end: int, past: int) -> None:
        """See :meth:`~Decoder.draft_rows`."""
        if len(self._levels) > 1:
            self.reserve(past + end, past + start)
            self.run(0, start, end, past, 0, False)

    def verify(self, rows: int, past: int, with_logits: bool) -> None:
        """See :meth:`~Decoder.verify`."""
        self.reserve(past + rows, past + (rows if len(self._levels) > 1 else 0))
        self.run(len(self._levels) - 1, 0, rows, past, rows, with_logits)

    def run(self, level: int, start: int, end: int, past: int, num_rows: int, with_logits: bool) -> None:
        """See :meth:`LeveledDecoder.run`; a binding is built when it is first needed."""
        segments = self._levels.segments[level]
        spare = self._spare_rows(past + start, past + end, num_rows)
        end += spare
        num_rows += spare if num_rows else 0
        for index in segments:
            has_head = num_rows > 0 and index == segments[-1]
            key = (index, start, end, num_rows if has_head else 0, with_logits and has_head)
            binder = self._binders[index]
            binding = self._bindings.get(key)
            if binding is None:
                rows = self._buffers.round_rows(*key[:4], self.heads[level], key[4])
                binding = self._bindings[key] = binder.bind(rows)
            binder.set_lengths(past + start, end - start)
            for _ in range(end - spare - start if binder.groups else 1):
                binding.run()

    def reserve(self, positions: int, keep: int) -> None:
        """See :meth:`LeveledDecoder.reserve`."""
        positions = min(positions + self._fewest_rows - 1, max(positions, self.max_length))
        if positions > self._cache.capacity or self._generation != self._cache.generation:
            self._bindings.clear()  # first, since bindings would keep the cache's old buffers alive
            self._buffers.release_cache()
            self._cache.reserve(positions, keep)
            self._generation = self._cache.generation

    def hidden(self, level: int, row: int) -> np.ndarray:
        """See :meth:`LeveledDecoder.hidden`."""
        return self._buffers.hidden[self._levels.segments[level][-1]][0, row]  # type: ignore[no-any-return]

    def keep_state(self, row: int) -> None:
        """See :meth:`~Decoder.keep_state`."""
        self._buffers.keep_state(row)

    def _spare_rows(self, start: int, end: int, num_rows: int) -> int:
        """Return how many spare rows a run over positions ``[start, end)`` needs, 0 or 1.

        It needs one if its segments or its head would run on a single row. There is none at the context's end, which no
        decoding loop reaches, and none if the first token of a text must run alone.
        """
        is_alone = 1 in (end - start, num_rows)
        must_be = self._first_alone and start == 0
        return int(is_alone and not must_be and self._fewest_rows > 1 and end < self.max_length)

    def _chunks(self, tokens: Sequence[int], past: int) -> Iterator[tuple[np.ndarray, int]]:
        """Yield the token ids [1, rows] of each chunk of a prompt, and the position of its first token."""
        most = PREFILL_ROWS
        if any(binder.groups for binder in self._binders):
            is_sequential = self._prefill_passes == "sequential"
            # A number of passes means what it meant in training, where a text ran as a whole.
            most = 1 if is_sequential else len(tokens) if isinstance(self._prefill_passes, int) else most
        start = 0
        while start < len(tokens):
            rows = 1 if self._first_alone and past + start == 0 else most
            yield np.asarray([tokens[start : start + rows]], dtype=np.int64), past + start
            start += rows

    def _prefill_chunk(
        self,
        segments: range,
        ids: np.ndarray,
        below: np.ndarray,
        past: int,
        is_end: bool,
        with_logits: bool,
        *,
        with_head: bool = True,
    ) -> np.ndarray:
        """Run segments over a chunk of a prompt and return the residual stream that the last segment leaves.

        At the end of the prompt the last segment's head may run too. Segments above the last one that owns a cache run
        on the prompt's last position only.
        """
        for index in segments:
            if index >= self._levels.on_last_row:
                if not is_end:
                    return below
                past, ids, below = past + ids.shape[1] - 1, ids[:, -1:], below[:, -1:]
            count = ids.shape[1]
            has_head = with_head and is_end and index == segments[-1]
            head = self.heads[self._levels.level_of(index)] if has_head else None
            spare = self._spare_rows(past, past + count, 1 if head is not None else 0)
            binder = self._binders[index]
            binder.set_lengths(past, count + spare)
            rows, above = self._buffers.prompt_rows(index, ids, past, below, head, with_logits, spare)
            binding = binder.bind(rows)
            positions = past, past + count
            if count == 1 or not binder.groups:
                binding.run()
            elif isinstance(self._prefill_passes, int):
                hides_first = self._first_alone and past == 1
                run_as_trained(
                    binding.run, self._cache, binder.groups, positions, self._prefill_passes, hides_first=hides_first
                )
            else:
                run_passes(binding.run, self._cache, binder.groups, positions)
            below = above[:, :count]
        return below
