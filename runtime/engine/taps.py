"""What a trained drafter reads of its model: the residual stream at some depths, or the normalised final state.

Rounds write into buffers with one row per position; :class:`RoundTaps` hands out their rows. Prompts are kept chunk by
chunk while a drafter wants to see them.
"""

from __future__ import annotations

import numpy as np

from shortstack.graphs.manifest import Manifest


class RoundTaps:
    """The rows that the segments leave for a drafter.

    Args:
        manifest: The bundle.
        rows: The most rows that a round may have.

    Attributes:
        keeps_prompts: Prompts that run are kept for :meth:`take_prompt`.
    """

    def __init__(self, manifest: Manifest, rows: int) -> None:
        plan, self._dtype = manifest.plan, np.dtype(manifest.dtype)
        self._hidden = manifest.spec.hidden_size
        self._of_segment = [plan.taps_of(segment) for segment in plan.segments]
        self._rows = {name: self._empty(rows) for own in self._of_segment for name in own}
        drafter = plan.drafter
        self._reads_all = drafter is None or not drafter.shared
        self._prompt: dict[int, tuple[int, dict[str, np.ndarray]]] = {}  # by position: rows, and their tensors
        self.keeps_prompts = False

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors, in the order of their depths."""
        return tuple(self._rows)

    def of_round(self, segment: int, start: int, end: int) -> dict[str, np.ndarray]:
        """Return where a segment writes rows ``[start, end)`` of a round, by port."""
        return {name: self._rows[name][:, start:end] for name in self._of_segment[segment]}

    def of_prompt(self, segment: int, past: int, count: int, spare: int) -> dict[str, np.ndarray]:
        """Return where a segment writes a chunk of a prompt, by port; nowhere if nobody wants to see it.

        Args:
            segment: Which segment.
            past: Position of the chunk's first row.
            count: Its rows.
            spare: Further rows that are not read.
        """
        if not self.keeps_prompts or not self._of_segment[segment]:
            return {}
        if not self._reads_all and past not in self._prompt:
            self._prompt.clear()  # of the prompt's end alone something is read
        new = {name: self._empty(count + spare) for name in self._of_segment[segment]}
        kept = self._prompt.setdefault(past, (count, {}))[1]
        kept.update(new)
        return new

    def round(self, rows: int) -> dict[str, np.ndarray]:
        """Return the first rows of the last round, [rows, hidden] by name; views, which the next round overwrites."""
        return {name: array[0, :rows] for name, array in self._rows.items()}

    def take_prompt(self) -> list[tuple[int, dict[str, np.ndarray]]]:
        """Return the chunks that ran, each with its position and its tensors [rows, hidden], and forget them."""
        kept, self._prompt = self._prompt, {}
        return [
            (past, {name: array[0, :count] for name, array in tensors.items()})
            for past, (count, tensors) in sorted(kept.items())
        ]

    def _empty(self, rows: int) -> np.ndarray:
        return np.zeros((1, rows, self._hidden), self._dtype)
