"""A trained drafter without a neural net: it drafts as the exit of a scripted model would, after every text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from helpers.scripted import Prefix, ScriptedDecoder, ScriptedModel
from shortstack.runtime.decode.choice import Choice
from shortstack.runtime.decode.draft_length import DraftLength
from shortstack.runtime.decode.runs import solo
from shortstack.runtime.decode.sequence import TokenSequence
from shortstack.runtime.decode.speculative import speculative
from shortstack.runtime.decode.step import Stats, Step
from shortstack.runtime.decode.trained_drafter import TrainedDrafter
from shortstack.runtime.engine.head import Head


class ScriptedRows:
    """What :class:`TrainedDrafter` asks of the drafter of one sequence."""

    most_drafts = 15

    def __init__(self, model: ScriptedModel, decoder: ScriptedDecoder, costs_s: tuple[float, float] = (0, 0)) -> None:
        ids = model.draft_ids
        self._model, self._decoder, self._costs_s = model, decoder, costs_s
        self.head = Head(decoder.window, model.vocab_size if ids is None else len(ids), np.dtype(np.float32), ids)
        self.head.outputs(0, 1, with_logits=True)
        self._text: Prefix = model.root

    def start(self, tokens: Sequence[int], cached: int) -> int:
        return cached

    def end(self) -> None: ...

    def keep_round(self, rows: int) -> None: ...

    def is_behind(self) -> bool:
        return False

    def refill(self, tokens: Sequence[int], with_logits: bool) -> None:
        self._text = self._model.prefix(tokens)
        self._write(0)

    def put(self, row: int, token: int) -> None:
        self._text = self._text.then(token)

    def step(self, row: int, with_logits: bool) -> None:
        self._write(row)

    def _write(self, row: int) -> None:
        logits = self._model.exit(self._text)
        weights = np.exp(logits - logits.max())
        self.head.logits[row] = logits
        best = int(logits.argmax())
        self.head.token[row] = best if self.head.ids is None else self.head.ids[best]
        self.head.top_prob[row] = weights.max() / weights.sum()
        self._decoder.clock.now_s += self._costs_s[row > 0]


class DraftedDecoder(ScriptedDecoder):
    """A scripted stack without an exit, beside which a drafter drafts.

    Args:
        model: Its predictions.
        costs_s: Seconds of a first draft and of a further one.
        verify_s: See :class:`ScriptedDecoder`.
    """

    def __init__(
        self,
        model: ScriptedModel,
        costs_s: tuple[float, float] = (0.0, 0.0),
        verify_s: Sequence[float] = (0.75,),
        max_length: int = 64,
    ) -> None:
        super().__init__(model, is_cut=False, verify_s=verify_s, max_length=max_length)
        self.drafter = ScriptedRows(model, self, costs_s)


def by_drafter(
    decoder: DraftedDecoder, sequence: TokenSequence, choice: Choice, stats: Stats, count: int, length: DraftLength
) -> Iterator[Step]:
    """Decode speculatively with drafts of the trained drafter."""
    loop = speculative(decoder, sequence, choice, stats, count, length, TrainedDrafter(decoder, choice))  # type: ignore[arg-type]
    return solo(loop, decoder)
