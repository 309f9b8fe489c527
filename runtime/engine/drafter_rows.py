"""A trained drafter on one text: its own keys and values, and the rows of the round that it drafts.

Row p of its cache is the pair of the model's state at position p and the token at p + 1. So with T tokens, rows 0 to
T - 2 are *true*: the model has run all their states. :meth:`DrafterRows.refill` runs the true rows that are missing,
whose last one gives the first draft; each further draft runs one row on the state that the drafter gave for the row
before. Those rows are overwritten by true ones in the next round::

    positions     0 ... T-2 | T-1 ... T+k-3        T tokens, the newest at T-1; k drafts
    rows          true        drafted
    gives         d1 (T-2)    d2 ... dk

The rows that the model runs between two refills are queued as tensors of the model; plain steps leave them too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shortstack.graphs import names
from shortstack.graphs.drafter_spec import DrafterSpec
from shortstack.runtime.engine.binding import Binding, Tensor
from shortstack.runtime.engine.draft_vocab import read_drafter_vocab
from shortstack.runtime.engine.drafter_graphs import DrafterGraphs
from shortstack.runtime.engine.head import Head
from shortstack.runtime.engine.mapped import mapped_zeros
from shortstack.runtime.engine.taps import RoundTaps

_CHUNK_ROWS = 256  # of a prompt


class DrafterRows:
    """The drafter of one sequence.

    Args:
        graphs: The drafter's graphs.
        taps: What the sequence's model leaves for it.
        rows: The most rows of a round.

    Attributes:
        head: Outputs of its head: row 0 of the refill, row r of draft r + 1.
        most_drafts: How many tokens it can draft in a round.
        warn_of_overflow: See :meth:`DrafterGraphs.warn_of_overflow`.

    Raises:
        ShortstackError: A graph cannot be opened; see :func:`~shortstack.runtime.engine.session.open_sessions`.
    """

    def __init__(self, graphs: DrafterGraphs, taps: RoundTaps, rows: int) -> None:
        manifest = graphs.bundle.manifest
        drafter = manifest.plan.drafter
        assert drafter is not None, "the bundle has no drafter"
        self._drafts, self._fuses, self._device = graphs.drafts(), graphs.fuses(), graphs.device
        self._taps, self._spec, self.most_drafts = taps, drafter, rows
        self.warn_of_overflow = graphs.warn_of_overflow
        self._dtype = np.dtype(manifest.dtype)
        self._capacity = manifest.max_length + rows
        ids = read_drafter_vocab(graphs.bundle)
        self.head = Head(rows, manifest.spec.vocab_size if ids is None else len(ids), self._dtype, ids)
        self._cache = drafter_caches(drafter, self._capacity, self._dtype)
        self._filled = 0  # true rows in the cache
        self._tokens: list[int] = []  # the text that they belong to: one token more than rows
        self._queued: list[dict[str, np.ndarray]] = []  # what the model left of the rows that follow them
        self._waiting = 0  # rows of these
        self._ids = np.zeros((1, rows), np.int64)
        self._states = np.zeros((1, rows + 1, drafter.hidden_size), self._dtype)
        self._pair_ids = np.zeros((1, rows), np.int64)
        self._pair_states = np.zeros((1, rows, drafter.hidden_size), self._dtype)
        self._past_end, self._total = np.zeros(1, np.int32), np.zeros((), np.int32)
        self._num_rows = [np.array(count, np.int64) for count in (0, 1)]
        self._bindings: dict[tuple[int, int, bool], Binding] = {}

    def start(self, tokens: Sequence[int], cached: int) -> int:
        """Begin a text; return how many of its cached positions may stay, so that the drafter sees all that follows.

        Args:
            tokens: The prompt.
            cached: How many of its positions the model's cache holds.
        """
        common = 0
        for old, new in zip(self._tokens, tokens, strict=False):
            if old != new:
                break
            common += 1
        self._filled = min(self._filled, max(common - 1, 0), cached)
        self._queued.clear()
        self._waiting = 0
        self._taps.take_prompt()
        self._taps.keeps_prompts = True
        return self._filled

    def end(self) -> None:
        """End the text: prompts of other generations need not be kept."""
        self._taps.keeps_prompts = False

    def keep_round(self, rows: int) -> None:
        """Queue the first rows of the round that the model has just judged; they belong to the text."""
        self._take_prompt()
        self._queue({name: array.copy() for name, array in self._taps.round(rows).items()})

    def is_behind(self) -> bool:
        """Return whether more true rows are missing than a round leaves: a prompt's, or those of many plain steps."""
        self._take_prompt()
        return self._waiting > self._pair_ids.shape[1]

    def catch_up(self, tokens: Sequence[int]) -> None:
        """Run the true rows of a text that are missing, but for as many as a round leaves.

        Args:
            tokens: As for :meth:`refill`.
        """
        self._run_queued(tokens, self._waiting - self._pair_ids.shape[1], has_head=False, with_logits=False)

    def refill(self, tokens: Sequence[int], with_logits: bool) -> None:
        """Run all true rows of a text that are missing; the head sees the last one, as row 0.

        Args:
            tokens: The text; the model has run all its positions but the last.
            with_logits: Whether the head returns logits.
        """
        self._take_prompt()
        assert self._filled + self._waiting == len(tokens) - 1, "rows of the text were not queued"
        self._run_queued(tokens, self._waiting, has_head=True, with_logits=with_logits)

    def put(self, row: int, token: int) -> None:
        """Set the token of a drafted row, 1 or later."""
        self._ids[0, row] = token

    def step(self, row: int, with_logits: bool) -> None:
        """Run a drafted row, 1 or later; its head's outputs are row ``row``."""
        self._set_lengths(self._filled + row - 1, 1)
        key = (-row, 1, with_logits)
        if key not in self._bindings:
            inputs = {names.INPUT_IDS: self._ids[:, row : row + 1], names.DRAFT_STATE: self._states[:, row : row + 1]}
            self._bindings[key] = self._bind(inputs, row, with_logits)
        self._bindings[key].run()

    def _take_prompt(self) -> None:
        for past, tensors in self._taps.take_prompt():
            assert past == self._filled + self._waiting, "a part of the prompt was not kept"
            self._queue(tensors)

    def _queue(self, tensors: dict[str, np.ndarray]) -> None:
        self._queued.append(tensors)
        self._waiting += len(next(iter(tensors.values())))

    def _run_queued(self, tokens: Sequence[int], rows: int, *, has_head: bool, with_logits: bool) -> None:
        """Run the first of the queued rows; the head, where it has to, sees the last of them."""
        self._tokens = list(tokens)
        queued = {name: np.concatenate([own[name] for own in self._queued]) for name in self._taps.names}
        for start in range(0, rows, _CHUNK_ROWS):
            end = min(start + _CHUNK_ROWS, rows)
            first = self._filled + 1
            ids = np.asarray(tokens[first : first + end - start], np.int64)
            tensors = {name: array[start:end] for name, array in queued.items()}
            self._run_pairs(ids, tensors, has_head and end == rows, with_logits)
            self._filled += end - start
        self._waiting -= rows
        self._queued = [{name: array[rows:] for name, array in queued.items()}] if self._waiting else []

    def _run_pairs(self, ids: np.ndarray, tensors: dict[str, np.ndarray], has_head: bool, with_logits: bool) -> None:
        count = len(ids)
        self._set_lengths(self._filled, count)
        states = self._fused(tensors)
        if count > self._pair_ids.shape[1]:
            inputs: dict[str, np.ndarray] = {names.INPUT_IDS: ids[None], names.DRAFT_STATE: states}
            self._bind(inputs, 0 if has_head else None, with_logits).run()
            return
        self._pair_ids[0, :count] = ids
        self._pair_states[:, :count] = states
        key = (count, int(has_head), with_logits)
        if key not in self._bindings:
            inputs = {names.INPUT_IDS: self._pair_ids[:, :count], names.DRAFT_STATE: self._pair_states[:, :count]}
            self._bindings[key] = self._bind(inputs, 0 if has_head else None, with_logits)
        self._bindings[key].run()

    def _fused(self, tensors: dict[str, np.ndarray]) -> np.ndarray:
        """Return the states [1, rows, hidden] of rows of the model."""
        if self._fuses is None:
            return np.ascontiguousarray(tensors[names.DRAFT_STATE][None])
        inputs: dict[str, Tensor] = {name: np.ascontiguousarray(array[None]) for name, array in tensors.items()}
        rows = len(next(iter(tensors.values())))
        states = np.zeros((1, rows, self._spec.hidden_size), self._dtype)
        Binding(self._fuses, inputs, {names.DRAFT_STATE: states}, self._device).run()
        return states

    def _set_lengths(self, past: int, rows: int) -> None:
        self._past_end[0] = past + rows - 1
        self._total[...] = past + rows

    def _bind(self, rows: dict[str, np.ndarray], head_row: int | None, with_logits: bool) -> Binding:
        """Return a binding of rows; the head sees the last one and writes to ``head_row``, or sees none."""
        inputs: dict[str, Tensor] = {
            **rows,
            names.SEQLENS_K: self._past_end,
            names.TOTAL_SEQUENCE_LENGTH: self._total,
            names.NUM_ROWS: self._num_rows[head_row is not None],
        }
        outputs: dict[str, Tensor] = {}
        if head_row is not None:
            outputs |= self.head.outputs(head_row, head_row + 1, with_logits)
            outputs[names.DRAFT_STATE_OUT] = self._states[:, head_row + 1 : head_row + 2]
        for (owner, part), array in self._cache.items():
            inputs[names.past(owner, part)] = outputs[names.present(owner, part)] = array
        return Binding(self._drafts, inputs, outputs, self._device)


def drafter_caches(
    drafter: DrafterSpec, capacity: int, dtype: np.dtype[np.generic]
) -> dict[tuple[str, str], np.ndarray]:
    """Return a drafter's keys and values for a text of ``capacity`` rows, by layer and part."""
    found = {}
    for layer, own in enumerate(drafter.layers):
        shape = (1, own.attention.kv_heads, capacity, own.attention.cache_head_dim)
        for part in names.KV_PARTS:
            found[names.drafter_layer(layer), part] = mapped_zeros(shape, dtype)
    return found
