"""The same worker over onnxruntime-genai: ``genai_worker.py MODEL_FOLDER THREADS``; protocol as in ``worker.py``.

Runs by path, perhaps under another interpreter, so it imports the standard library, onnxruntime-genai and, from beside
it, ``memory.py``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import onnxruntime_genai as og
from memory import memory_now  # type: ignore[import-not-found]  # this script's folder is on the path


class Worker:
    """The requests, as methods."""

    def __init__(self, folder: str, threads: int) -> None:
        started = time.perf_counter()
        config = og.Config(folder)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model = og.Model(config)
        self._tokenizer = og.Tokenizer(self._model)  # not used here; but ours is loaded with the model too
        self.load_s = time.perf_counter() - started
        self._generator: Any = None

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
        params = og.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, max_length=len(prompt) + tokens)
        self._generator = og.Generator(self._model, params)
        self._generator.append_tokens(prompt)
        return {"tokens": [self._next()], "elapsed_s": time.perf_counter() - started}

    def _block(self, count: int) -> dict[str, Any]:
        started, cpu = time.perf_counter(), time.process_time()
        tokens = [self._next() for _ in range(count)]
        elapsed_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
        return {"tokens": tokens, "elapsed_s": elapsed_s, "cpu_s": cpu_s}

    def _next(self) -> int:
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])


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
