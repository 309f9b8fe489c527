"""A process that decodes on request: one JSON object per line in, one per line out.

``worker.py BUNDLE [THREADS [SLOTS]]``.

Two engines under comparison sit in two such processes, each idle, its threads asleep, while the other one runs.

========  ==============================  ==============================================================
``op``    asks                            answers
========  ==============================  ==============================================================
(ready)                                   load_s: seconds from imported modules to a loaded model
start     prompt (token ids), tokens      tokens ([first]), elapsed_s of the prefill
chunk     count                           tokens, elapsed_s, cpu_s, run_s (inside graphs)
decode    prompt, tokens, draft, ...      tokens, decode_s after the first token, stats
batch     prompts, tokens                 tokens of each, elapsed_s and cpu_s of prompts and tokens together
costs     context, rows, repeats          seconds of a plain step, a draft row, a row without exit, verify(M)
drafter   prompt, repeats, drafts         seconds of verify(M), the first drafts behind M rows, a further draft
memory                                    rss_bytes, pss_bytes, peak_bytes
========  ==============================  ==============================================================
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

from shortstack.graphs.errors import ShortstackError
from shortstack.runtime import DraftPolicy, ExitPolicy, load, parse_criterion
from shortstack.runtime.decode.stream import Token
from shortstack.runtime.early_exit.policy import KVPolicy, Verify
from shortstack.runtime.engine.binding import Binding
from shortstack.runtime.request import ExitEarly, Plain, Request, Speculate, Strategy
from shortstack.samples.bench.costs import measure_costs
from shortstack.samples.bench.drafter_costs import measure_drafter
from shortstack.samples.bench.memory import memory_now
from shortstack.samples.bench.serve import Operation, batch, chunk, serve, start


class GraphClock:
    """Counts the seconds spent inside graph runs, from its creation on; what is left of a step is host overhead."""

    def __init__(self) -> None:
        self.run_s = 0.0
        run = Binding.run

        def timed(binding: Binding) -> None:
            started = time.perf_counter()
            run(binding)
            self.run_s += time.perf_counter() - started

        # This process does nothing but measure, so the class itself may be changed.
        Binding.run = timed  # type: ignore[method-assign,assignment]


class Worker:
    """The requests, as methods.

    Args:
        bundle: The bundle's folder.
        threads: Size of the thread pool; None takes all cores.
        slots: How many sequences it decodes at once.
    """

    def __init__(self, bundle: str, threads: int | None, slots: int = 1) -> None:
        self._clock = GraphClock()
        started = time.perf_counter()
        self._model = load(bundle, threads=threads, slots=slots)
        self.load_s = time.perf_counter() - started
        self._stream: Iterator[Token] = iter(())

    def operations(self) -> dict[str, Operation]:
        """Return what answers each request."""
        return {
            "start": self._start,
            "chunk": self._chunk,
            "decode": self._decode,
            "batch": self._batch,
            "costs": self._costs,
            "drafter": self._drafter,
            "memory": memory_now,
        }

    def _start(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        return start(lambda: self._first(prompt, tokens))

    def _first(self, prompt: list[int], tokens: int) -> int:
        self._stream = self._model.stream(prompt, max_new_tokens=tokens, ignore_eos=True)
        return next(self._stream).id

    def _chunk(self, count: int) -> dict[str, Any]:
        before_s = self._clock.run_s
        answer = chunk(lambda: next(self._stream).id, count)
        return answer | {"run_s": self._clock.run_s - before_s}

    def _decode(
        self,
        prompt: list[int],
        tokens: int,
        draft: int | None = None,
        is_adaptive: bool = False,
        exit_when: str | None = None,
        exit_layers: list[int] | None = None,
        kv_policy: KVPolicy = "flush",
        verify: Verify = "none",
        ends: bool = False,
    ) -> dict[str, Any]:
        """Decode plainly, with drafts of ``draft`` tokens (at most, when adaptive), or with early exit.

        With ``ends`` an end token ends the text. Catching up at the end of early exit is part of its time.
        """
        strategy: Strategy = Plain()
        if exit_when is not None:
            layers = None if exit_layers is None else tuple(exit_layers)
            strategy = ExitEarly(ExitPolicy(parse_criterion(exit_when), layers, verify, kv_policy=kv_policy))
        elif draft is not None:
            strategy = Speculate(draft=DraftPolicy(draft, is_adaptive=is_adaptive))
        result = self._model.generate(prompt, max_new_tokens=tokens, ignore_eos=not ends, strategy=strategy)
        stats = result.stats
        return {
            "tokens": result.tokens,
            "text": result.text,
            "decode_s": stats.elapsed_s - stats.first_token_s + stats.settle_s,
            "stats": stats.to_json(),
        }

    def _batch(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        asked = [Request(prompt, max_new_tokens=tokens, ignore_eos=True) for prompt in prompts]
        return batch(lambda: [list(result.tokens) for result in self._model.generate_batch(asked)])

    def _costs(self, prompt: list[int], rows: list[int], repeats: int) -> dict[str, Any]:
        return measure_costs(self._model, prompt, rows, repeats)

    def _drafter(self, prompt: list[int], repeats: int, drafts: bool) -> dict[str, Any]:
        return measure_drafter(self._model, prompt, repeats, drafts=drafts)


def main(arguments: list[str]) -> None:
    """Serve requests with a bundle."""
    threads = int(arguments[1]) if len(arguments) > 1 else None
    slots = int(arguments[2]) if len(arguments) > 2 else 1
    serve(lambda: Worker(arguments[0], threads, slots), (ShortstackError,))


if __name__ == "__main__":
    main(sys.argv[1:])
