"""What a frozen model left of some answers, as the rows of a trained drafter.

Row p of a text x is the pair of what the model computed at p and x[p+1]; it drafts x[p+2]. Drafting starts when the
model has said the answer's first token x[s], so at row s - 1. Rows before it only give keys and values::

    positions   0 ... s-2 | s-1 ... n-3      a text of n tokens whose answer begins at s
    rows        keys only | the window: drafted from, and judged against x[s+1] ... x[n-1]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shortstack.samples.recipes.training.features import Features

Row = tuple[int, int]  # a set of features, and a row of it
_BATCHES_SORTED = 8  # so many batches are sorted by length together: little is padding, and the order stays random


@dataclass(frozen=True, slots=True)
class DraftBatch:
    """Some texts; ``rows`` are all rows of all texts one after another, ``window`` is padded behind.

    Attributes:
        features: The model's residual stream, float [rows, depths, hidden].
        next_ids: x[p+1] of each row, int64 [rows].
        positions: p of each row, int64 [rows].
        places: Where among ``rows`` the rows of each text are, int64 [texts, seq]; padding names row 0.
        window: Where among ``rows`` those of each text's window are, int64 [texts, window]; padding names row 0.
        counts: Which rows of the window are no padding, bool [texts, window].
        targets: What the model says behind x[p+1], for the window, int64 [texts, window].
        follows: The text goes on as the model says, for the window, bool [texts, window].
        states: The model's state at p of the window's first row, and at p+1 of each of its rows, divided by its root
            mean square, float [texts, window + 1, hidden].
    """

    features: Tensor
    next_ids: Tensor
    positions: Tensor
    places: Tensor
    window: Tensor
    counts: Tensor
    targets: Tensor
    follows: Tensor
    states: Tensor

    @property
    def tokens(self) -> int:
        """Tokens of all texts: each has two more than rows."""
        return len(self.positions) + 2 * len(self.places)

    @property
    def before(self) -> Tensor:
        """The model's state at p, which says x[p+1], [texts, window, hidden]."""
        return self.states[:, :-1]

    @property
    def state(self) -> Tensor:
        """The model's state at p+1, which says the target, [texts, window, hidden]."""
        return self.states[:, 1:]


def drafted_rows(sets: Sequence[Features], *, held_out: bool) -> list[Row]:
    """Return the texts that leave a row to draft from: those held out, or the others."""
    found = []
    for number, own in enumerate(sets):
        lengths = own.starts[1:] - own.answer_starts
        found += [(number, int(row)) for row in np.flatnonzero((own.is_held_out == held_out) & (lengths >= 2))]
    return found


def load_batch(sets: Sequence[Features], rows: Sequence[Row], depths: Sequence[int]) -> DraftBatch:
    """Read some texts.

    Args:
        sets: The features of each file of answers.
        rows: Which texts.
        depths: Which depths a drafter reads.
    """
    spans = []  # begin, first row of the window, end (exclusive), in positions of the whole set
    for number, row in rows:
        own = sets[number]
        begin, answer, end = int(own.starts[row]), int(own.answer_starts[row]), int(own.starts[row + 1])
        spans.append((own, begin, answer - 1, end - 2))
    lengths = [end - begin for _, begin, _, end in spans]
    widths = [end - first for _, _, first, end in spans]
    starts = np.cumsum([0, *lengths])
    hidden = spans[0][0].state.shape[1]
    features = np.empty((int(starts[-1]), len(depths), hidden), np.float32)
    next_ids, positions = np.empty(len(features), np.int64), np.empty(len(features), np.int64)
    shape = (len(rows), max(widths))
    places, window = np.zeros((len(rows), max(lengths)), np.int64), np.zeros(shape, np.int64)
    counts, follows, targets = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_), np.zeros(shape, np.int64)
    states = np.zeros((shape[0], shape[1] + 1, hidden), np.float32)
    for place, (own, begin, first, end) in enumerate(spans):
        flat = slice(int(starts[place]), int(starts[place + 1]))
        for number, depth in enumerate(depths):
            features[flat, number] = own.hidden[depth][begin:end]
        next_ids[flat] = own.tokens[begin + 1 : end + 1]
        positions[flat] = np.arange(end - begin)
        places[place, : end - begin] = np.arange(flat.start, flat.stop)
        width = end - first
        window[place, :width] = np.arange(flat.stop - width, flat.stop)
        counts[place, :width] = True
        targets[place, :width] = own.targets[first + 1 : end + 1]
        follows[place, :width] = own.targets[first + 1 : end + 1] == own.tokens[first + 2 : end + 2]
        states[place, : width + 1] = own.state[first : end + 1]
    return DraftBatch(
        features=torch.from_numpy(features),
        next_ids=torch.from_numpy(next_ids),
        positions=torch.from_numpy(positions),
        places=torch.from_numpy(places),
        window=torch.from_numpy(window),
        counts=torch.from_numpy(counts),
        targets=torch.from_numpy(targets),
        follows=torch.from_numpy(follows),
        states=torch.from_numpy(states),
    )


class TextOrder:
    """Which texts each step trains on: every text once an epoch, near ones of similar length.

    Args:
        sets: The features of each file.
        rows: The texts.
        size: Texts in a batch.
        seed: Fixes the order.
    """

    def __init__(self, sets: Sequence[Features], rows: Sequence[Row], size: int, seed: int) -> None:
        self._rows, self._size, self._seed = list(rows), min(size, len(rows)), seed
        self._lengths = [int(sets[number].starts[row + 1] - sets[number].starts[row]) for number, row in rows]
        self.per_epoch = len(self._rows) // self._size
        self._epoch, self._batches = -1, list[list[int]]()

    def __getitem__(self, index: int) -> list[Row]:
        epoch, place = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffled(epoch)
        return [self._rows[i] for i in self._batches[place]]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        random = np.random.default_rng((self._seed, epoch))
        order = random.permutation(len(self._rows))[: self.per_epoch * self._size]
        batches: list[list[int]] = []
        for start in range(0, len(order), self._size * _BATCHES_SORTED):
            near = order[start : start + self._size * _BATCHES_SORTED].tolist()
            near.sort(key=self._lengths.__getitem__)
            batches += [near[i : i + self._size] for i in range(0, len(near), self._size)]
        random.shuffle(batches)
        return batches
