"""Runs a bundle's trained drafter over a whole text, with its head on every row, for comparisons and checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shortstack.graphs import names
from shortstack.runtime.engine.binding import Binding, Tensor
from shortstack.runtime.engine.drafter_graphs import DrafterGraphs
from shortstack.runtime.engine.drafter_rows import drafter_caches
from shortstack.runtime.engine.whole_text import Stored


@dataclass(frozen=True, slots=True)
class DraftedRows:
    """What a run of a drafter gives, in the bundle's own dtype.

    Attributes:
        tokens: Drafts, int64 [rows].
        top_probs: Their probabilities, [rows].
        logits: [rows, rows of the head].
        states: The states for the next rows, [rows, hidden].
    """

    tokens: np.ndarray
    top_probs: Stored
    logits: Stored
    states: Stored


class WholeDrafter:
    """A drafter with a cache of its own for one text.

    Args:
        graphs: The drafter's graphs.
        capacity: The most rows.

    Raises:
        ShortstackError: A graph cannot be opened; see :func:`~shortstack.runtime.engine.session.open_sessions`.
    """

    def __init__(self, graphs: DrafterGraphs, capacity: int) -> None:
        manifest = graphs.bundle.manifest
        drafter = manifest.plan.drafter
        assert drafter is not None, "the bundle has no drafter"
        self._drafts, self._fuses, self._device = graphs.drafts(), graphs.fuses(), graphs.device
        self._dtype, self._hidden = np.dtype(manifest.dtype), drafter.hidden_size
        self._head_rows = manifest.spec.vocab_size if drafter.draft_vocab is None else drafter.draft_vocab
        self._cache = drafter_caches(drafter, capacity, self._dtype)

    def fused(self, taps: Mapping[str, Stored]) -> Stored:
        """Return the states [seq, hidden] of rows of the model.

        Args:
            taps: What the model leaves, by port, [1, seq, model's hidden] each.
        """
        if self._fuses is None:
            return np.ascontiguousarray(taps[names.DRAFT_STATE][0])
        rows = next(iter(taps.values())).shape[1]
        states = np.zeros((1, rows, self._hidden), self._dtype)
        inputs: dict[str, Tensor] = {name: np.ascontiguousarray(array) for name, array in taps.items()}
        Binding(self._fuses, inputs, {names.DRAFT_STATE: states}, self._device).run()
        return np.asarray(states[0])

    def run(self, states: Stored, ids: Sequence[int], past: int) -> DraftedRows:
        """Run rows that follow ``past`` others; those that were there are overwritten.

        Args:
            states: The state of each row, [rows, hidden].
            ids: The token of each row.
            past: How many rows of the cache they see.
        """
        rows = len(ids)
        inputs: dict[str, Tensor] = {
            names.INPUT_IDS: np.asarray([ids], np.int64),
            names.DRAFT_STATE: np.ascontiguousarray(states[None].astype(self._dtype, copy=False)),
            names.SEQLENS_K: np.array([past + rows - 1], np.int32),
            names.TOTAL_SEQUENCE_LENGTH: np.array(past + rows, np.int32),
            names.NUM_ROWS: np.array(rows, np.int64),
        }
        found = {
            names.TOKEN: np.zeros((1, rows), np.int64),
            names.TOP_PROB: np.zeros((1, rows), self._dtype),
            names.LOGITS: np.zeros((1, rows, self._head_rows), self._dtype),
            names.DRAFT_STATE_OUT: np.zeros((1, rows, self._hidden), self._dtype),
        }
        outputs: dict[str, Tensor] = dict(found)
        for (owner, part), array in self._cache.items():
            inputs[names.past(owner, part)] = outputs[names.present(owner, part)] = array
        Binding(self._drafts, inputs, outputs, self._device).run()
        return DraftedRows(
            found[names.TOKEN][0], found[names.TOP_PROB][0], found[names.LOGITS][0], found[names.DRAFT_STATE_OUT][0]
        )
