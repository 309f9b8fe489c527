"""The outputs of a head, row by row: what a choice of tokens reads."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shortstack.graphs import names
from shortstack.runtime.engine.binding import Tensor


class Head:
    """The outputs of one head, row by row.

    Attributes:
        token: The most likely token, int64 [rows].
        top_prob: The probability of that token [rows].
        margin: Its probability minus that of the second most likely token [rows].
        entropy: Entropy of the distribution in nats [rows].
        logits: [rows, vocab]; empty until sampling asks for them.
        ids: Token id of each logit column of a trimmed head, ascending int64; None if the columns are token ids.
        row_ids: Of a head that computes other tokens in each row, their ids in no order, int64 [rows, vocab]; or None.
        gate: Output of the exit's confidence gate, 0..1 [rows]; None without a gate.
    """

    def __init__(
        self,
        rows: int,
        vocab: int,
        dtype: np.dtype[np.floating],
        ids: npt.NDArray[np.int64] | None,
        has_gate: bool = False,
        other_ids: bool = False,
    ) -> None:
        self.token = np.zeros(rows, np.int64)
        self.top_prob = np.zeros(rows, dtype)
        self.margin = np.zeros(rows, dtype)
        self.entropy = np.zeros(rows, dtype)
        self.logits = np.zeros((0, vocab), dtype)
        self.ids = ids
        self.row_ids = np.zeros((rows, vocab), np.int64) if other_ids else None
        self.gate = np.zeros(rows, dtype) if has_gate else None

    def outputs(self, start: int, end: int, with_logits: bool) -> dict[str, Tensor]:
        """Return views of rows ``[start, end)`` by output name, in the shapes of the graph contract."""
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
        if with_logits and self.row_ids is not None:
            views[names.LOGIT_IDS] = self.row_ids[None, start:end]
        return views

    def candidates(self, row: int) -> tuple[np.ndarray, npt.NDArray[np.int64] | None]:
        """Return the logits of a row, and the token ids that they belong to, ascending; None for all ids."""
        if self.row_ids is None:
            return self.logits[row], self.ids
        order = self.row_ids[row].argsort()
        return self.logits[row][order], self.row_ids[row][order]
