"""Batches of cached activations, for training and judging exits without the model.

A span is the part of a row that an exit is evaluated on: the answer, or the whole row for an exit with attention of its
own. Spans of a batch are padded behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shortstack.export.twin.model import Boundary
from shortstack.samples.recipes.training.features import Features


@dataclass(frozen=True, slots=True)
class SpanBatch:
    """Some spans.

    Attributes:
        ids: The text, int64 [batch, seq].
        state: What the whole model holds, float [batch, seq, hidden].
        state_before: The same of the positions before; zeros before a row's first.
        targets: What the whole model predicts next, int64 [batch, seq].
        counts: Positions of answers, the last one left out, bool [batch, seq]; padding is not among them.
        boundaries: By depth, what the stack holds there.
        lengths: Positions of each span without padding.
    """

    ids: Tensor
    state: Tensor
    state_before: Tensor
    targets: Tensor
    counts: Tensor
    boundaries: dict[int, Boundary]
    lengths: tuple[int, ...]


def load_spans(features: Features, rows: Sequence[int], depths: Sequence[int], *, whole_rows: bool) -> SpanBatch:
    """Read the spans of some rows.

    Args:
        features: Where from.
        rows: Which rows.
        depths: Which boundaries.
        whole_rows: Spans begin with the prompt.
    """
    begins = [int((features.starts if whole_rows else features.answer_starts)[row]) for row in rows]
    ends = [int(features.starts[row + 1]) for row in rows]
    lengths = tuple(end - begin for begin, end in zip(begins, ends, strict=True))
    width = max(lengths)

    def padded(array: npt.NDArray[np.generic], shift: int = 0) -> Tensor:
        out = np.zeros((len(rows), width, *array.shape[1:]), np.float32 if array.ndim > 1 else np.int64)
        for place, row in enumerate(rows):
            first = max(begins[place] - shift, int(features.starts[row]))
            begin = first - (begins[place] - shift)
            out[place, begin : lengths[place]] = array[first : ends[place] - shift]
        return torch.from_numpy(out)

    counts = torch.zeros(len(rows), width, dtype=torch.bool)
    for place, row in enumerate(rows):
        first = int(features.answer_starts[row]) - begins[place]
        counts[place, first : max(lengths[place] - 1, first + 1)] = True  # nothing is drafted behind the last token
    return SpanBatch(
        ids=padded(features.tokens),
        state=padded(features.state),
        state_before=padded(features.state, shift=1),
        targets=padded(features.targets),
        counts=counts,
        boundaries={
            depth: Boundary(
                padded(features.hidden[depth]),
                padded(features.middle[depth]) if depth in features.middle else torch.empty(0),
            )
            for depth in depths
        },
        lengths=lengths,
    )


def following(batch: SpanBatch) -> Tensor:
    """Return the text's next token, int64 [batch, seq]; -1 behind the last one and in padding."""
    found = torch.full_like(batch.ids, -1)
    for row, length in enumerate(batch.lengths):
        found[row, : length - 1] = batch.ids[row, 1:length]
    return found


class RowOrder:
    """Which rows each step trains on: every row once an epoch, in an order that seed and epoch fix.

    Args:
        rows: Row numbers.
        size: Rows in a batch.
        seed: Fixes the order.
    """

    def __init__(self, rows: Sequence[int], size: int, seed: int) -> None:
        self._rows = np.asarray(rows)
        self._size = min(size, len(rows))
        self._seed = seed
        self.per_epoch = len(rows) // self._size

    def __getitem__(self, index: int) -> list[int]:
        epoch, place = divmod(index, self.per_epoch)
        order = np.random.default_rng((self._seed, epoch)).permutation(self._rows)
        return order[place * self._size : (place + 1) * self._size].tolist()  # type: ignore[no-any-return]


def held_out_batches(features: Features, size: int) -> Iterator[list[int]]:
    """Yield the held-out rows in their order, some at a time."""
    rows = np.flatnonzero(features.is_held_out).tolist()
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
