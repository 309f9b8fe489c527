"""Which sequence runs in which slot, and what slots still hold of texts before.

A slot keeps its text when a generation ends. A new prompt goes to the free slot whose text begins most like it, and
runs from where they differ. If another slot, even a busy one, shares more, what they share is copied: a copy takes
milliseconds where running takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

from shortstack.runtime.decode.sequence import TokenSequence
from shortstack.runtime.engine.open_graphs import OpenGraphs
from shortstack.runtime.engine.slot import Slot
from shortstack.runtime.engine.slot_cache import SlotCache

_WORTH_COPYING = 16  # positions more than the slot's own


class Slots:
    """The slots of one engine.

    Args:
        graphs: The bundle's graphs, in the packed form.
        cache: Its KV buffers.
    """

    def __init__(self, graphs: OpenGraphs, cache: SlotCache) -> None:
        self._graphs = graphs
        self._cache = cache
        self._texts = [TokenSequence() for _ in range(cache.slots)]
        self._free = list(range(cache.slots))  # least recently used first
        self._made: dict[tuple[int, tuple[int, ...]], Slot] = {}

    @property
    def has_free(self) -> bool:
        """Whether a sequence could start."""
        return bool(self._free)

    def take(self, ids: Sequence[int], exit_layers: tuple[int, ...], *, reuses: bool) -> tuple[Slot, TokenSequence]:
        """Return a free slot for a prompt, and its text with what is cached of it."""
        shared = [_shared(text, ids) if reuses else 0 for text in self._texts]
        number = max(self._free, key=lambda free: (shared[free], -len(self._texts[free]), -self._free.index(free)))
        slot = self._slot(number, exit_layers)  # first, so that an error leaves the slot free
        self._free.remove(number)
        text = self._texts[number]
        best = max(range(len(shared)), key=shared.__getitem__)
        if shared[best] >= shared[number] + _WORTH_COPYING:
            text.rewind(0)
            text.tokens.extend(ids[: shared[best]])
            self._cache.copy(best, number, shared[best])
            text.commit(shared[best])
        if not reuses:
            text.rewind(0)
        text.restart(ids)
        return slot, text

    def give_back(self, slot: Slot) -> None:
        """Make a slot free; it keeps its text."""
        self._free.append(slot.number)

    def _slot(self, number: int, exit_layers: tuple[int, ...]) -> Slot:
        key = (number, exit_layers)
        if key not in self._made:
            self._made[key] = Slot(self._graphs, number, exit_layers, self._cache)
        return self._made[key]


def _shared(text: TokenSequence, ids: Sequence[int]) -> int:
    """Return how many cached positions a prompt shares with a text; its last token runs in any case."""
    count = 0
    for old, new in zip(text.tokens[: text.cached], ids[:-1], strict=False):
        if old != new:
            break
        count += 1
    return count
