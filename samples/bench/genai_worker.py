"""The same worker over onnxruntime-genai: ``genai_worker.py MODEL_FOLDER THREADS``; protocol as in ``worker.py``.

Runs by path, perhaps under another interpreter, so it imports the standard library, numpy, onnxruntime-genai and, from
its own folder, ``memory.py`` and ``serve.py``.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import onnxruntime_genai as og
from memory import memory_now  # type: ignore[import-not-found]  # this script's folder is on the path
from serve import Operation, batch, chunk, serve, start  # type: ignore[import-not-found]


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

    def operations(self) -> dict[str, Operation]:
        """Return what answers each request."""
        return {"start": self._start, "chunk": self._chunk, "batch": self._batch, "memory": memory_now}

    def _start(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        answer: dict[str, Any] = start(lambda: self._first(prompt, tokens))
        return answer

    def _first(self, prompt: list[int], tokens: int) -> int:
        params = og.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, max_length=len(prompt) + tokens)
        self._generator = og.Generator(self._model, params)
        self._generator.append_tokens(prompt)
        return self._next()

    def _chunk(self, count: int) -> dict[str, Any]:
        answer: dict[str, Any] = chunk(self._next, count)
        return answer

    def _batch(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        answer: dict[str, Any] = batch(lambda: self._decode(prompts, tokens))
        return answer

    def _decode(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        params = og.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, batch_size=len(prompts), max_length=len(prompts[0]) + tokens)
        generator = og.Generator(self._model, params)
        generator.append_tokens(np.array(prompts, np.int32))
        steps = []
        for _ in range(tokens):
            generator.generate_next_token()
            steps.append([int(token) for token in generator.get_next_tokens()])
        return [list(own) for own in zip(*steps, strict=True)]

    def _next(self) -> int:
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])


def main(arguments: list[str]) -> None:
    """Serve requests with the model of a folder."""
    serve(lambda: Worker(arguments[0], int(arguments[1])))


if __name__ == "__main__":
    main(sys.argv[1:])
