"""The driving end of a worker process."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from shortstack.graphs.errors import ShortstackError


class WorkerProcess:
    """A worker, started and ready; use as a context manager.

    Args:
        command: What to run; must speak the protocol of ``worker.py``.

    Attributes:
        ready: What it said when it was ready.

    Raises:
        ShortstackError: It ended before it was ready, or while it was asked.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self.ready = self._read()
        except ShortstackError:
            self.__exit__(None, None, None)
            raise

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.__exit__(None, None, None)  # closes standard input, which ends it, and waits

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"ended with code {self._process.wait()}"}
        if "error" in answer:
            raise ShortstackError(f"a benchmark process failed ({' '.join(self._command)}): {answer['error']}")
        return answer


def bundle_worker(bundle: Path, threads: int | None, slots: int | None = None) -> WorkerProcess:
    """Start a worker over a bundle; a number of slots needs one of threads.

    Raises:
        ModuleNotFoundError: onnxruntime is not installed. A worker without it would only say that it ended.
    """
    importlib.import_module("onnxruntime")
    arguments = [str(each) for each in (bundle, threads, slots) if each is not None]
    return WorkerProcess([sys.executable, "-m", "shortstack.samples.bench.worker", *arguments])


def script_worker(python: str, script: str, model: Path, threads: int) -> WorkerProcess:
    """Start a worker over another engine's model, by the path of its script, under the interpreter that has the engine.

    Args:
        python: The interpreter.
        script: The worker: a file next to this one, or a whole path.
        model: What it loads.
        threads: Size of its thread pool.
    """
    return WorkerProcess([python, str(Path(__file__).parent / script), str(model), str(threads)])
