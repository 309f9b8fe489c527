"""The KV buffers of several sequences: one slot each, allocated once.

An owner has one buffer for keys and one for values, [slots, kv_heads, capacity, head_dim], bound as past and present.
The memory of a position is taken when it is first written: the buffers are mapped, and the system gives pages to what
is touched. So a slot can hold the longest context without costing more than the text that it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from shortstack.graphs import names
from shortstack.graphs.names import CacheOwner
from shortstack.graphs.precision import SPARE_ROWS
from shortstack.runtime.engine.cache import CachePlace
from shortstack.runtime.engine.mapped import mapped_zeros


class SlotCache:
    """KV buffers of several sequences.

    Args:
        owners: The buffers of each owner; on the host.
        slots: How many sequences they hold.
        max_length: The longest context, in positions.
        most_rows: The most rows that a run of several slots has in one of them. The kernel wants room for them behind
            the text of every slot.
    """

    def __init__(self, owners: Mapping[CacheOwner, CachePlace], slots: int, max_length: int, most_rows: int) -> None:
        self.slots = slots
        self.max_length = max_length
        self.capacity = max_length + most_rows + SPARE_ROWS
        self._arrays: dict[tuple[CacheOwner, str], np.ndarray] = {}
        for owner, place in owners.items():
            shape = (slots, place.kv_heads, self.capacity, place.head_dim)
            for part in names.KV_PARTS:
                self._arrays[owner, part] = mapped_zeros(shape, np.dtype(place.dtype))

    def buffer(self, owner: CacheOwner, part: str, first: int, end: int) -> ort.OrtValue:
        """Return the slots ``[first, end)`` of an owner's ``key`` or ``value``; no copy."""
        return ort.OrtValue.ortvalue_from_numpy(self._arrays[owner, part][first:end])

    def slot(self, number: int) -> OneSlotCache:
        """Return the cache of one slot."""
        return OneSlotCache(self, number)

    def copy(self, source: int, target: int, positions: int) -> None:
        """Copy the first positions of a slot to another one."""
        for array in self._arrays.values():
            array[target, :, :positions] = array[source, :, :positions]

    def read(self, owner: CacheOwner, slot: int, positions: int) -> list[np.ndarray]:
        """Return copies of a slot's keys and values, [kv_heads, positions, head_dim]."""
        return [self._arrays[owner, part][slot, :, :positions].copy() for part in names.KV_PARTS]


@dataclass(frozen=True, slots=True)
class OneSlotCache:
    """The KV buffers of one slot, which never change.

    Attributes:
        cache: Those of all slots.
        number: Which slot.
    """

    cache: SlotCache
    number: int

    def buffer(self, owner: CacheOwner, part: str) -> ort.OrtValue:
        """Return the slot of an owner's ``key`` or ``value``, [1, kv_heads, capacity, head_dim]; no copy."""
        return self.cache.buffer(owner, part, self.number, self.number + 1)
