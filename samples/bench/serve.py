"""The worker's end of the pipe, the same for every engine: requests in, answers out, one JSON object a line.

The rivals' workers run by path under interpreters that may lack this package, so this imports the standard library
only. ``worker.py`` has the table of requests.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

Operation = Callable[..., dict[str, Any]]


class Worker(Protocol):
    """An engine with its model loaded.

    Attributes:
        load_s: Seconds from imported modules to a loaded model.
    """

    load_s: float

    def operations(self) -> Mapping[str, Operation]:
        """Return what answers each ``op``; the other fields of a request are the arguments."""
        ...


def serve(load: Callable[[], Worker], refusals: tuple[type[Exception], ...] = ()) -> None:
    """Load the model, say how long it took, then answer requests until standard input ends.

    Args:
        load: Loads the model.
        refusals: Errors that are the answer to a request, and end the process with code 2.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints does not get among the answers

    def reply(answer: Mapping[str, Any]) -> None:
        replies.write(json.dumps(answer) + "\n")
        replies.flush()

    try:
        worker = load()
        reply({"load_s": worker.load_s})
        operations = worker.operations()
        for line in sys.stdin:
            request = json.loads(line)
            reply(operations[request.pop("op")](**request))
    except refusals as error:
        reply({"error": str(error)})
        sys.exit(2)


def start(first_token: Callable[[], int]) -> dict[str, Any]:
    """Return the answer to ``start``: the first token of a prompt, and how long it took."""
    started = time.perf_counter()
    tokens = [first_token()]
    return {"tokens": tokens, "elapsed_s": time.perf_counter() - started}


def chunk(next_token: Callable[[], int], count: int) -> dict[str, Any]:
    """Return the answer to ``chunk``: further tokens, and how long they took."""
    started, cpu = time.perf_counter(), time.process_time()
    tokens = [next_token() for _ in range(count)]
    elapsed_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    return {"tokens": tokens, "elapsed_s": elapsed_s, "cpu_s": cpu_s}


def batch(decode: Callable[[], list[list[int]]]) -> dict[str, Any]:
    """Return the answer to ``batch``: the new tokens of several texts, and how long it took, prompts included."""
    started, cpu = time.perf_counter(), time.process_time()
    tokens = decode()
    elapsed_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    return {"tokens": tokens, "elapsed_s": elapsed_s, "cpu_s": cpu_s}
