"""Decides which tensor goes to which port. Every run of a segment is bound here.

A stack binds the rows of a round and the chunks of a prompt; :mod:`shortstack.runtime.engine.whole_text` binds a whole
text. Both offer all the tensors they have. The graph's contract (:mod:`shortstack.graphs.contract`) says which of them
the graph takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from shortstack.graphs import names
from shortstack.graphs.kv_map import borrowed, groups_within, producers, targets
from shortstack.runtime.engine.binding import Binding, Tensor
from shortstack.runtime.engine.cache import KVCache
from shortstack.runtime.engine.open_graphs import OpenGraphs
from shortstack.runtime.engine.passes import GroupOwners


@dataclass(frozen=True, slots=True)
class Rows:
    """The tensors of one run over several positions, batch 1. A graph is bound to those that it has a port for.

    Attributes:
        ids: Token ids, int64 [1, rows].
        num_rows: How many of the run's last rows the head sees, int64 [].
        hidden: The residual stream that the segment below left, [1, rows, hidden]; None for the lowest segment.
        hidden_out: Where this segment writes its residual stream, [1, rows, hidden]; None if nothing reads it.
        head: Where the head writes each of its outputs, by name.
        exit_state: The state of the position before each row of the head, [1, num_rows, hidden].
        exit_state_out: Where the exit writes its guess of each row's own state, [1, num_rows, hidden]; None if nothing
            reads it.
        final_state: Where the final head writes the whole model's state of each row, [1, num_rows, hidden]; None if
            nothing reads it.
        taps: Where the segment writes what a drafter reads, [1, rows, hidden] each, by port.
    """

    ids: np.ndarray
    num_rows: np.ndarray
    hidden: np.ndarray | None = None
    hidden_out: np.ndarray | None = None
    head: Mapping[str, Tensor] = field(default_factory=dict)
    exit_state: np.ndarray | None = None
    exit_state_out: np.ndarray | None = None
    final_state: np.ndarray | None = None
    taps: Mapping[str, np.ndarray] = field(default_factory=dict)


class SegmentBinder:
    """Binds one segment to one cache, and sets the text length that its runs read.

    Args:
        graphs: The bundle's graphs.
        index: Which segment.
        cache: The KV buffers.

    Attributes:
        index: Which segment, counted from the bottom.
        owners: The cache owners in the segment.
        groups: The segment's iterated groups, bottom to top. If there are any, the segment runs in passes.
    """

    def __init__(self, graphs: OpenGraphs, index: int, cache: KVCache) -> None:
        manifest = graphs.bundle.manifest
        self.index = index
        self._segment = segment = manifest.plan.segments[index]
        kv_map = manifest.spec.kv_map
        self._session, self._device = graphs.sessions[index], graphs.devices[index]
        self._cache = cache
        self._inputs = {port.name for port in manifest.contract(segment).inputs}
        self._borrowed = borrowed(kv_map, segment.start, segment.end)
        self._kv_map = kv_map
        given = {port.name for port in manifest.contract(segment).outputs}
        consumers = (layer for layer in range(segment.start, segment.end) if kv_map[layer] != layer)
        self._rewritten = tuple(j for j in consumers if names.present(j, names.KV_PARTS[0]) in given)
        self.owners = tuple(manifest.cache_types(segment))
        self.groups = tuple(
            GroupOwners(producers(kv_map, group.start, group.end), targets(kv_map, group))
            for group in groups_within(kv_map, segment.start, segment.end)
        )
        # All bindings of the segment read these two.
        self._seqlens_k = np.zeros(1, np.int32)
        self._total = np.zeros((), np.int32)

    def set_lengths(self, past: int, rows: int) -> None:
        """Set the lengths for a next run over ``rows`` positions, which follow ``past`` cached ones."""
        self._seqlens_k[0] = past + rows - 1
        self._total[...] = past + rows

    def bind(self, rows: Rows) -> Binding:
        """Bind one run to the cache's present buffers; a cache that grows replaces them."""
        given: dict[str, Tensor | None] = {
            names.INPUT_IDS: rows.ids,
            names.HIDDEN_STATES: rows.hidden,
            names.SEQLENS_K: self._seqlens_k,
            names.TOTAL_SEQUENCE_LENGTH: self._total,
            names.NUM_ROWS: rows.num_rows,
            names.EXIT_STATE: rows.exit_state,
        }
        inputs = {name: tensor for name, tensor in given.items() if tensor is not None and name in self._inputs}
        outputs = {**rows.head, **rows.taps}
        if not self._segment.is_last and rows.hidden_out is not None:
            outputs[names.HIDDEN_STATES_OUT] = rows.hidden_out
        if names.EXIT_STATE in inputs and rows.exit_state_out is not None:
            outputs[names.EXIT_STATE_OUT] = rows.exit_state_out
        if self._segment.is_last and rows.final_state is not None:
            outputs[names.FINAL_STATE] = rows.final_state
        for part in names.KV_PARTS:
            for owner in self.owners:
                inputs[names.past(owner, part)] = outputs[names.present(owner, part)] = self._cache.buffer(owner, part)
            for layer in self._borrowed:
                inputs[names.shared(layer, part)] = self._cache.buffer(layer, part)
            for layer in self._rewritten:
                outputs[names.present(layer, part)] = self._cache.buffer(self._kv_map[layer], part)
        return Binding(self._session, inputs, outputs, self._device)
