"""Runs rows of several sequences through one segment: the packed form of its graph (:mod:`shortstack.graphs.packing`).

A run has *parts*, each the rows of one sequence. The parts' rows are copied side by side, the graph runs once, and what
it gives is copied back. Rows that the head sees come last. Rows are few and thin next to the weights that they
multiply, so the copies cost little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnxruntime as ort

from shortstack.graphs import names
from shortstack.graphs.contract import Port
from shortstack.graphs.kv_map import borrowed, lenders
from shortstack.graphs.precision import SPARE_ROWS
from shortstack.runtime.engine.binder import Rows
from shortstack.runtime.engine.binding import Binding, Tensor
from shortstack.runtime.engine.open_graphs import OpenGraphs
from shortstack.runtime.engine.slot_cache import SlotCache

_ROWS = {names.INPUT_IDS, names.HIDDEN_STATES, names.EXIT_STATE}  # inputs that hold something for each row


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of one sequence in a run.

    Attributes:
        slot: Its slot.
        past: Position of its first row.
        rows: The tensors that the run reads and writes, all views of numpy arrays.
        num_rows: How many of the rows, the last ones, the head sees.
        new_rows: Keys and values [1, rows, width] of producers below or in the segment, by port name: read where the
            graph has an input of that name, written where it has an output.
    """

    slot: int
    past: int
    rows: Rows
    num_rows: int
    new_rows: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many rows it has."""
        return int(self.rows.ids.shape[1])


class PackedSegment:
    """One segment over the slots of one cache.

    Args:
        graphs: The bundle's graphs, in the packed form.
        index: Which segment.
        cache: The KV buffers.
        fewest_rows: The fewest rows that a run must have so that none is rounded in another way, 1 or 2.
    """

    def __init__(self, graphs: OpenGraphs, index: int, cache: SlotCache, fewest_rows: int) -> None:
        manifest = graphs.bundle.manifest
        spec = manifest.spec
        segment = manifest.plan.segments[index]
        contract = manifest.contract(segment, is_packed=True)
        self._session, self._device = graphs.sessions[index], graphs.devices[index]
        self._cache = cache
        self._fewest_rows = fewest_rows
        # Of floats, attention rounds chunks of one row in another way than longer ones, so a spare row follows.
        self._spare = SPARE_ROWS if manifest.cache_type != "int8" else 0
        self._owners = tuple(manifest.cache_types(segment))
        kv_map = spec.kv_map
        self._borrowed = borrowed(kv_map, segment.start, segment.end)
        self._consumers = tuple(j for j in range(segment.start, segment.end) if kv_map[j] != j)
        self._kv_map = kv_map
        self._inputs = {port.name: port for port in contract.inputs}
        self._outputs = {port.name: port for port in contract.outputs}
        self._lends = [
            names.new_rows(j, part) for j in lenders(kv_map, segment.start, segment.end) for part in names.KV_PARTS
        ]
        self._taps = set(manifest.plan.taps_of(segment))
        self._per_row = {names.HIDDEN_STATES_OUT, *self._lends, *self._taps}
        self._borrows = [names.new_rows(j, part) for j in self._borrowed for part in names.KV_PARTS]
        self._bindings: dict[tuple[int, int, frozenset[str]], Binding] = {}

    def run(self, parts: Sequence[Part]) -> None:
        """Run the graph once over the rows of all parts, each of another slot."""
        first, end = min(p.slot for p in parts), max(p.slot for p in parts) + 1
        seen = sum(part.num_rows for part in parts)
        count = sum(part.count for part in parts)
        # A row that would be alone, in the segment or in the head, gets company that belongs to no sequence.
        company = int(self._fewest_rows > 1 and 1 in (count, seen))
        seen_with_company = seen + company if seen else 0
        order = _Order(parts, count, count - seen)
        chunk = max(part.count for part in parts) + self._spare
        inputs: dict[str, Tensor] = {
            **self._lengths(parts, first, end, chunk),
            **order.places(first, end, chunk, company),
            names.NUM_ROWS: np.array(seen_with_company, np.int64),
        }
        if names.ROW_POSITIONS in self._inputs:
            inputs[names.ROW_POSITIONS] = order.positions(company)
        for name in _ROWS & self._inputs.keys() | set(self._borrows):
            inputs[name] = order.gather(self._inputs[name], company)
        outputs = self._room(parts, count + company, seen_with_company)
        self._binding(first, end, frozenset(outputs)).run_with(inputs, outputs)
        self._scatter(order, outputs)

    def _lengths(self, parts: Sequence[Part], first: int, end: int, chunk: int) -> dict[str, Tensor]:
        past_end, query = np.zeros(end - first, np.int32), np.zeros(end - first, np.int32)
        total = chunk
        for part in parts:
            rows = part.count + self._spare
            past_end[part.slot - first] = part.past + rows - 1
            query[part.slot - first] = rows
            total = max(total, part.past + rows)
        return {
            names.SEQLENS_K: past_end,
            names.QUERY_SEQLENS: query,
            names.TOTAL_SEQUENCE_LENGTH: np.array(total, np.int32),
        }

    def _room(self, parts: Sequence[Part], count: int, seen: int) -> dict[str, np.ndarray]:
        """Return arrays for the outputs that some part wants."""
        wanted = {names.HIDDEN_STATES_OUT} if names.HIDDEN_STATES_OUT in self._outputs else set()
        wanted |= set(self._lends) | {name for part in parts for name in part.rows.taps}
        if seen:
            for part in parts:
                wanted |= part.rows.head.keys()
                wanted |= {names.EXIT_STATE_OUT} if part.rows.exit_state_out is not None else set()
                wanted |= {names.FINAL_STATE} if part.rows.final_state is not None else set()
        room = {}
        for name in wanted & self._outputs.keys():
            port = self._outputs[name]
            rows = count if name in self._per_row else seen
            room[name] = np.empty((1, rows, *(int(width) for width in port.shape[2:])), port.dtype)
        return room

    def _scatter(self, order: _Order, outputs: Mapping[str, np.ndarray]) -> None:
        for name, array in outputs.items():
            for part, rows in order.of(name in self._per_row):
                target = _target(part, name)
                if target is not None:
                    target[0] = array[0, rows]

    def _binding(self, first: int, end: int, wanted: frozenset[str]) -> Binding:
        """Return the binding of a range of slots for the outputs that a run wants.

        The cache is bound to it for good; what depends on the run's rows is bound anew in each run.
        """
        key = (first, end, wanted)
        if key not in self._bindings:
            inputs: dict[str, Tensor] = {}
            outputs: dict[str, Tensor] = {}

            def buffer(owner: names.CacheOwner, part: str) -> ort.OrtValue:
                return self._cache.buffer(owner, part, first, end)

            for part in names.KV_PARTS:
                for owner in self._owners:
                    inputs[names.past(owner, part)] = outputs[names.present(owner, part)] = buffer(owner, part)
                for layer in self._borrowed:
                    inputs[names.shared(layer, part)] = buffer(layer, part)
                for layer in self._consumers:
                    outputs[names.present(layer, part)] = buffer(self._kv_map[layer], part)
            self._bindings[key] = Binding(self._session, inputs, outputs, self._device)
        return self._bindings[key]


class _Order:
    """Where the rows of each part lie in the run: those that no head sees first.

    Args:
        parts: The parts.
        count: Rows of all of them.
        first_seen: The first row that the head sees.
    """

    def __init__(self, parts: Sequence[Part], count: int, first_seen: int) -> None:
        self._parts = parts
        self._count = count
        self._first_seen = first_seen
        self._rows: list[np.ndarray] = []
        below, above = 0, first_seen
        for part in parts:
            hidden = part.count - part.num_rows
            self._rows.append(np.r_[below : below + hidden, above : above + part.num_rows])
            below, above = below + hidden, above + part.num_rows

    def of(self, every_row: bool) -> list[tuple[Part, np.ndarray]]:
        """Return each part with its rows in an output of all rows, or in one of those that the head sees."""
        if every_row:
            return list(zip(self._parts, self._rows, strict=True))
        return [
            (part, rows[part.count - part.num_rows :] - self._first_seen)
            for part, rows in zip(self._parts, self._rows, strict=True)
            if part.num_rows
        ]

    def gather(self, port: Port, company: int) -> np.ndarray:
        """Return what the parts have for an input side by side, and a copy of the first row as company."""
        of_all = port.name != names.EXIT_STATE
        own = self.of(of_all)
        count = sum(len(rows) for _, rows in own)
        company = company if count else 0
        joined = np.empty((1, count + company, *(int(width) for width in port.shape[2:])), port.dtype)
        for part, rows in own:
            joined[0, rows] = _source(part, port.name)[0]
        if company:
            joined[0, count:] = joined[0, :1]
        return joined

    def places(self, first: int, end: int, chunk: int, company: int) -> dict[str, Tensor]:
        """Return ``to_slots`` and ``to_rows``; company is read into no slot."""
        to_slots = np.zeros((end - first, chunk), np.int64)
        to_rows = np.zeros((1, self._count + company), np.int64)
        for part, rows in zip(self._parts, self._rows, strict=True):
            slot = part.slot - first
            to_slots[slot, : part.count] = rows
            to_rows[0, rows] = slot * chunk + np.arange(part.count)
        if company:  # any place that holds a row, so that what it reads has been written
            to_rows[0, self._count :] = to_rows[0, 0]
        return {names.TO_SLOTS: to_slots, names.TO_ROWS: to_rows}

    def positions(self, company: int) -> np.ndarray:
        """Return the position of each row in its text, int64 [1, rows]."""
        found = np.zeros((1, self._count + company), np.int64)
        for part, rows in zip(self._parts, self._rows, strict=True):
            found[0, rows] = part.past + np.arange(part.count)
        return found


def _source(part: Part, name: str) -> np.ndarray:
    """Return what a part has for an input, [1, rows, ...]."""
    own = {
        names.INPUT_IDS: part.rows.ids,
        names.HIDDEN_STATES: part.rows.hidden,
        names.EXIT_STATE: part.rows.exit_state,
    }
    found = own[name] if name in own else part.new_rows[name]
    assert found is not None, f"a part has no {name}"
    return found


def _target(part: Part, name: str) -> np.ndarray | None:
    """Return where a part keeps an output; None if it does not."""
    if name in part.rows.head:
        target = part.rows.head[name]
        assert isinstance(target, np.ndarray)
        return target
    if name in part.rows.taps:
        return part.rows.taps[name]
    own = {
        names.HIDDEN_STATES_OUT: part.rows.hidden_out,
        names.EXIT_STATE_OUT: part.rows.exit_state_out,
        names.FINAL_STATE: part.rows.final_state,
    }
    return own.get(name) if name in own else part.new_rows.get(name)
