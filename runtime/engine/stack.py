"""The segments of one model over one cache: prefill, draft one position, verify several. Batch 1.

A stack is used with some of the bundle's exits, which part its segments into *levels*, bottom to top: a level is what
lies between two of these exits, and its last segment ends in its head::

    segments    0    |    1    |    2    |    3            a bundle with exits after 4, 8 and 12 layers
    exits            4         8        12       final
    levels        0       |         1         |   2        the stack that uses exits 4 and 12: heads 4, 12, final

A *round* lays its positions out in rows of small buffers that all graphs share::

    row               0    1    2   ...  window - 1
    ids   [1, w+1]    x0   d1   d2  ...              token ids; row r's draft writes its token to row r + 1
    state [1, w+1, h] s    g1   g2  ...              the state of the position before each row, as far as known
    hidden[1, w, h]   ·    ·    ·                    per boundary: what the segment below left for the one above
    final [1, w]      p1   p2   p3                   what the final head says after row r

Row r sits at position ``past + r`` of the sequence. Drafting runs the lowest level on one row; verifying runs the
highest once on all rows. Nothing is copied between the graphs: each writes where the next one reads. Knows
nothing about acceptance, sampling or text.

Where some layers use keys and values of layers above them (:mod:`shortstack.graphs.kv_map`), a segment that holds such
a group runs over its rows again and again, each run a pass: as often as there are rows in a round, which is exact, and
over a prompt as :mod:`shortstack.runtime.engine.passes` says. The first token of a text then runs alone.

Where the upper segments own no cache, a prompt runs through them with its last position only.

States are kept where the drafting exit sees them. s is the whole model's; row r's draft leaves the exit's guess of its
own position's state in row r + 1. Then verifying, which ends the round, leaves the whole model's state of row r's own
position in row r, and :meth:`Stack.keep_state` moves the one before the newest token to row 0: the only copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import onnxruntime as ort

from shortstack.graphs import names
from shortstack.graphs.bundle import Bundle
from shortstack.graphs.kv_map import borrowed, iterated_producers
from shortstack.runtime.engine.binding import Binding, Tensor
from shortstack.runtime.engine.cache import KVCache
from shortstack.runtime.engine.decoder import Head
from shortstack.runtime.engine.draft_vocab import read_draft_vocab
from shortstack.runtime.engine.passes import PrefillPasses, run_passes
from shortstack.runtime.engine.session import Device

WINDOW_ROWS = 16
PREFILL_ROWS = 256


class Stack:
    """The :class:`~shortstack.runtime.engine.decoder.LeveledDecoder` over a bundle's sessions.

    Args:
        bundle: The bundle.
        sessions: Its sessions, bottom to top.
        cache: The KV buffers.
        devices: Where each session computes.
        exit_layers: The exits that are used, each by the number of layers run before it, ascending. Without any the
            stack is uncut: a "draft" runs nothing and verifying runs every segment.
        prefill_passes: Over a prompt, in models with iterated groups.
    """

    def __init__(
        self,
        bundle: Bundle,
        sessions: Sequence[ort.InferenceSession],
        cache: KVCache,
        devices: Sequence[Device],
        exit_layers: Sequence[int] = (),
        prefill_passes: PrefillPasses = "converged",
    ) -> None:
        manifest = bundle.manifest
        self._segments = manifest.plan.segments
        self._sessions = sessions
        self._cache = cache
        self._devices = devices
        spec = manifest.spec
        self._kv_map = spec.kv_map
        self._prefill_passes = prefill_passes
        # By segment, the producers of the iterated groups that it holds.
        self._iterated = [iterated_producers(spec.kv_map, s.start, s.end) for s in self._segments]
        self._first_alone = not all(spec.sees_itself(layer) for layer in range(spec.num_hidden_layers))
        self._owners = [tuple(manifest.cache_types(segment)) for segment in self._segments]
        self._exits = [manifest.plan.exit_of(segment) for segment in self._segments]
        edges = [0, *(manifest.plan.boundaries.index(layer) + 1 for layer in exit_layers), len(self._segments)]
        self._levels = [range(start, end) for start, end in pairwise(edges)]
        # The segments from here on own no cache: nothing is missing where they did not run.
        writing = [index for index, owners in enumerate(self._owners) if owners]
        self._stateless = max(writing) + 1
        self.filling_levels = sum(level.start < self._stateless for level in self._levels)
        dtype: np.dtype[np.floating] = np.dtype(manifest.dtype)
        self.window = WINDOW_ROWS
        self.max_length = manifest.max_length
        self.num_layers = manifest.spec.num_hidden_layers
        self.depths = (*exit_layers, self.num_layers)
        self.exit_layer = exit_layers[0] if exit_layers else 0
        used = [self._exits[level[-1]] for level in self._levels[:-1]]
        self.heads: list[Head] = []
        for exit_spec in used:
            assert exit_spec is not None
            ids = read_draft_vocab(bundle, exit_spec)
            vocab = manifest.spec.vocab_size if ids is None else len(ids)
            self.heads.append(Head(WINDOW_ROWS, vocab, dtype, ids, has_gate=exit_spec.has_gate))
        self.final = Head(WINDOW_ROWS, manifest.spec.vocab_size, dtype, None)
        self.exit = self.heads[0] if used else Head(WINDOW_ROWS, manifest.spec.vocab_size, dtype, None)
        self.heads.append(self.final)
        self._ids = np.zeros((1, WINDOW_ROWS + 1), np.int64)
        self.exit.token = self._ids[0, 1:]  # the drafted token is the next row's input: no copy
        self._hidden_size = manifest.spec.hidden_size
        self._dtype = dtype
        self._hidden = [np.zeros((1, WINDOW_ROWS, self._hidden_size), dtype) for _ in self._segments[1:]]
        self._has_state = any(exit_spec is not None and exit_spec.sees_state for exit_spec in used)
        # Without the rows if no exit in use sees a state: other exits of the bundle are bound to none of them.
        self._states = np.zeros((1, WINDOW_ROWS + 1 if self._has_state else 0, self._hidden_size), dtype)
        # Of each segment its own, since levels may run at the same time.
        self._seqlens_k = [np.zeros(1, np.int32) for _ in self._segments]
        self._total = [np.zeros((), np.int32) for _ in self._segments]
        self._num_rows = [np.array(rows, np.int64) for rows in range(WINDOW_ROWS + 1)]
        self._bindings: dict[tuple[int, int, int, int, bool], Binding] = {}
        self._generation = -1
        self._prompt: list[np.ndarray] = []

    def prefill(self, tokens: Sequence[int], past: int, with_logits: bool) -> None:
        """See :meth:`~Decoder.prefill`; long prompts run in chunks."""
        self.reserve(past + len(tokens), past)
        for chunk, start in self._chunks(tokens, past):
            is_end = start + chunk.shape[1] == past + len(tokens)
            self._prefill_chunk(range(len(self._segments)), chunk, chunk, start, is_end, with_logits)

    def prefill_level(self, level: int, tokens: Sequence[int], past: int, with_logits: bool) -> None:
        """See :meth:`~LeveledDecoder.prefill_level`."""
        self.reserve(past + len(tokens), past + (len(tokens) if level else 0))
        kept = self._prompt if level else []
        self._prompt = []
        for index, (chunk, start) in enumerate(self._chunks(tokens, past)):
            below = kept[index] if level else chunk
            is_end = start + chunk.shape[1] == past + len(tokens)
            above = self._prefill_chunk(self._levels[level], chunk, below, start, is_end, with_logits)
            if level < len(self._levels) - 1:
                self._prompt.append(above)

    def put(self, row: int, token: int) -> None:
        """See :meth:`~Decoder.put`."""
        self._ids[0, row] = token

    def draft(self, row: int, past: int, with_head: bool, with_logits: bool) -> None:
        """See :meth:`~Decoder.draft`."""
        if len(self._levels) > 1:
            self.reserve(past + row + 1, past + row)
            self.run(0, row, row + 1, past, 1 if with_head else 0, with_logits)

    def verify(self, rows: int, past: int, with_logits: bool) -> None:
        """See :meth:`~Decoder.verify`."""
        self.reserve(past + rows, past + (rows if len(self._levels) > 1 else 0))
        self.run(len(self._levels) - 1, 0, rows, past, rows, with_logits)

    def run(self, level: int, start: int, end: int, past: int, num_rows: int, with_logits: bool) -> None:
        """See :meth:`LeveledDecoder.run`; bindings are built at their first use."""
        segments = self._levels[level]
        for index in segments:
            has_head = num_rows > 0 and index == segments[-1]
            key = (index, start, end, num_rows if has_head else 0, with_logits and has_head)
            binding = self._bindings.get(key)
            if binding is None:
                binding = self._bindings[key] = self._round_binding(*key, self.heads[level])
            self._set_lengths(index, past + start, end - start)
            for _ in range(end - start if self._iterated[index] else 1):
                binding.run()

    def reserve(self, positions: int, keep: int) -> None:
        """See :meth:`LeveledDecoder.reserve`."""
        if positions > self._cache.capacity or self._generation != self._cache.generation:
            self._bindings.clear()  # before the cache grows: bindings hold its old buffers
            self._cache.reserve(positions, keep)
            self._generation = self._cache.generation

    def hidden(self, level: int, row: int) -> np.ndarray:
        """See :meth:`LeveledDecoder.hidden`."""
        return self._hidden[self._levels[level][-1]][0, row]  # type: ignore[no-any-return]

    def keep_state(self, row: int) -> None:
        """See :meth:`~Decoder.keep_state`."""
        if row and self._has_state:
            self._states[0, 0] = self._states[0, row]

    @property
    def sees_state(self) -> bool:
        """Whether an exit in use sees states."""
        return self._has_state

    def _chunks(self, tokens: Sequence[int], past: int) -> Iterator[tuple[np.ndarray, int]]:
        """Yield the ids [1, rows] of a prompt's chunks, and the position of each one's first."""
        most = 1 if any(self._iterated) and self._prefill_passes == "sequential" else PREFILL_ROWS
        start = 0
        while start < len(tokens):
            rows = 1 if self._first_alone and past + start == 0 else most
            yield np.asarray([tokens[start : start + rows]], dtype=np.int64), past + start
            start += rows

    def _prefill_chunk(
        self, segments: range, ids: np.ndarray, below: np.ndarray, past: int, is_end: bool, with_logits: bool
    ) -> np.ndarray:
        """Run segments over a chunk of a prompt, at its end also the head of the last one; return what it leaves.

        Segments that own no cache run on the prompt's last row only.
        """
        for index in segments:
            if index >= self._stateless:
                if not is_end:
                    return below
                past, ids, below = past + ids.shape[1] - 1, ids[:, -1:], below[:, -1:]
            rows = ids.shape[1]
            above = np.empty((1, rows, self._hidden_size), self._dtype)
            head: dict[str, Tensor] = {}
            if is_end and index == segments[-1]:
                level = next(i for i, level in enumerate(self._levels) if index in level)
                head = self.heads[level].outputs(0, 1, with_logits)
            self._set_lengths(index, past, rows)
            binding = self._bind(index, 0, ids, below, above, head, num_rows=1 if head else 0)
            if rows > 1 and self._iterated[index]:
                run_passes(binding.run, self._cache, self._iterated[index], (past, past + rows), self._prefill_passes)
            else:
                binding.run()
            below = above
        return below

    def _round_binding(self, index: int, start: int, end: int, num_rows: int, with_logits: bool, head: Head) -> Binding:
        """Bind a segment to rows ``[start, end)`` of the round."""
        ids = self._ids[:, start:end]
        below = ids if index == 0 else self._hidden[index - 1][:, start:end]
        above = None if index == len(self._segments) - 1 else self._hidden[index][:, start:end]
        outputs = head.outputs(end - num_rows, end, with_logits) if num_rows else {}
        return self._bind(index, end - num_rows, ids, below, above, outputs, num_rows)

    def _bind(
        self,
        index: int,
        start: int,
        ids: np.ndarray,
        below: np.ndarray,
        above: np.ndarray | None,
        head: dict[str, Tensor],
        num_rows: int,
    ) -> Binding:
        """Bind one run of a segment; ``head`` is what its head writes, for ``num_rows`` rows from row ``start`` on."""
        segment, exit_spec = self._segments[index], self._exits[index]
        inputs: dict[str, Tensor] = {
            names.INPUT_IDS if segment.is_first else names.HIDDEN_STATES: below,
            names.SEQLENS_K: self._seqlens_k[index],
            names.TOTAL_SEQUENCE_LENGTH: self._total[index],
            names.NUM_ROWS: self._num_rows[num_rows],
        }
        outputs: dict[str, Tensor] = dict(head)
        if not segment.is_last and above is not None:
            outputs[names.HIDDEN_STATES_OUT] = above
        if exit_spec is not None and exit_spec.sees_token:
            inputs[names.INPUT_IDS] = ids
        if exit_spec is not None and exit_spec.sees_state:
            inputs[names.EXIT_STATE] = self._states[:, start : start + num_rows]
            if num_rows:
                outputs[names.EXIT_STATE_OUT] = self._states[:, start + 1 : start + 1 + num_rows]
        if segment.is_last and num_rows and self._has_state:
            outputs[names.FINAL_STATE] = self._states[:, start : start + num_rows]
        for part in names.KV_PARTS:
            for owner in self._owners[index]:
                inputs[names.past(owner, part)] = outputs[names.present(owner, part)] = self._cache.buffer(owner, part)
            for layer in borrowed(self._kv_map, segment.start, segment.end):
                inputs[names.shared(layer, part)] = self._cache.buffer(layer, part)
        return Binding(self._sessions[index], inputs, outputs, self._devices[index])

    def _set_lengths(self, index: int, past: int, rows: int) -> None:
        self._seqlens_k[index][0] = past + rows - 1
        self._total[index][...] = past + rows
