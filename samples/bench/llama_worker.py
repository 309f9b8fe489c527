"""The same worker over llama.cpp: ``llama_worker.py GGUF_FILE THREADS``; protocol as in ``worker.py``.

Runs by path, perhaps under another interpreter, so it imports the standard library, numpy, llama-cpp-python and,
from its own folder, ``memory.py`` and ``serve.py``.

It calls llama.cpp's C functions, not the package's ``Llama`` class, which does more in Python per token. A step is one
``llama_decode`` of one token and numpy's argmax over the logits where llama.cpp left them, nothing copied. Logits are
computed for the last token of a prompt only. All else is llama.cpp's default: mapped weights, fp16 cache, flash
attention where it sees fit.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp as llama
import numpy as np
from memory import memory_now  # type: ignore[import-not-found]  # this script's folder is on the path
from serve import Operation, batch, chunk, serve, start  # type: ignore[import-not-found]


class Worker:
    """The requests, as methods.

    Args:
        file: A GGUF file.
        threads: For prompts and for steps.
    """

    def __init__(self, file: str, threads: int) -> None:
        started = time.perf_counter()
        llama.llama_log_set(_quiet, None)
        llama.llama_backend_init()
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = llama.llama_model_load_from_file(file.encode(), params)
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {file}")
        self._vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._threads = threads
        self._context: Any = None
        self._newest = 0
        self.load_s = time.perf_counter() - started

    def operations(self) -> dict[str, Operation]:
        """Return what answers each request."""
        return {"start": self._start, "chunk": self._chunk, "batch": self._batch, "memory": memory_now}

    def _start(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        answer: dict[str, Any] = start(lambda: self._first(prompt, tokens))
        return answer

    def _first(self, prompt: list[int], tokens: int) -> int:
        self._empty_context(len(prompt) + tokens)
        self._newest = self._decode(prompt)
        return self._newest

    def _chunk(self, count: int) -> dict[str, Any]:
        answer: dict[str, Any] = chunk(self._next, count)
        return answer

    def _next(self) -> int:
        self._newest = self._decode([self._newest])
        return self._newest

    def _decode(self, tokens: Sequence[int]) -> int:
        """Run tokens behind those in the cache; return the likeliest next one."""
        ids = (llama.llama_token * len(tokens))(*tokens)
        code = llama.llama_decode(self._context, llama.llama_batch_get_one(ids, len(tokens)))
        if code:
            raise SystemExit(f"llama_decode of {len(tokens)} tokens returned {code}")
        logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(self._context, -1), shape=(self._vocab,))
        return int(logits.argmax())

    def _batch(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        answer: dict[str, Any] = batch(lambda: self._decode_all(prompts, tokens))
        return answer

    def _decode_all(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        """Decode several texts at once, each a sequence of its own: prompts one by one, then a row of each a step."""
        context = self._new_context(len(prompts) * (len(prompts[0]) + tokens), sequences=len(prompts))
        found = [
            [self._run(context, [(number, place, id_) for place, id_ in enumerate(prompt)], 1)[0]]
            for number, prompt in enumerate(prompts)
        ]
        for step in range(len(prompts[0]), len(prompts[0]) + tokens - 1):
            rows = [(number, step, own[-1]) for number, own in enumerate(found)]
            for own, token in zip(found, self._run(context, rows, len(rows)), strict=True):
                own.append(token)
        llama.llama_free(context)
        return found

    def _run(self, context: Any, rows: Sequence[tuple[int, int, int]], heads: int) -> list[int]:
        """Run rows (sequence, position, token); return the likeliest next token of the last ``heads`` of them."""
        given = llama.llama_batch_init(len(rows), 0, 1)
        given.n_tokens = len(rows)
        for row, (sequence, position, token) in enumerate(rows):
            given.token[row], given.pos[row] = token, position
            given.n_seq_id[row], given.seq_id[row][0] = 1, sequence
            given.logits[row] = row >= len(rows) - heads
        code = llama.llama_decode(context, given)
        if code:
            raise SystemExit(f"llama_decode of {len(rows)} rows returned {code}")
        numbers = range(len(rows) - heads, len(rows))
        logits = (llama.llama_get_logits_ith(context, row) for row in numbers)
        best = [int(np.ctypeslib.as_array(own, shape=(self._vocab,)).argmax()) for own in logits]
        llama.llama_batch_free(given)
        return best

    def _empty_context(self, tokens: int) -> None:
        """Make room for that many tokens: reuse the last generation's context if it is large enough."""
        if self._context is not None:
            if llama.llama_n_ctx(self._context) >= tokens:
                llama.llama_memory_clear(llama.llama_get_memory(self._context), False)
                return
            llama.llama_free(self._context)
        self._context = self._new_context(tokens, sequences=1)

    def _new_context(self, tokens: int, sequences: int) -> Any:
        params = llama.llama_context_default_params()
        params.n_ctx = params.n_batch = tokens  # a prompt goes in as one batch
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self._threads
        context = llama.llama_init_from_model(self._model, params)
        if not context:
            raise SystemExit(f"llama.cpp cannot make a context of {tokens} tokens")
        return context


@llama.llama_log_callback  # type: ignore[untyped-decorator]
def _quiet(level: int, text: bytes, data: object) -> None:
    """Drop what llama.cpp logs."""


def main(arguments: list[str]) -> None:
    """Serve requests with the model of a GGUF file."""
    serve(lambda: Worker(arguments[0], int(arguments[1])))


if __name__ == "__main__":
    main(sys.argv[1:])
