"""The runs that a decoding loop asks for, and how one loop is run by itself.

A loop is a generator. It yields a run where it needs the model, and goes on when the run has been performed; in between
it yields the steps that it emits. It knows neither who performs its runs nor whether others are performed with them::

    loop        yields DraftRow, DraftRow, Verify, Step, Step, DraftRow ...
    solo        performs each run on a stack of its own
    engine      performs the runs of several loops in one (runtime/batch)

To end a loop early, :class:`Ended` is thrown into it. It may then ask for the runs that leave the cache right.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple, TypeAlias, TypeVar, cast

from shortstack.runtime.decode.step import Step
from shortstack.runtime.engine.decoder import Decoder, LeveledDecoder


class Prefill(NamedTuple):
    """See :meth:`~shortstack.runtime.engine.decoder.Decoder.prefill`."""

    tokens: Sequence[int]
    past: int
    with_logits: bool

    def on(self, stack: Decoder) -> None:
        """Perform the run."""
        stack.prefill(*self)


class DraftRow(NamedTuple):
    """See :meth:`~shortstack.runtime.engine.decoder.Decoder.draft`."""

    row: int
    past: int
    with_head: bool
    with_logits: bool

    def on(self, stack: Decoder) -> None:
        """Perform the run."""
        stack.draft(*self)


class DraftRows(NamedTuple):
    """See :meth:`~shortstack.runtime.engine.decoder.Decoder.draft_rows`."""

    start: int
    end: int
    past: int

    def on(self, stack: Decoder) -> None:
        """Perform the run."""
        stack.draft_rows(*self)


class Verify(NamedTuple):
    """See :meth:`~shortstack.runtime.engine.decoder.Decoder.verify`."""

    rows: int
    past: int
    with_logits: bool

    def on(self, stack: Decoder) -> None:
        """Perform the run."""
        stack.verify(*self)


class LevelRun(NamedTuple):
    """See :meth:`~shortstack.runtime.engine.decoder.LeveledDecoder.run`."""

    level: int
    start: int
    end: int
    past: int
    num_rows: int
    with_logits: bool

    def on(self, stack: LeveledDecoder) -> None:
        """Perform the run."""
        stack.run(*self)


class PrefillLevel(NamedTuple):
    """See :meth:`~shortstack.runtime.engine.decoder.LeveledDecoder.prefill_level`."""

    level: int
    tokens: Sequence[int]
    past: int
    with_head: bool
    with_logits: bool

    def on(self, stack: LeveledDecoder) -> None:
        """Perform the run."""
        stack.prefill_level(*self)


class OwnRun(NamedTuple):
    """A run of something that belongs to one sequence alone, such as its drafter."""

    perform: Callable[[], None]

    def on(self, stack: Decoder) -> None:
        """Perform the run."""
        self.perform()


Run: TypeAlias = Prefill | DraftRow | DraftRows | Verify | LevelRun | PrefillLevel | OwnRun
Loop: TypeAlias = Generator[Run | Step, None, None]
Result = TypeVar("Result")
Asking: TypeAlias = Generator[Run, None, Result]
"""A part of a loop: asks for runs, and returns a result."""


class Ended(BaseException):
    """Thrown into a loop whose caller wants no further step."""


def solo(loop: Loop, stack: LeveledDecoder | Decoder) -> Iterator[Step]:
    """Run one loop by itself; closing the iterator ends the loop.

    Args:
        loop: The loop.
        stack: Performs its runs; the one that the loop reads.
    """
    perform = performer(stack)
    item = next(loop, None)
    while item is not None:
        if isinstance(item, Step):
            try:
                yield item
            except GeneratorExit:
                end(loop, perform)
                raise
            item = next(loop, None)
        else:
            item = advance(loop, item, perform)


def performer(stack: LeveledDecoder | Decoder) -> Callable[[Run], None]:
    """Return what performs runs on a stack."""

    def perform(run: Run) -> None:
        run.on(cast("LeveledDecoder", stack))  # a loop asks for runs that the stack which it reads has

    return perform


def advance(loop: Loop, run: Run, perform: Callable[[Run], None]) -> Run | Step | None:
    """Perform a run and return what the loop yields next; None at its end. An error of the run is the loop's."""
    try:
        perform(run)
    except BaseException as error:
        return _thrown(loop, error)
    return next(loop, None)


def end(loop: Loop, perform: Callable[[Run], None]) -> None:
    """End a loop: perform what it still asks for. It emits no further step."""
    try:
        item = _thrown(loop, Ended())
        while item is not None:
            item = next(loop, None) if isinstance(item, Step) else advance(loop, item, perform)
    except Ended:
        pass


def _thrown(loop: Loop, error: BaseException) -> Run | Step | None:
    try:
        return loop.throw(error)
    except StopIteration:
        return None
