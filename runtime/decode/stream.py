"""One running generation: yields tokens with the text that became certain; handles stops, cancelling and counts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from shortstack.graphs.errors import RequestError
from shortstack.runtime.decode.step import Stats, Step
from shortstack.runtime.text.stop import StopStrings
from shortstack.runtime.text.stream_decoder import StreamDecoder
from shortstack.runtime.text.tokenizer import Tokenizer

FinishReason = Literal["eos", "stop", "length", "context", "cancelled"]


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token.

    Attributes:
        id: Its id.
        text: Text that became certain with it; empty while a character or a possible stop string is incomplete.
        from_draft: Whether a drafter proposed it and the whole model accepted it.
        exit_layer: Layers run to predict it, see :class:`~shortstack.runtime.decode.step.Step`.
        confidence: The probability that this head or drafter gave to its most likely token.
        pending: Positions that waited for the layers above when it was decided, including its own; 0 if none waited.
    """

    id: int
    text: str
    from_draft: bool
    exit_layer: int
    confidence: float
    pending: int


class Stream(Iterator[Token]):
    """An iterator over tokens. After the last one, :attr:`finish_reason` and :attr:`stats` are final.

    Args:
        steps: The decoding loop.
        stats: The loop's counts.
        tokenizer: Turns ids into text.
        eos_ids: Token ids that end the text.
        stop: Strings that end the text.
        limit: The number of tokens after which the loop ends by itself.
        limit_reason: What set that limit: the request ("length") or the context ("context").

    Attributes:
        stats: Counts and times.
        token_ids: The ids so far.
        text: The texts of the tokens so far, joined. When a generation is cancelled, the text held back is added.
        finish_reason: Why it ended: an end-of-sequence token, a stop string, ``max_new_tokens``, the context's end, or
            :meth:`cancel` or :meth:`close`; None while it runs.
    """

    def __init__(
        self,
        steps: Iterator[Step],
        stats: Stats,
        tokenizer: Tokenizer,
        *,
        eos_ids: Sequence[int],
        stop: StopStrings,
        limit: int,
        limit_reason: FinishReason,
    ) -> None:
        self._steps = steps
        self._eos_ids = frozenset(eos_ids)
        self._decoder = StreamDecoder(tokenizer)
        self._stop = stop
        self._limit = limit
        self._limit_reason: FinishReason = limit_reason
        self._started_s = time.perf_counter()
        self._is_cancelled = False
        self._is_superseded = False
        self.stats = stats
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None

    def __next__(self) -> Token:
        if self.finish_reason is not None:
            raise StopIteration
        if self._is_cancelled:
            self.close()
            raise StopIteration
        if self._is_superseded:
            raise RequestError(
                "this generation was ended by a newer one on the same model",
                remedy="finish one stream before starting the next, or load the bundle twice",
            )
        step = next(self._steps)
        self.token_ids.append(step.token)
        now = time.perf_counter() - self._started_s
        if len(self.token_ids) == 1:
            self.stats.first_token_s = now
        self.stats.elapsed_s = now
        if step.token in self._eos_ids:
            text = self._end("eos")
        else:
            text, is_stopped = self._stop.push(self._decoder.push(step.token))
            if is_stopped:
                text += self._end("stop")
            elif len(self.token_ids) == self._limit:
                text += self._end(self._limit_reason)
        self.text += text
        return Token(step.token, text, step.from_draft, step.exit_layer, step.confidence, step.pending)

    def cancel(self) -> None:
        """End the generation before its next token; another thread may call this."""
        self._is_cancelled = True

    def close(self) -> None:
        """End the generation now; the model stays usable."""
        if self.finish_reason is None:
            self.text += self._end("cancelled")

    def supersede(self) -> None:
        """End the generation, if it is still running, because a newer one takes the cache."""
        if self.finish_reason is None:
            self._is_superseded = True
            self._close_steps()

    def _end(self, reason: FinishReason) -> str:
        """End the loop and return the text held back, cut at a stop string if it completes one."""
        self._close_steps()
        rest, is_stopped = self._stop.push(self._decoder.flush())
        self.finish_reason = "stop" if is_stopped else reason
        return rest + self._stop.flush()

    def _close_steps(self) -> None:
        close = getattr(self._steps, "close", None)
        if close is not None:
            close()
