"""What a finished generation returns."""

from __future__ import annotations

from dataclasses import dataclass

from shortstack.runtime.decode.step import Stats
from shortstack.runtime.decode.stream import FinishReason, Stream


@dataclass(frozen=True, slots=True)
class Result:
    """One finished generation.

    Attributes:
        text: The generated text, without the prompt, special tokens and stop string.
        tokens: The generated token ids, including the one that ended the text.
        finish_reason: Why the generation ended.
        stats: Its counts and times.
        error: Why it failed, of :meth:`Model.stream_batch` with ``keep_going``; None otherwise.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats
    error: Exception | None = None


def failed_result(error: Exception) -> Result:
    """Return the result of a generation that could not start, or failed."""
    return Result("", (), "error", Stats(), error)


def result_of(stream: Stream) -> Result:
    """Return the result of a generation that has ended; without a reason of its own, it was cancelled."""
    stream.close()
    assert stream.finish_reason is not None
    return Result(stream.text, tuple(stream.token_ids), stream.finish_reason, stream.stats)
