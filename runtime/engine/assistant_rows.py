"""An assistant on one text: a drafter that reads the keys and values of the model's own cache.

It keeps nothing of the text but one state. With T tokens, the model has run positions 0 to T - 2, and the state of the
last of them, which predicted the newest token, starts a round::

    positions     0 ... T-2 | T-1             T tokens, the newest at T-1
    model's K,V   all       | none yet
    draft 1       token T-1, state of T-2     at position T-1
    draft r + 1   draft r, its state          at position T-1

So there is no prompt to run, nothing to refill, and a rejected draft leaves nothing behind. The model's buffers may
grow, and are others then (:class:`~shortstack.runtime.engine.cache.KVCache`). Whoever replaces them calls
:meth:`AssistantRows.release`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import onnxruntime as ort

from shortstack.graphs import names
from shortstack.graphs.assistant_contract import computed_logits
from shortstack.runtime.engine.binding import Binding, Tensor
from shortstack.runtime.engine.draft_vocab import read_drafter_vocab
from shortstack.runtime.engine.drafter_graphs import DrafterGraphs
from shortstack.runtime.engine.head import Head
from shortstack.runtime.engine.taps import RoundTaps


class SharedCache(Protocol):
    """The model's cache of one sequence."""

    def buffer(self, owner: names.CacheOwner, part: str) -> ort.OrtValue:
        """Return the buffer of an owner's ``key`` or ``value``, [1, kv_heads, capacity, head_dim]."""
        ...


class AssistantRows:
    """The :class:`~shortstack.runtime.engine.drafting.Drafting` of an assistant.

    Args:
        graphs: The drafter's graphs.
        taps: What the sequence's model leaves for it.
        rows: The most rows of a round.
        cache: The sequence's cache.

    Attributes:
        head: Outputs of its head: row r of draft r + 1.
        most_drafts: How many tokens it can draft in a round.
        warn_of_overflow: See :meth:`DrafterGraphs.warn_of_overflow`.

    Raises:
        ShortstackError: The graph cannot be opened; see :func:`~shortstack.runtime.engine.session.open_sessions`.
    """

    def __init__(self, graphs: DrafterGraphs, taps: RoundTaps, rows: int, cache: SharedCache) -> None:
        manifest = graphs.bundle.manifest
        drafter = manifest.plan.drafter
        assert drafter is not None, "the bundle has no drafter"
        assert drafter.shared, "the drafter has keys and values of its own"
        self._session, self._device, self.most_drafts = graphs.drafts(), graphs.device, rows
        self.warn_of_overflow = graphs.warn_of_overflow
        self._taps, self._cache, self._owners = taps, cache, drafter.shared
        contract = manifest.drafter_contracts()[names.DRAFTER_FILE]
        self._outputs = {port.name for port in contract.outputs}
        dtype, count = np.dtype(manifest.dtype), computed_logits(manifest.spec, drafter)
        ids = read_drafter_vocab(graphs.bundle)
        self.head = Head(rows, count, dtype, ids, other_ids=drafter.centroids > 0)
        self._ids = np.zeros((1, rows + 1), np.int64)
        self._states = np.zeros((1, rows + 1, drafter.state_width), dtype)
        self._position, self._total = np.zeros(1, np.int32), np.zeros((), np.int32)
        self._bindings: dict[tuple[int, bool], Binding] = {}

    def start(self, tokens: Sequence[int], cached: int) -> int:
        """Begin a text; all of its cached positions may stay, since the model runs the last one of a prompt."""
        self._taps.take_prompt()
        self._taps.keeps_prompts = True
        return cached

    def end(self) -> None:
        """End the text: prompts of other generations need not be kept."""
        self._taps.keeps_prompts = False

    def keep_round(self, rows: int) -> None:
        """Keep the state of the row that predicted the newest token: the last of those that belong to the text."""
        self._taps.take_prompt()
        self._states[0, 0] = self._taps.round(rows)[names.DRAFT_STATE][rows - 1]

    def is_behind(self) -> bool:
        """Return that it never is."""
        return False

    def catch_up(self, tokens: Sequence[int]) -> None:
        """Do nothing: there are no rows to catch up with."""

    def refill(self, tokens: Sequence[int], with_logits: bool) -> None:
        """Run the first draft of a round; its head's outputs are row 0.

        Args:
            tokens: The text; the model has run all its positions but the last, one at least.
            with_logits: Whether the head returns logits.
        """
        for _, tensors in self._taps.take_prompt():
            self._states[0, 0] = tensors[names.DRAFT_STATE][-1]
        assert len(tokens) > 1, "there is nothing to attend to"
        self._position[0], self._total[...] = len(tokens) - 1, len(tokens)
        self._ids[0, 0] = tokens[-1]
        self.step(0, with_logits)

    def put(self, row: int, token: int) -> None:
        """Set the token of a row, 1 or later."""
        self._ids[0, row] = token

    def step(self, row: int, with_logits: bool) -> None:
        """Run a row; its head's outputs are row ``row``."""
        key = (row, with_logits)
        if key not in self._bindings:
            self._bindings[key] = self._bind(row, with_logits)
        self._bindings[key].run()

    def release(self) -> None:
        """Let go of the model's buffers, which are about to be replaced."""
        self._bindings.clear()

    def _bind(self, row: int, with_logits: bool) -> Binding:
        inputs: dict[str, Tensor] = {
            names.INPUT_IDS: self._ids[:, row : row + 1],
            names.DRAFT_STATE: self._states[:, row : row + 1],
            names.SEQLENS_K: self._position,
            names.TOTAL_SEQUENCE_LENGTH: self._total,
        }
        outputs: dict[str, Tensor] = {
            **self.head.outputs(row, row + 1, with_logits),
            names.DRAFT_STATE_OUT: self._states[:, row + 1 : row + 2],
        }
        for layer, owner in enumerate(self._owners):
            for part in names.KV_PARTS:
                inputs[names.shared(owner, part)] = buffer = self._cache.buffer(owner, part)
                present = names.present(names.drafter_layer(layer), part)
                if present in self._outputs:
                    outputs[present] = buffer
        return Binding(self._session, inputs, outputs, self._device)
