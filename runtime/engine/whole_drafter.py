"""Runs a bundle's trained drafter over a whole text, with its head on every row, for comparisons and checks.

What is here serves all kinds. :func:`~shortstack.runtime.engine.whole_drafters.whole_drafter` makes one for a text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnxruntime as ort

from shortstack.graphs import names
from shortstack.graphs.layer_spec import Layer
from shortstack.runtime.engine.binding import Binding, Tensor
from shortstack.runtime.engine.drafter_graphs import DrafterGraphs
from shortstack.runtime.engine.mapped import mapped_zeros
from shortstack.runtime.engine.session import Device
from shortstack.runtime.engine.whole_text import Stored


@dataclass(frozen=True, slots=True)
class DraftedRows:
    """What a run of a drafter gives, in the bundle's own dtype.

    Attributes:
        tokens: Drafts, int64 [rows].
        top_probs: Their probabilities, [rows].
        logits: [rows, n], of the rows of the head that are computed.
        states: The states for the next rows, [rows, hidden].
        logit_ids: Of a head with centroids: the token ids of ``logits``, int64 [rows, n]; None of other heads, which
            compute all rows in their order.
    """

    tokens: np.ndarray
    top_probs: Stored
    logits: Stored
    states: Stored
    logit_ids: np.ndarray | None = None

    def row(self, number: int) -> DraftedRows:
        """Return one row; -1 is the last."""
        at = [number]
        ids = None if self.logit_ids is None else self.logit_ids[at]
        return DraftedRows(self.tokens[at], self.top_probs[at], self.logits[at], self.states[at], ids)


class WholeRound(Protocol):
    """Further drafts after some tokens of the text."""

    def draft(self, before: Sequence[int]) -> DraftedRows:
        """Make the next draft; the last row that is returned is its row.

        Args:
            before: The drafts so far, the first one at least. Each call has one more than the call before it.
        """
        ...


class WholeDrafter(Protocol):
    """A drafter on one text of T tokens."""

    def all_rows(self, states: Stored) -> list[DraftedRows]:
        """Run all rows of the text.

        Args:
            states: What :func:`fused` gives for T - 1 positions or more, [rows, hidden].

        Returns:
            First drafts, of rows 0 to T - 2. Where each layer drafts one token, also those of stage 1, of rows 0 to
            T - 3, and so on.
        """
        ...

    def round(self, length: int) -> WholeRound:
        """Begin a round after the first ``length`` tokens, 2 or more; its first draft is one of :meth:`all_rows`.

        Drafted rows overwrite those of the text that follow them, so rounds go from long to short.
        """
        ...


def fused(graphs: DrafterGraphs, taps: Mapping[str, Stored]) -> Stored:
    """Return the states [seq, hidden] of rows of the model.

    Args:
        graphs: The drafter's graphs.
        taps: What the model leaves, by port, [1, seq, model's hidden] each.
    """
    session, manifest = graphs.fuses(), graphs.bundle.manifest
    if session is None:
        return np.ascontiguousarray(taps[names.DRAFT_STATE][0])
    assert manifest.plan.drafter is not None
    rows = next(iter(taps.values())).shape[1]
    states = np.zeros((1, rows, manifest.plan.drafter.hidden_size), manifest.dtype)
    inputs: dict[str, Tensor] = {name: np.ascontiguousarray(array) for name, array in taps.items()}
    Binding(session, inputs, {names.DRAFT_STATE: states}, graphs.device).run()
    return np.asarray(states[0])


class CachedRows:
    """A graph whose layers have keys and values of their own, with a cache for one text.

    Args:
        session: The graph.
        device: Where it computes.
        layers: Its layers, by their number in the drafter.
        capacity: The most rows.
        widths: Of states, and of logits.
        dtype: Of activations.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        device: Device,
        layers: Mapping[int, Layer],
        capacity: int,
        widths: tuple[int, int],
        dtype: np.dtype[np.generic],
    ) -> None:
        self._session, self._device, self._dtype = session, device, dtype
        self._hidden, self._head_rows = widths
        self._cache = {
            (names.drafter_layer(number), part): mapped_zeros(
                (1, layer.attention.kv_heads, capacity, layer.attention.cache_head_dim), dtype
            )
            for number, layer in layers.items()
            for part in names.KV_PARTS
        }

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
        Binding(self._session, inputs, outputs, self._device).run()
        return DraftedRows(
            found[names.TOKEN][0], found[names.TOP_PROB][0], found[names.LOGITS][0], found[names.DRAFT_STATE_OUT][0]
        )
