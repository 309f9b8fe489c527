"""The segments of one model over one cache: prefill, draft one position, verify several. Batch 1.

A *round* lays its positions out in rows of small buffers that all graphs share::

    row               0    1    2   ...  window - 1
    ids   [1, w+1]    x0   d1   d2  ...              token ids; row r's draft writes its token to row r + 1
    state [1, w+1, h] s    g1   g2  ...              the state of the position before each row, as far as known
    hidden[1, w, h]   ·    ·    ·                    per boundary: what the segment below left for the one above
    final [1, w]      p1   p2   p3                   what the final head says after row r

Row r sits at position ``past + r`` of the sequence. Drafting runs the lower segments on one row; verifying runs the
upper segments once on all rows. Nothing is copied between the graphs: each writes where the next one reads. Knows
nothing about acceptance, sampling or text.

States are kept where the drafting exit sees them. s is the whole model's; row r's draft leaves the exit's guess of its
own position's state in row r + 1. Then verifying, which ends the round, leaves the whole model's state of row r's own
position in row r, and :meth:`Stack.keep_state` moves the one before the newest token to row 0: the only copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from shortstack.graphs import names
from shortstack.graphs.bundle import Bundle
from shortstack.graphs.kv_map import borrowed
from shortstack.runtime.cache import KVCache
from shortstack.runtime.draft_vocab import read_draft_vocab
from shortstack.runtime.plan import Plan, Tensor
from shortstack.runtime.session import Device

WINDOW_ROWS = 16
PREFILL_ROWS = 256


class Head:
    """What one head said, row by row.

    Attributes:
        token: Most likely token, int64 [rows].
        top_prob: Its probability [rows].
        margin: Its probability minus the next one's [rows].
        entropy: Entropy in nats [rows].
        logits: [rows, vocab]; empty until sampling asks for it.
        ids: Token id of each logit column of a trimmed head, ascending int64; None when columns are token ids.
        gate: What the exit's confidence gate says, 0..1 [rows]; None without a gate.
    """

    def __init__(
        self,
        rows: int,
        vocab: int,
        dtype: np.dtype[np.floating],
        ids: npt.NDArray[np.int64] | None,
        has_gate: bool = False,
    ) -> None:
        self.token = np.zeros(rows, np.int64)
        self.top_prob = np.zeros(rows, dtype)
        self.margin = np.zeros(rows, dtype)
        self.entropy = np.zeros(rows, dtype)
        self.logits = np.zeros((0, vocab), dtype)
        self.ids = ids
        self.gate = np.zeros(rows, dtype) if has_gate else None

    def outputs(self, start: int, end: int, with_logits: bool) -> dict[str, Tensor]:
        """Return views on rows ``[start, end)``, by output name, shaped as the contract says."""
        if with_logits and not len(self.logits):
            self.logits = np.zeros((len(self.token), self.logits.shape[1]), self.logits.dtype)
        views: dict[str, Tensor] = {
            names.TOKEN: self.token[None, start:end],
            names.TOP_PROB: self.top_prob[None, start:end],
            names.MARGIN: self.margin[None, start:end],
            names.ENTROPY: self.entropy[None, start:end],
        }
        if self.gate is not None:
            views[names.GATE] = self.gate[None, start:end]
        if with_logits:
            views[names.LOGITS] = self.logits[None, start:end]
        return views


class Decoder(Protocol):
    """What the decoding loops need of a stack; tests script it."""

    @property
    def window(self) -> int:
        """Rows of one round at most."""
        ...

    @property
    def max_length(self) -> int:
        """Positions of the longest context."""
        ...

    @property
    def final(self) -> Head:
        """What the final head said in the last :meth:`prefill` (row 0) or :meth:`verify`."""
        ...

    @property
    def exit(self) -> Head:
        """What the drafting exit said, by row."""
        ...

    def prefill(self, tokens: Sequence[int], past: int, with_logits: bool) -> None:
        """Run all layers over ``tokens`` at positions ``past``...; the final head sees the last one."""
        ...

    def put(self, row: int, token: int) -> None:
        """Set the token of a row."""
        ...

    def draft(self, row: int, past: int, with_head: bool, with_logits: bool) -> None:
        """Run the lower segments on one row; with the head, its token becomes the next row's."""
        ...

    def verify(self, rows: int, past: int, with_logits: bool) -> None:
        """Run the upper segments on rows 0..rows-1, the final head on each."""
        ...

    def keep_state(self, row: int) -> None:
        """Say which row of the last :meth:`verify` predicted what is now the newest token; row 0 without a call."""
        ...


class Stack:
    """The :class:`Decoder` over a bundle's sessions.

    Args:
        bundle: The bundle.
        sessions: Its sessions, bottom to top.
        cache: The KV buffers.
        device: Where the sessions compute.
        exit_layer: Which exit drafts: the number of layers run before it. None for an uncut stack, where a "draft" runs
            nothing and verifying runs every segment.
    """

    def __init__(
        self,
        bundle: Bundle,
        sessions: Sequence[ort.InferenceSession],
        cache: KVCache,
        device: Device,
        exit_layer: int | None,
    ) -> None:
        manifest = bundle.manifest
        self._segments = manifest.plan.segments
        self._sessions = sessions
        self._cache = cache
        self._device = device
        self._kv_map = manifest.spec.kv_map
        self._owners = [tuple(manifest.cache_types(segment)) for segment in self._segments]
        self._lower = 0 if exit_layer is None else manifest.plan.boundaries.index(exit_layer) + 1
        dtype: np.dtype[np.floating] = np.dtype(manifest.dtype)
        self._exits = [manifest.plan.exit_of(segment) for segment in self._segments]
        drafting = self._exits[self._lower - 1] if self._lower else None
        ids = read_draft_vocab(bundle, drafting) if drafting else None
        vocab = manifest.spec.vocab_size if ids is None else len(ids)
        self.window = WINDOW_ROWS
        self.max_length = manifest.max_length
        self.final = Head(WINDOW_ROWS, manifest.spec.vocab_size, dtype, None)
        self.exit = Head(WINDOW_ROWS, vocab, dtype, ids, has_gate=drafting is not None and drafting.has_gate)
        self._ids = np.zeros((1, WINDOW_ROWS + 1), np.int64)
        self.exit.token = self._ids[0, 1:]  # the drafted token is the next row's input: no copy
        self._hidden_size = manifest.spec.hidden_size
        self._dtype = dtype
        self._hidden = [np.zeros((1, WINDOW_ROWS, self._hidden_size), dtype) for _ in self._segments[1:]]
        self._has_state = drafting is not None and drafting.sees_state
        # Without the rows if the drafting exit sees no state: other exits of the bundle are bound to none of them.
        self._states = np.zeros((1, WINDOW_ROWS + 1 if self._has_state else 0, self._hidden_size), dtype)
        self._seqlens_k = np.zeros(1, np.int32)
        self._total = np.zeros((), np.int32)
        self._num_rows = [np.array(rows, np.int64) for rows in range(WINDOW_ROWS + 1)]
        self._plans: dict[tuple[int, int, int, int, bool], Plan] = {}
        self._generation = -1

    def prefill(self, tokens: Sequence[int], past: int, with_logits: bool) -> None:
        """See :meth:`Decoder.prefill`; long prompts run in chunks."""
        self._reserve(past + len(tokens), past)
        for start in range(0, len(tokens), PREFILL_ROWS):
            chunk = np.asarray([tokens[start : start + PREFILL_ROWS]], dtype=np.int64)  # [1, rows]
            rows = chunk.shape[1]
            is_end = start + rows == len(tokens)
            self._set_lengths(past + start, rows)
            below: np.ndarray = chunk
            for segment in self._segments:
                above = np.empty((1, rows, self._hidden_size), self._dtype)
                head = self.final.outputs(0, 1, with_logits) if segment.is_last and is_end else {}
                self._plan(segment.index, 0, chunk, below, above, head, num_rows=1 if head else 0).run()
                below = above

    def put(self, row: int, token: int) -> None:
        """See :meth:`Decoder.put`."""
        self._ids[0, row] = token

    def draft(self, row: int, past: int, with_head: bool, with_logits: bool) -> None:
        """See :meth:`Decoder.draft`."""
        self._reserve(past + row + 1, past + row)
        self._set_lengths(past + row, 1)
        for index in range(self._lower):
            is_exit = with_head and index == self._lower - 1
            self._run(index, row, row + 1, 1 if is_exit else 0, with_logits and is_exit)

    def verify(self, rows: int, past: int, with_logits: bool) -> None:
        """See :meth:`Decoder.verify`."""
        self._reserve(past + rows, past + (rows if self._lower else 0))
        self._set_lengths(past, rows)
        for index in range(self._lower, len(self._segments)):
            is_last = index == len(self._segments) - 1
            self._run(index, 0, rows, rows if is_last else 0, with_logits and is_last)

    def keep_state(self, row: int) -> None:
        """See :meth:`Decoder.keep_state`."""
        if row and self._has_state:
            self._states[0, 0] = self._states[0, row]

    def _run(self, index: int, start: int, end: int, num_rows: int, with_logits: bool) -> None:
        """Run a segment on rows ``[start, end)`` of the round, through a plan that is built at its first use."""
        key = (index, start, end, num_rows, with_logits)
        plan = self._plans.get(key)
        if plan is None:
            ids = self._ids[:, start:end]
            below = ids if index == 0 else self._hidden[index - 1][:, start:end]
            above = None if index == len(self._segments) - 1 else self._hidden[index][:, start:end]
            head = (self.final if above is None else self.exit).outputs(start, end, with_logits) if num_rows else {}
            plan = self._plan(index, start, ids, below, above, head, num_rows)
            self._plans[key] = plan
        plan.run()

    def _plan(
        self,
        index: int,
        start: int,
        ids: np.ndarray,
        below: np.ndarray,
        above: np.ndarray | None,
        head: dict[str, Tensor],
        num_rows: int,
    ) -> Plan:
        """Bind one run of a segment; ``head`` is what its head writes, for ``num_rows`` rows from row ``start`` on."""
        segment, exit_spec = self._segments[index], self._exits[index]
        inputs: dict[str, Tensor] = {
            names.INPUT_IDS if segment.is_first else names.HIDDEN_STATES: below,
            names.SEQLENS_K: self._seqlens_k,
            names.TOTAL_SEQUENCE_LENGTH: self._total,
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
        return Plan(self._sessions[index], inputs, outputs, self._device)

    def _set_lengths(self, past: int, rows: int) -> None:
        self._seqlens_k[0] = past + rows - 1
        self._total[...] = past + rows

    def _reserve(self, positions: int, keep: int) -> None:
        if positions > self._cache.capacity or self._generation != self._cache.generation:
            self._plans.clear()  # before the cache grows: plans hold its old buffers
            self._cache.reserve(positions, keep)
            self._generation = self._cache.generation
