"""How the exits in use divide a bundle's segments into levels. This is arithmetic only; nothing runs here.

::

    segments    0    |    1    |    2    |    3            a bundle with exits after 4, 8 and 12 layers
    exits            4         8        12       final
    levels        0       |         1         |   2        the stack that uses exits 4 and 12: heads 4, 12, final
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from shortstack.graphs.manifest import Manifest
from shortstack.graphs.plan import ExitSpec


@dataclass(frozen=True, slots=True)
class Levels:
    """The levels of one stack, bottom to top.

    Attributes:
        segments: The segments of each level; the last segment of a level ends in the level's head.
        depths: Layers run before each level's head; for the last level, all layers of the model.
        exits: The exit of each level but the last.
        first_without_cache: Index of the segment above the last one that owns a cache. From there on a position that
            does not run leaves no hole.
        on_last_row: Index of the segment from which on a prompt runs on its last position only. It is
            ``first_without_cache``, or the number of segments where a drafter reads all positions.
        filling: How many levels, from the bottom, must run on a position to complete its keys and values; 1 or more.
    """

    segments: tuple[range, ...]
    depths: tuple[int, ...]
    exits: tuple[ExitSpec, ...]
    first_without_cache: int
    on_last_row: int
    filling: int

    def __len__(self) -> int:
        return len(self.segments)

    @property
    def has_state(self) -> bool:
        """Whether any exit in use sees states."""
        return any(exit_spec.sees_state for exit_spec in self.exits)

    def level_of(self, segment: int) -> int:
        """Return the level that a segment belongs to."""
        return next(level for level, segments in enumerate(self.segments) if segment in segments)


def levels_of(manifest: Manifest, exit_layers: Sequence[int]) -> Levels:
    """Return a bundle's levels with these exits (ascending) in use; without exits there is one level."""
    plan = manifest.plan
    edges = [0, *(plan.boundaries.index(layer) + 1 for layer in exit_layers), len(plan.segments)]
    segments = tuple(range(start, end) for start, end in pairwise(edges))
    exits = []
    for level in segments[:-1]:
        exit_spec = plan.exit_of(plan.segments[level[-1]])
        assert exit_spec is not None
        exits.append(exit_spec)
    first_without_cache = 1 + max(segment.index for segment in plan.segments if manifest.cache_types(segment))
    return Levels(
        segments,
        (*exit_layers, manifest.spec.num_hidden_layers),
        tuple(exits),
        first_without_cache,
        first_without_cache if plan.drafter is None or plan.drafter.shared else len(plan.segments),
        filling=sum(level.start < first_without_cache for level in segments),
    )
