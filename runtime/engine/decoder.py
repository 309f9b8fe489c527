"""What the decoding loops see of a model: its heads, row by row, and the runs they may ask for. Tests script it.

The rows are those of a round, see :mod:`shortstack.runtime.engine.stack`, which is what stands behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shortstack.graphs import names
from shortstack.runtime.engine.binding import Tensor


class Head:
    """What one head said, row by row.

    Attributes:
        token: Most likely token, int64 [rows].
        top_prob: Its probability [rows].
        margin: Its probability minus the next one's [rows].
        entropy: Entropy in nats [rows].
        logits: [rows, vocab]; empty until sampling asks for it.
        ids: Token id of each logit column of a trimmed head, ascending int64; None when columns are token ids.
        gate: What the exit's confidence gate says, 0..1 [rows]; None without a gate.
    """

    def __init__(
        self,
        rows: int,
        vocab: int,
        dtype: np.dtype[np.floating],
        ids: npt.NDArray[np.int64] | None,
        has_gate: bool = False,
    ) -> None:
        self.token = np.zeros(rows, np.int64)
        self.top_prob = np.zeros(rows, dtype)
        self.margin = np.zeros(rows, dtype)
        self.entropy = np.zeros(rows, dtype)
        self.logits = np.zeros((0, vocab), dtype)
        self.ids = ids
        self.gate = np.zeros(rows, dtype) if has_gate else None

    def outputs(self, start: int, end: int, with_logits: bool) -> dict[str, Tensor]:
        """Return views on rows ``[start, end)``, by output name, shaped as the contract says."""
        if with_logits and not len(self.logits):
            self.logits = np.zeros((len(self.token), self.logits.shape[1]), self.logits.dtype)
        views: dict[str, Tensor] = {
            names.TOKEN: self.token[None, start:end],
            names.TOP_PROB: self.top_prob[None, start:end],
            names.MARGIN: self.margin[None, start:end],
            names.ENTROPY: self.entropy[None, start:end],
        }
        if self.gate is not None:
            views[names.GATE] = self.gate[None, start:end]
        if with_logits:
            views[names.LOGITS] = self.logits[None, start:end]
        return views


class Decoder(Protocol):
    """What the loops of plain and self-speculative decoding need of a stack; tests script it."""

    @property
    def window(self) -> int:
        """Rows of one round at most."""
        ...

    @property
    def max_length(self) -> int:
        """Positions of the longest context."""
        ...

    @property
    def num_layers(self) -> int:
        """Layers of the whole model."""
        ...

    @property
    def exit_layer(self) -> int:
        """Layers run before the exit that drafts; 0 for an uncut stack."""
        ...

    @property
    def final(self) -> Head:
        """What the final head said in the last :meth:`prefill` (row 0) or :meth:`verify`."""
        ...

    @property
    def exit(self) -> Head:
        """What the drafting exit said, by row."""
        ...

    def prefill(self, tokens: Sequence[int], past: int, with_logits: bool) -> None:
        """Run all layers over ``tokens`` at positions ``past``...; the final head sees the last one."""
        ...

    def put(self, row: int, token: int) -> None:
        """Set the token of a row."""
        ...

    def draft(self, row: int, past: int, with_head: bool, with_logits: bool) -> None:
        """Run the lowest level on one row; with the head, its token becomes the next row's."""
        ...

    def verify(self, rows: int, past: int, with_logits: bool) -> None:
        """Run the highest level on rows 0..rows-1, the final head on each."""
        ...

    def keep_state(self, row: int) -> None:
        """Say which row of the last :meth:`verify` predicted what is now the newest token; row 0 without a call."""
        ...


class LeveledDecoder(Decoder, Protocol):
    """What early exit needs besides: any number of exits, and levels that run on their own."""

    @property
    def heads(self) -> Sequence[Head]:
        """What each level's head said, by row; the final head is the last."""
        ...

    @property
    def depths(self) -> Sequence[int]:
        """Layers run below each head."""
        ...

    @property
    def filling_levels(self) -> int:
        """How many levels, from the bottom, must run on a position so that no cache lacks it; 1 or more."""
        ...

    def run(self, level: int, start: int, end: int, past: int, num_rows: int, with_logits: bool) -> None:
        """Run a level on rows ``[start, end)``, its head on the last ``num_rows`` of them.

        Levels may run at the same time in different threads, on rows that the level below has left already.
        """
        ...

    def reserve(self, positions: int, keep: int) -> None:
        """Make room in the cache, keeping ``keep`` positions; nothing else may run meanwhile."""
        ...

    def hidden(self, level: int, row: int) -> np.ndarray:
        """Return the residual stream [hidden] that a level but the last left in a row."""
        ...

    def prefill_level(self, level: int, tokens: Sequence[int], past: int, with_logits: bool) -> None:
        """Run one level over a prompt, whose residual stream is kept for the next; its head sees the last one, row 0.

        For prompts that may leave early; levels must come in order, and the last one forgets what was kept.
        """
        ...
