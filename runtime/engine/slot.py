"""The rows of one sequence among several: what its decoding loop sees, and the parts that it has in packed runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from shortstack.graphs import names
from shortstack.graphs.contract import cache_heads
from shortstack.graphs.kv_map import consumers
from shortstack.runtime.engine.cache import context_error
from shortstack.runtime.engine.drafting import Drafting
from shortstack.runtime.engine.head import Head
from shortstack.runtime.engine.levels import Levels, levels_of
from shortstack.runtime.engine.open_graphs import OpenGraphs
from shortstack.runtime.engine.packed_segment import Part
from shortstack.runtime.engine.round_buffers import RoundBuffers
from shortstack.runtime.engine.slot_cache import SlotCache
from shortstack.runtime.engine.stack import WINDOW_ROWS

NewRows = dict[str, np.ndarray]


@dataclass(slots=True)
class Chunk:
    """A part of a prompt on its way up.

    Attributes:
        ids: Its token ids [1, rows].
        past: Position of the first one.
        is_end: The prompt ends with it.
        hidden: The residual stream [1, rows, hidden] that the segment below left.
        new_rows: Keys and values of its rows that segments above need, by port name.
    """

    ids: np.ndarray
    past: int
    is_end: bool
    hidden: np.ndarray
    new_rows: NewRows = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """How many positions it has."""
        return int(self.ids.shape[1])

    def last(self) -> Chunk:
        """Return its last position alone."""
        return self.split(self.rows - 1)[1] if self.rows > 1 else self

    def split(self, rows: int) -> tuple[Chunk, Chunk]:
        """Return its first positions, fewer than all, and the rest."""
        first = {name: array[:, :rows] for name, array in self.new_rows.items()}
        rest = {name: array[:, rows:] for name, array in self.new_rows.items()}
        return (
            Chunk(self.ids[:, :rows], self.past, False, self.hidden[:, :rows], first),
            Chunk(self.ids[:, rows:], self.past + rows, self.is_end, self.hidden[:, rows:], rest),
        )


class Slot:
    """The :class:`~shortstack.runtime.engine.decoder.LeveledState` of one sequence.

    Args:
        graphs: The bundle's graphs, in the packed form.
        number: Its slot of the cache.
        exit_layers: The exits in use, ascending.
        cache: The cache of all slots, for a drafter that reads it; None where nothing drafts.
    """

    def __init__(
        self, graphs: OpenGraphs, number: int, exit_layers: Sequence[int], cache: SlotCache | None = None
    ) -> None:
        manifest = graphs.bundle.manifest
        spec = manifest.spec
        self.number = number
        self.levels: Levels = levels_of(manifest, exit_layers)
        self._buffers = RoundBuffers(graphs, self.levels, WINDOW_ROWS, None if cache is None else cache.slot(number))
        self._dtype = np.dtype(manifest.dtype)
        self._used_s = 0.0
        self._widths = {
            names.new_rows(owner, part): kv_heads * head_dim
            for owner in set(spec.kv_map)
            if consumers(spec.kv_map, owner)
            for kv_heads, head_dim in [cache_heads(spec, owner)]
            for part in names.KV_PARTS
        }
        self._new_rows = self._new_rows_of(WINDOW_ROWS + 1)
        self.window = WINDOW_ROWS
        self.max_length = manifest.max_length
        self.num_layers = spec.num_hidden_layers
        self.exit_layer = exit_layers[0] if exit_layers else 0
        self.depths = self.levels.depths
        self.filling_levels = self.levels.filling
        self.sees_state = self.levels.has_state
        self.heads: Sequence[Head] = self._buffers.heads
        self.has_drafter = manifest.plan.drafter is not None
        self.exit = self._buffers.exit
        self.final = self._buffers.heads[-1]

    @property
    def drafter(self) -> Drafting:
        """See :attr:`~State.drafter`."""
        return self._buffers.drafter

    def clock(self) -> float:
        """Return the seconds that the sequence has been charged."""
        return self._used_s

    def charge(self, seconds: float) -> None:
        """Add the sequence's share of a run."""
        self._used_s += seconds

    def put(self, row: int, token: int) -> None:
        """See :meth:`~State.put`."""
        self._buffers.put(row, token)

    def keep_state(self, row: int) -> None:
        """See :meth:`~State.keep_state`."""
        self._buffers.keep_state(row)

    def hidden(self, level: int, row: int) -> np.ndarray:
        """See :meth:`~LeveledState.hidden`."""
        return self._buffers.hidden[self.levels.segments[level][-1]][0, row]  # type: ignore[no-any-return]

    def reserve(self, positions: int, keep: int) -> None:
        """See :meth:`~LeveledState.reserve`; a slot has room for the longest context from the start."""
        if positions > self.max_length:
            raise context_error(positions, self.max_length)

    def part(self, segment: int, rows: range, past: int, num_rows: int, with_logits: bool) -> Part:
        """Return the part for a segment on rows of a round.

        Args:
            segment: Which segment.
            rows: The rows.
            past: Position of the round's row 0.
            num_rows: How many of them, the last ones, the head sees, if the segment ends a level.
            with_logits: Whether it returns logits.
        """
        level = self.levels.level_of(segment)
        seen = num_rows if segment == self.levels.segments[level][-1] else 0
        start, end = rows.start, rows.stop
        tensors = self._buffers.round_rows(segment, start, end, seen, self.heads[level], with_logits and seen > 0)
        new_rows = {name: array[:, start:end] for name, array in self._new_rows.items()}
        return Part(self.number, past + start, tensors, seen, new_rows)

    def prompt_part(
        self, segment: int, chunk: Chunk, *, with_head: bool, with_logits: bool
    ) -> tuple[Part, Chunk] | None:
        """Return the part for a segment on a chunk of a prompt, and the chunk as it is above the segment.

        Segments above the last one that owns a cache run on the prompt's last position only: None for other chunks.
        """
        if segment >= self.levels.on_last_row:
            if not chunk.is_end:
                return None
            chunk = chunk.last()
        level = self.levels.level_of(segment)
        has_head = with_head and chunk.is_end and segment == self.levels.segments[level][-1]
        head = self.heads[level] if has_head else None
        tensors, above = self._buffers.prompt_rows(segment, chunk.ids, chunk.past, chunk.hidden, head, with_logits)
        new_rows = self._new_rows_of(chunk.ids.shape[1]) | chunk.new_rows
        part = Part(self.number, chunk.past, tensors, int(has_head), new_rows)
        return part, Chunk(chunk.ids, chunk.past, chunk.is_end, above, new_rows)

    def _new_rows_of(self, rows: int) -> NewRows:
        return {name: np.zeros((1, rows, width), self._dtype) for name, width in self._widths.items()}

    def keep_hidden(self, level: int, chunk: Chunk) -> None:
        """Keep the residual stream that a level left at the end of a prompt where loops look for it."""
        self.hidden(level, 0)[:] = chunk.hidden[0, -1]
