"""The same worker over llama.cpp: ``llama_worker.py GGUF_FILE THREADS``; protocol as in ``worker.py``.

Runs by path, perhaps under another interpreter, so it imports the standard library, numpy, llama-cpp-python and, from
beside it, ``memory.py``.

It calls llama.cpp's C functions, not the package's ``Llama`` class, which does more in Python per token. A step is one
``llama_decode`` of one token and numpy's argmax over the logits where llama.cpp left them, nothing copied. Logits are
computed for the last token of a prompt only. All else is llama.cpp's default: mapped weights, fp16 cache, flash
attention where it sees fit.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import llama_cpp as llama
import numpy as np
from memory import memory_now  # type: ignore[import-not-found]  # this script's folder is on the path


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

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what one request asks."""
        operations: dict[str, Callable[..., dict[str, Any]]] = {
            "start": self._start,
            "block": self._block,
            "memory": memory_now,
        }
        return operations[request.pop("op")](**request)

    def _start(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        started = time.perf_counter()
        self._empty_context(len(prompt) + tokens)
        self._newest = self._decode(prompt)
        return {"tokens": [self._newest], "elapsed_s": time.perf_counter() - started}

    def _block(self, count: int) -> dict[str, Any]:
        started, cpu = time.perf_counter(), time.process_time()
        tokens = [self._next() for _ in range(count)]
        elapsed_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
        return {"tokens": tokens, "elapsed_s": elapsed_s, "cpu_s": cpu_s}

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

    def _empty_context(self, tokens: int) -> None:
        """Make room for so many tokens: the context of the generation before if it is large enough, else a new one."""
        if self._context is not None:
            if llama.llama_n_ctx(self._context) >= tokens:
                llama.llama_memory_clear(llama.llama_get_memory(self._context), False)
                return
            llama.llama_free(self._context)
        params = llama.llama_context_default_params()
        params.n_ctx = params.n_batch = tokens  # a prompt goes in as one batch
        params.n_threads = params.n_threads_batch = self._threads
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp cannot make a context of {tokens} tokens")


@llama.llama_log_callback  # type: ignore[untyped-decorator]
def _quiet(level: int, text: bytes, data: object) -> None:
    """Drop what llama.cpp logs."""


def main(arguments: list[str]) -> None:
    """Load the model, say how long it took, then serve requests until standard input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints does not get among the answers

    def reply(answer: dict[str, Any]) -> None:
        replies.write(json.dumps(answer) + "\n")
        replies.flush()

    worker = Worker(arguments[0], int(arguments[1]))
    reply({"load_s": worker.load_s})
    for line in sys.stdin:
        reply(worker.answer(json.loads(line)))


if __name__ == "__main__":
    main(sys.argv[1:])
