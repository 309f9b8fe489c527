"""An assistant over a whole text: each row is a run of its own, at the position of the newest token it knows.

The row that drafts after the first n tokens stands at position n - 1, reads the state of position n - 2, and sees what
the model's cache holds of all positions before its own (:mod:`shortstack.graphs.assistant_contract`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shortstack.graphs import names
from shortstack.graphs.assistant_contract import computed_logits
from shortstack.runtime.engine.assistant_rows import SharedCache
from shortstack.runtime.engine.binding import Binding, Tensor
from shortstack.runtime.engine.drafter_graphs import DrafterGraphs
from shortstack.runtime.engine.whole_drafter import DraftedRows
from shortstack.runtime.engine.whole_text import Stored


class WholeAssistant:
    """The :class:`~shortstack.runtime.engine.whole_drafter.WholeDrafter` of an assistant.

    Args:
        graphs: The drafter's graphs.
        tokens: The text.
        cache: What the model left of it.

    Raises:
        ShortstackError: The graph cannot be opened; see :func:`~shortstack.runtime.engine.session.open_sessions`.
    """

    def __init__(self, graphs: DrafterGraphs, tokens: Sequence[int], cache: SharedCache) -> None:
        manifest = graphs.bundle.manifest
        drafter = manifest.plan.drafter
        assert drafter is not None, "the bundle has no drafter"
        self._session, self._device, self._cache, self._tokens = graphs.drafts(), graphs.device, cache, list(tokens)
        self._drafter, self._dtype = drafter, np.dtype(manifest.dtype)
        self._computed = computed_logits(manifest.spec, drafter)
        self._outputs = {port.name for port in manifest.drafter_contracts()[names.DRAFTER_FILE].outputs}
        self._given: Stored = np.zeros((0, 0), np.float32)

    def all_rows(self, states: Stored) -> list[DraftedRows]:
        """See :meth:`WholeDrafter.all_rows`."""
        rows = [
            self.run(state, token, n) for n, (state, token) in enumerate(zip(states, self._tokens[1:], strict=False), 1)
        ]
        ids = [row.logit_ids for row in rows if row.logit_ids is not None]
        found = DraftedRows(
            np.concatenate([row.tokens for row in rows]),
            np.concatenate([row.top_probs for row in rows]),
            np.concatenate([row.logits for row in rows]),
            np.concatenate([row.states for row in rows]),
            np.concatenate(ids) if ids else None,
        )
        self._given = found.states
        return [found]

    def round(self, length: int) -> _AssistantRound:
        """See :meth:`WholeDrafter.round`."""
        return _AssistantRound(self, self._given[length - 2], length - 1)

    def run(self, state: Stored, token: int, position: int) -> DraftedRows:
        """Run one row.

        Args:
            state: Its state, [state].
            token: Its token.
            position: The position of the text's newest token, 1 or more.
        """
        states = state[None, None].astype(self._dtype)
        inputs: dict[str, Tensor] = {
            names.INPUT_IDS: np.array([[token]], np.int64),
            names.DRAFT_STATE: states,
            names.SEQLENS_K: np.array([position], np.int32),
            names.TOTAL_SEQUENCE_LENGTH: np.array(position + 1, np.int32),
        }
        found = {
            names.TOKEN: np.zeros((1, 1), np.int64),
            names.TOP_PROB: np.zeros((1, 1), self._dtype),
            names.LOGITS: np.zeros((1, 1, self._computed), self._dtype),
            names.DRAFT_STATE_OUT: np.zeros_like(states),
        }
        if self._drafter.centroids:
            found[names.LOGIT_IDS] = np.zeros((1, 1, self._computed), np.int64)
        outputs: dict[str, Tensor] = dict(found)
        for layer, owner in enumerate(self._drafter.shared):
            for part in names.KV_PARTS:
                inputs[names.shared(owner, part)] = buffer = self._cache.buffer(owner, part)
                present = names.present(names.drafter_layer(layer), part)
                if present in self._outputs:
                    outputs[present] = buffer
        Binding(self._session, inputs, outputs, self._device).run()
        ids = found[names.LOGIT_IDS][0] if self._drafter.centroids else None
        return DraftedRows(
            found[names.TOKEN][0],
            found[names.TOP_PROB][0],
            found[names.LOGITS][0],
            found[names.DRAFT_STATE_OUT][0],
            ids,
        )


class _AssistantRound:
    def __init__(self, whole: WholeAssistant, state: Stored, position: int) -> None:
        self._whole, self._state, self._position = whole, state, position

    def draft(self, before: Sequence[int]) -> DraftedRows:
        """See :meth:`WholeRound.draft`."""
        found = self._whole.run(self._state, before[-1], self._position)
        self._state = found.states[0]
        return found
