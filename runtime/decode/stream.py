"""One running generation: yields tokens with the text that became certain; handles stops, cancelling and counts.

A generation belongs to the thread that took its last token. Other threads may cancel and close it, but a newer
generation ends it only if it comes from the same thread, or if that thread has ended.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

from shortstack.graphs.errors import RequestError
from shortstack.runtime.decode.step import Stats, Step
from shortstack.runtime.text.stop import StopStrings
from shortstack.runtime.text.stream_decoder import StreamDecoder
from shortstack.runtime.text.tokenizer import Tokenizer

FinishReason = Literal["eos", "stop", "length", "context", "cancelled", "error"]


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
        stop_ids: Further ids that do so because the caller said so.
        stop: Strings that end the text.
        limit: The number of tokens after which the loop ends by itself.
        limit_reason: What set that limit: the request ("length") or the context ("context").
        lock: Held during each step and each end. It can be taken again by the thread that has it.

    Attributes:
        stats: Counts and times.
        token_ids: The ids so far.
        text: The texts of the tokens so far, joined. When a generation is cancelled, the text held back is added.
        finish_reason: Why it ended: an end-of-sequence token, a stop string or stop id, ``max_new_tokens``, the
            context's end, :meth:`cancel` or :meth:`close`, or an error; None while it runs.
    """

    def __init__(
        self,
        steps: Iterator[Step],
        stats: Stats,
        tokenizer: Tokenizer,
        *,
        eos_ids: Sequence[int],
        stop: StopStrings,
        stop_ids: Sequence[int] = (),
        limit: int,
        limit_reason: FinishReason,
        lock: AbstractContextManager[object] | None = None,
    ) -> None:
        self._steps = steps
        self._eos_ids = frozenset(eos_ids)
        self._stop_ids = frozenset(stop_ids)
        self._decoder = StreamDecoder(tokenizer)
        self._stop = stop
        self._limit = limit
        self._limit_reason: FinishReason = limit_reason
        self._lock = threading.RLock() if lock is None else lock
        self._user = threading.current_thread()
        self._started_s = time.perf_counter()
        self._is_stepping = False
        self._is_cancelled = False
        self._is_superseded = False
        self._error: Exception | None = None
        self.stats = stats
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None

    def __next__(self) -> Token:
        with self._lock:
            self.check_not_stepping()
            if self._error is not None:
                raise RequestError(
                    f"this generation ended with an error: {self._error}", remedy="start another one"
                ) from self._error
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
            self._user = threading.current_thread()
            return self._token_of(self._step())

    def _step(self) -> Step:
        """Run the loop to its next step; after an error it is over."""
        self._is_stepping = True
        try:
            return next(self._steps)
        except StopIteration:  # somebody else has ended the loop
            self.text += self._end("cancelled")
            raise
        except Exception as error:
            self._error = error
            self.finish_reason = "error"
            raise
        except BaseException:  # Ctrl-C ends the loop, too
            self._is_cancelled = True
            raise
        finally:
            self._is_stepping = False

    def _token_of(self, step: Step) -> Token:
        """Count a step, and return its token with the text that is now certain."""
        self.token_ids.append(step.token)
        now = time.perf_counter() - self._started_s
        if len(self.token_ids) == 1:
            self.stats.first_token_s = now
        self.stats.elapsed_s = now
        if step.token in self._eos_ids:
            text = self._end("eos")
        elif step.token in self._stop_ids:
            text = self._end("stop")
        else:
            hidden = self._decoder.hidden_text(step.token)
            text, is_stopped = self._stop.push(self._decoder.push(step.token), hidden)
            if is_stopped:
                text += self._end("stop")
            elif len(self.token_ids) == self._limit:
                text += self._end(self._limit_reason)
        self.text += text
        return Token(step.token, text, step.from_draft, step.exit_layer, step.confidence, step.pending)

    def cancel(self) -> None:
        """End the generation before its next token; another thread may call this."""
        self._is_cancelled = True

    @property
    def is_cancelled(self) -> bool:
        """Whether somebody has asked for its end."""
        return self._is_cancelled

    def close(self) -> None:
        """End the generation now, or after the step that is running; the model stays usable. Any thread may call it."""
        self._is_cancelled = True  # first: a thread that takes token after token may not let go of the lock for long
        with self._lock:
            if self.finish_reason is None and not self._is_stepping:
                self.text += self._end("cancelled")

    def check_may_be_superseded(self) -> None:
        """Refuse to be ended by a newer generation of this thread if another thread is taking tokens.

        Raises:
            RequestError: It is not over, and another thread, which still runs, took its last token.
        """
        is_over = self.finish_reason is not None or self._is_cancelled or self._is_superseded
        if not is_over and self._user is not threading.current_thread() and self._user.is_alive():
            raise RequestError(
                "another thread has a stream on this model that has not ended",
                found=f"thread {self._user.name!r}, which has {len(self.token_ids)} tokens",
                expected="one generation at a time",
                remedy="end that stream first, by its last token or by close(), or load the bundle a second time",
            )
        self.check_not_stepping()

    def supersede(self) -> None:
        """End the generation, if it is still running, because a newer one takes the cache.

        Raises:
            RequestError: See :meth:`check_may_be_superseded`.
        """
        with self._lock:
            self.check_may_be_superseded()
            if self.finish_reason is None:
                self._is_superseded = True
                self._close_steps()

    def check_not_stepping(self) -> None:
        """Refuse a call from within a step, such as from a signal handler or a criterion of the caller's own.

        Raises:
            RequestError: This thread is in the middle of a step, of this generation or of one that runs with it.
        """
        if self._is_stepping and self._user is threading.current_thread():
            raise step_error()
        check_ready = getattr(self._steps, "check_ready", None)
        if check_ready is not None:  # steps of several generations are made together
            check_ready()

    def _end(self, reason: FinishReason) -> str:
        """End the loop and return the text held back, cut at a stop string if it completes one."""
        self._close_steps()
        rest, is_stopped = self._stop.push(self._decoder.flush())
        self.finish_reason = "stop" if is_stopped else reason
        return rest + self._stop.flush()

    def _close_steps(self) -> None:
        close_steps(self._steps)


def step_error() -> RequestError:
    """Return what a call gets that asks for a step from within a step."""
    return RequestError(
        "a generation was asked to go on while it is in the middle of a step on the same thread",
        remedy="wait until the step has returned; cancel() and close() may be called at any time",
    )


def close_steps(steps: Iterator[Step]) -> None:
    """End a decoding loop, which leaves the cache right."""
    close = getattr(steps, "close", None)
    if close is not None:
        close()
