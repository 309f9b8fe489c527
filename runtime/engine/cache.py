"""The KV buffers of a model.

An owner is a producer layer or the block of an exit. It has one full-capacity buffer for keys and one for values, each
[1, kv_heads, capacity, head_dim]. Both are bound as past and as present, so a run writes its rows in place. To roll
back, a caller passes a smaller length to the next run: rows beyond that length are never read, and later runs overwrite
them. The capacity grows in chunks, so memory follows the length of the text and not that of the longest context.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from shortstack.graphs import names
from shortstack.graphs.contract import CacheType
from shortstack.graphs.errors import RequestError
from shortstack.graphs.names import CacheOwner
from shortstack.graphs.precision import SPARE_ROWS
from shortstack.runtime.engine.session import Device

log = logging.getLogger(__name__)

CHUNK_POSITIONS = 256


@dataclass(frozen=True, slots=True)
class CachePlace:
    """The buffers of one owner.

    Attributes:
        dtype: Their element type.
        device: What holds them.
        kv_heads: Key/value heads.
        head_dim: Width of one head in the buffers.
    """

    dtype: CacheType
    device: Device
    kv_heads: int
    head_dim: int


def context_error(positions: int, max_length: int) -> RequestError:
    """Return what a text of ``positions`` positions gets that does not fit into a context of ``max_length``."""
    return RequestError(
        "the text is longer than the bundle's context",
        found=f"{positions} positions",
        expected=f"at most {max_length}",
        remedy="shorten the prompt, or export with a larger --max-length",
    )


class KVCache:
    """KV buffers of one sequence.

    Args:
        owners: The buffers of each owner.
        max_length: The longest context, in positions.

    Attributes:
        capacity: Positions that the buffers hold now, without the spare row.
        generation: Goes up whenever the buffers are replaced; bindings to older ones must then be built again.
    """

    def __init__(self, owners: Mapping[CacheOwner, CachePlace], max_length: int) -> None:
        self._owners = dict(owners)
        self._buffers: dict[tuple[CacheOwner, str], ort.OrtValue] = {}
        self._arrays: dict[tuple[CacheOwner, str], np.ndarray] = {}  # of the buffers on the host
        self.max_length = max_length
        self.capacity = 0
        self.generation = 0

    def buffer(self, owner: CacheOwner, part: str) -> ort.OrtValue:
        """Return the buffer of an owner's ``key`` or ``value``."""
        return self._buffers[owner, part]

    @property
    def size_bytes(self) -> int:
        """Memory of all buffers."""
        return sum(buffer.tensor_size_in_bytes() for buffer in self._buffers.values())

    def read(self, owner: CacheOwner, start: int, end: int) -> list[np.ndarray]:
        """Return copies of an owner's keys and values at positions ``[start, end)``, [1, kv_heads, rows, head_dim]."""
        return [self._host(owner, part)[:, :, start:end].copy() for part in names.KV_PARTS]

    def write(self, owner: CacheOwner, start: int, parts: Sequence[np.ndarray]) -> None:
        """Put back keys and values as :meth:`read` returned them, the first at position ``start``."""
        for part, rows in zip(names.KV_PARTS, parts, strict=True):
            array = self._host(owner, part)
            array[:, :, start : start + rows.shape[2]] = rows
            if (owner, part) not in self._arrays:
                self._buffers[owner, part].update_inplace(array)

    def clear(self, owner: CacheOwner, start: int, end: int) -> None:
        """Set an owner's keys and values at positions ``[start, end)`` to zero."""
        self.write(owner, start, [np.zeros_like(part) for part in self.read(owner, start, end)])

    def _host(self, owner: CacheOwner, part: str) -> np.ndarray:
        """Return a buffer's own array, or a copy if the buffer is on another device."""
        if (owner, part) in self._arrays:
            return self._arrays[owner, part]
        copy: np.ndarray = self._buffers[owner, part].numpy()
        return copy

    def reserve(self, positions: int, keep: int) -> None:
        """Make room for ``positions`` positions, and keep the first ``keep`` rows of the present contents.

        Raises:
            RequestError: ``positions`` is more than ``max_length``.
        """
        if positions <= self.capacity:
            return
        if positions > self.max_length:
            raise context_error(positions, self.max_length)
        # Graphs may write one spare row after the last position (Precision.has_spare_row).
        capacity = min(-(-positions // CHUNK_POSITIONS) * CHUNK_POSITIONS, self.max_length) + SPARE_ROWS
        self.generation += 1  # first, so that no binding keeps using the old buffers if memory runs out halfway
        for owner, place in self._owners.items():
            device = place.device
            for part in names.KV_PARTS:
                new = np.zeros((1, place.kv_heads, capacity, place.head_dim), place.dtype)
                if keep:
                    new[:, :, :keep] = self._buffers[owner, part].numpy()[:, :, :keep]
                self._buffers[owner, part] = ort.OrtValue.ortvalue_from_numpy(new, device.kind, device.index)
                if device.is_host:
                    self._arrays[owner, part] = new
        self.capacity = capacity - SPARE_ROWS
        log.info("the cache holds %d positions now: %.1f MB", self.capacity, self.size_bytes / 1e6)
