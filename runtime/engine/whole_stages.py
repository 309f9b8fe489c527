"""A drafter with keys and values of its own over a whole text: a chain of drafts, or one graph for each draft.

Row p of stage i is the pair of what stage i - 1 gave for it and the token at p + 1 + i
(:mod:`shortstack.graphs.drafter_spec`). A chain has one stage, and a row more for each further draft.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shortstack.runtime.engine.drafter_graphs import DrafterGraphs
from shortstack.runtime.engine.whole_drafter import CachedRows, DraftedRows
from shortstack.runtime.engine.whole_text import Stored


class WholeChain:
    """The :class:`~shortstack.runtime.engine.whole_drafter.WholeDrafter` of layers that draft together.

    Args:
        graphs: The drafter's graphs.
        tokens: The text.
        further: The most drafts of a round.

    Raises:
        ShortstackError: A graph cannot be opened; see :func:`~shortstack.runtime.engine.session.open_sessions`.
    """

    def __init__(self, graphs: DrafterGraphs, tokens: Sequence[int], further: int) -> None:
        self._graph, self._tokens = _stage(graphs, None, len(tokens) + further), list(tokens)
        self._given: Stored = np.zeros((0, 0), np.float32)

    def all_rows(self, states: Stored) -> list[DraftedRows]:
        """See :meth:`WholeDrafter.all_rows`."""
        found = self._graph.run(states[: len(self._tokens) - 1], self._tokens[1:], 0)
        self._given = found.states
        return [found]

    def round(self, length: int) -> _ChainRound:
        """See :meth:`WholeDrafter.round`."""
        return _ChainRound(self._graph, self._given[length - 2], length - 1)


class _ChainRound:
    def __init__(self, graph: CachedRows, state: Stored, true_rows: int) -> None:
        self._graph, self._state, self._true_rows = graph, state, true_rows

    def draft(self, before: Sequence[int]) -> DraftedRows:
        """See :meth:`WholeRound.draft`."""
        found = self._graph.run(self._state[None], before[-1:], self._true_rows + len(before) - 1)
        self._state = found.states[-1]
        return found


class WholeStages:
    """The :class:`~shortstack.runtime.engine.whole_drafter.WholeDrafter` of layers that draft one token each.

    Args:
        graphs: The drafter's graphs.
        tokens: The text.

    Raises:
        ShortstackError: A graph cannot be opened; see :func:`~shortstack.runtime.engine.session.open_sessions`.
    """

    def __init__(self, graphs: DrafterGraphs, tokens: Sequence[int]) -> None:
        drafter = graphs.bundle.manifest.plan.drafter
        assert drafter is not None, "the bundle has no drafter"
        self._stages = [_stage(graphs, number, len(tokens)) for number in range(drafter.stages)]
        self._tokens = list(tokens)
        self._given: list[Stored] = []  # by stage: the states of its true rows

    def all_rows(self, states: Stored) -> list[DraftedRows]:
        """See :meth:`WholeDrafter.all_rows`."""
        found = list[DraftedRows]()
        self._given = []
        for number, stage in enumerate(self._stages):
            if ids := self._tokens[1 + number :]:
                found.append(stage.run(states[: len(ids)], ids, 0))
                states = found[-1].states
            self._given.append(states[: len(ids)])
        return found

    def round(self, length: int) -> _StagesRound:
        """See :meth:`WholeDrafter.round`."""
        return _StagesRound(self._stages, self._given, self._tokens[:length])


class _StagesRound:
    def __init__(self, stages: Sequence[CachedRows], given: Sequence[Stored], tokens: list[int]) -> None:
        self._stages, self._given, self._tokens = stages, given, tokens
        self._drafted = given[0][:0]  # what the stage before gave for rows that pair with drafts

    def draft(self, before: Sequence[int]) -> DraftedRows:
        """See :meth:`WholeRound.draft`: the rows that pair with drafts run anew, at most one for each draft."""
        number, rows = len(before), len(self._tokens) - 1
        true_rows = max(rows - number, 0)
        below = rows - len(self._drafted)  # true rows of the stage before
        states = np.concatenate([self._given[number - 1][true_rows:below], self._drafted])
        ids = [*self._tokens, *before][true_rows + 1 + number :]
        found = self._stages[number].run(states, ids, true_rows)
        self._drafted = found.states
        return found


def _stage(graphs: DrafterGraphs, number: int | None, capacity: int) -> CachedRows:
    """Return a stage with its cache; with None the graph of all layers."""
    manifest = graphs.bundle.manifest
    drafter = manifest.plan.drafter
    assert drafter is not None, "the bundle has no drafter"
    layers = {layer: own for layer, own in enumerate(drafter.layers) if number in (None, layer)}
    head_rows = manifest.spec.vocab_size if drafter.draft_vocab is None else drafter.draft_vocab
    widths = (drafter.hidden_size, head_rows)
    return CachedRows(graphs.drafts(number or 0), graphs.device, layers, capacity, widths, np.dtype(manifest.dtype))
