"""One generation at a time over the graphs of one sequence: who may start the next one, and how the one before ends.

Threads may share it. A generation that runs to its end holds the turn, and others wait for it, in their order. A stream
holds nothing, since nobody knows when it will end: while another thread has one that has not ended, a newer one is
refused.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence

from shortstack.runtime.batch.generations import MakeStream
from shortstack.runtime.decode.runs import solo
from shortstack.runtime.decode.sequence import TokenSequence
from shortstack.runtime.decode.step import Stats, Step
from shortstack.runtime.decode.stream import Stream, close_steps
from shortstack.runtime.decode.turns import Turns
from shortstack.runtime.engine.open_graphs import OpenGraphs
from shortstack.runtime.engine.passes import PrefillPasses
from shortstack.runtime.engine.row_classes import fewest_rows
from shortstack.runtime.engine.stack import Stack
from shortstack.runtime.loops import Loops
from shortstack.runtime.request import Request


class OneSlot:
    """Runs one generation at a time.

    Args:
        graphs: The bundle's graphs, in the form of one sequence.
        loops: Makes the loops, and learns from them.
        prefill_passes: How often a prompt runs through iterated groups.
        check_open: Refuses where the model is closed.

    Attributes:
        cache: The KV buffers.
        turns: Held by whoever starts a generation, and by whoever runs one to its end.
        lock: Held while the loop runs a step.
    """

    def __init__(
        self, graphs: OpenGraphs, loops: Loops, prefill_passes: PrefillPasses, check_open: Callable[[], None]
    ) -> None:
        self._graphs = graphs
        self._loops = loops
        self._prefill_passes = prefill_passes
        self._check_open = check_open
        self.cache = graphs.new_cache(graphs.bundle.manifest.max_length)
        self.turns = Turns()
        self.lock = threading.RLock()
        self._fewest_rows = fewest_rows(graphs)
        self._stacks: dict[tuple[int, ...], Stack] = {}
        self._sequence = TokenSequence()
        # The loop is kept apart from its stream: where a caller drops an unfinished stream, the loop must not end there
        # and then, on a thread that does not hold the lock.
        self._steps: Iterator[Step] | None = None
        self._stream: weakref.ref[Stream] | None = None

    def start(self, request: Request, ids: Sequence[int], exit_layers: tuple[int, ...], make: MakeStream) -> Stream:
        """Start a generation, which ends the one before; arguments as in :meth:`Generations.start`.

        Raises:
            RequestError: Another thread has a stream that has not ended, or this one is in the middle of a step.
        """
        self.check_not_stepping()
        with self.turns:
            self._check_not_in_use()
            with self.lock:
                self._check_open()
                stack = self._stack(exit_layers)
                # All checks have passed; from here on the previous generation is over.
                self._end_previous()
                return self._begin(request, ids, stack, make)

    def _begin(self, request: Request, ids: Sequence[int], stack: Stack, make: MakeStream) -> Stream:
        if not request.reuse_cache:
            self._sequence.rewind(0)
        stats = Stats(prompt=len(ids), reused=self._sequence.restart(ids))
        limit = min(request.max_new_tokens, self.cache.max_length - len(ids))
        loop = self._loops.loop(request, stack, self._sequence, stats, limit, runner=stack)
        self._steps = solo(loop, stack)
        stream = make(request, self._steps, stats, limit)
        self._stream = weakref.ref(stream)
        return stream

    def exclusive_stack(self, exit_layers: Sequence[int]) -> Stack:
        """Return the stack that uses these exits, for direct use; ends the generation before and forgets its cache."""
        self.check_not_stepping()
        with self.turns:
            self._check_not_in_use()
            with self.lock:
                self._check_open()
                self._end_previous()
                self._sequence.rewind(0)
                return self._stack(tuple(sorted(set(exit_layers))))

    def close(self, set_closed: Callable[[], bool]) -> None:
        """End a generation that is still running; any thread may call it.

        Args:
            set_closed: Closes the model, and returns whether it was open.
        """
        stream = self._current()
        if stream is not None:
            stream.cancel()  # first: the thread that takes its tokens may not let go of the lock for long
        with self.lock:
            if stream is not None:
                stream.close()
            if set_closed():
                self._steps = None
                self._stacks.clear()

    def check_not_stepping(self) -> None:
        """Refuse a new generation in the middle of a step of this thread, which would wait for itself."""
        stream = self._current()
        if stream is not None:
            stream.check_not_stepping()

    def _current(self) -> Stream | None:
        """Return the newest generation, unless its caller has dropped it."""
        return None if self._stream is None else self._stream()

    def _check_not_in_use(self) -> None:
        """Refuse a new generation while another thread has a stream; without the lock, so as not to wait for it."""
        stream = self._current()
        if stream is not None:
            stream.check_may_be_superseded()

    def _end_previous(self) -> None:
        """End the generation before, if it is still running; the caller holds the lock."""
        stream = self._current()
        if stream is not None:
            stream.supersede()
        elif self._steps is not None:
            close_steps(self._steps)
        self._steps = None

    def _stack(self, used: tuple[int, ...]) -> Stack:
        """Return the stack that uses these exits. It is made once, since it holds the prebuilt bindings."""
        if used not in self._stacks:
            self._stacks[used] = Stack(self._graphs, self.cache, used, self._prefill_passes, self._fewest_rows)
        return self._stacks[used]
