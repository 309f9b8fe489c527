"""The command's side of a batch on several machines: it connects to Ray, sends lines, and receives answers.

::

    lines -> blocks of some lines -> Ray Data -> workers (RayGenerator) -> answers, block by block as they finish

A worker that dies is started again by Ray Data, and its block runs again, however often. Ray is imported here only,
when a batch asks for it. Nothing is reported to its makers.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack.cores import usable_cores
from shortstack.graphs.errors import RequestError
from shortstack.runtime.batch.answers import id_of, is_failure, request_of
from shortstack.runtime.batch.lines import Line
from shortstack.runtime.workers.ray_generator import ANSWER, LINE, NUMBER, STATS, RayGenerator

_logger = logging.getLogger(__name__)

LOCAL = "local"
_ADDRESSES = f"{LOCAL}, auto, or HOST:PORT of a cluster that this machine is part of"
_CONNECT_S = 10.0
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_EXCEPTION = re.compile(r"^(?!ray\.)(?:\w+\.)*\w+(?:Error|Exception): (.+)", re.MULTILINE)
_DIED = "A worker died or was killed"  # Ray's own words
_STORE_BYTES = 200 << 20  # texts only; what does not fit goes to disk
_BLOCKS_PER_WORKER = 4  # at least, so that no worker waits long for the last one
_LINES_PER_SLOT = 8  # of a block at most: slots run empty at its end only


@dataclass(frozen=True, slots=True)
class Work:
    """What all workers are told.

    Attributes:
        bundle: The bundle's folder, on each machine.
        slots: Sequences of a worker at once.
        options: What lines do not say, by the names of :class:`RayGenerator`.
    """

    bundle: Path
    slots: int
    options: Mapping[str, Any]


class RayPool:
    """Workers on a cluster of Ray; made by :func:`open_pool`.

    Attributes:
        workers: How many there are.
        threads: Threads of each.
    """

    def __init__(self, ray: Any, workers: int, threads: int) -> None:
        self._ray = ray
        self.workers = workers
        self.threads = threads

    def answers(self, work: Work, lines: Sequence[tuple[Line, str]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Yield the answer to each line once, in the order in which blocks of them end, and its counts.

        Args:
            work: What the workers are told.
            lines: Lines whose ids differ, each with the digest of its request.

        Raises:
            RequestError: A worker cannot load its bundle, or they run another model or version.
        """
        if not lines:
            return
        data = self._ray.data
        waiting = {line.id: digest for line, digest in lines}
        rows = [{LINE: line.text, NUMBER: line.number} for line, _ in lines]
        blocks = -(-len(rows) // self._lines_per_block(len(rows), work.slots))
        answered = data.from_items(rows, override_num_blocks=blocks).map_batches(
            RayGenerator,
            fn_constructor_kwargs={
                "bundle": str(work.bundle),
                "slots": work.slots,
                "threads": self.threads,
                **work.options,
            },
            compute=data.ActorPoolStrategy(size=self.workers, max_tasks_in_flight_per_actor=1),
            num_cpus=self.threads,
            batch_size=None,  # a block is a batch
        )
        try:
            for batch in answered.iter_batches(batch_size=None, prefetch_batches=0):
                for answer, stats in zip(batch[ANSWER], batch[STATS], strict=True):
                    entry = json.loads(answer)
                    digest = waiting.pop(id_of(entry), None)
                    if digest is None:  # a block that ran twice
                        continue
                    if not is_failure(entry) and request_of(entry) != digest:
                        raise RequestError(
                            f"a worker has another model in {work.bundle}, or another version of shortstack",
                            remedy="give all machines the same bundle and version",
                        )
                    yield entry, json.loads(stats)
        except self._ray.exceptions.RayError as error:
            raise RequestError(
                f"the workers failed: {_reason(error)}", remedy="put it right, and run the same command again to go on"
            ) from error

    def _lines_per_block(self, count: int, slots: int) -> int:
        fewest = min(slots, -(-count // self.workers))
        return max(fewest, min(_LINES_PER_SLOT * slots, count // (_BLOCKS_PER_WORKER * self.workers)))


@contextlib.contextmanager
def open_pool(address: str, workers: int | None, threads: int | None) -> Iterator[RayPool]:
    """Connect to a cluster, or start one on this machine for the time of the batch.

    Args:
        address: ``local`` starts one; ``auto`` takes the one that this machine is part of, ``HOST:PORT`` that one.
        workers: How many workers; None: one for each machine.
        threads: Threads of each; None: all workers together use all cores.

    Raises:
        RequestError: There is no cluster at the address, or it has no room for the workers.
        ModuleNotFoundError: Ray is not installed.
    """
    ray = _import_ray()
    with contextlib.redirect_stdout(_RayMessages()):  # stdout is for results
        try:
            with _silent_stderr(), _own_sigterm():
                _connect(ray, address, (workers or 1) * (threads or 1))
            cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
            yield RayPool(ray, *share_cores(cores, workers, threads))
        finally:
            ray.shutdown()


def _import_ray() -> Any:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its C++ side writes to stderr
    ray = importlib.import_module("ray")
    data = importlib.import_module("ray.data")
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a block of long texts may take an hour
    return ray


def _connect(ray: Any, address: str, fewest_cores: int) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        cores = max(usable_cores(), fewest_cores)
        ray.init(
            LOCAL,
            num_cpus=cores,
            include_dashboard=False,
            object_store_memory=_STORE_BYTES,
            _node_ip_address="127.0.0.1",
            **quiet,
        )
        return
    where = f"--ray {address}"
    if address != "auto":
        _check_address(address, where)
    try:
        ray.init(address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        found = _reason(error.__cause__ or error)  # the cause says so where the cluster asks for a token
        raise RequestError(f"{where}: Ray cannot connect", found=found, expected=_ADDRESSES) from error


class _RayMessages(io.TextIOBase):
    """Takes what Ray prints about its processes, pages of it, to the log."""

    def write(self, text: str, /) -> int:
        """Log a text; that a worker died is a warning."""
        if _DIED in text:
            _logger.warning("a worker died; Ray starts it again, and its prompts run again")
        if text.strip():
            _logger.info("%s", text.strip())
        return len(text)


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Send to nobody what compiled code writes to stderr; what goes wrong is raised."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nobody:
        os.dup2(nobody.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep what this process does when it is asked to end: Ray puts an abort in its place."""
    kept = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, kept)


def _check_address(address: str, where: str) -> None:
    """Refuse an address where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise RequestError(where, found=repr(address), expected=_ADDRESSES)
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise RequestError(
            f"{where}: nobody answers there ({error})", remedy="start a cluster with `ray start --head`, or use local"
        ) from None


def share_cores(cores: Sequence[int], workers: int | None, threads: int | None) -> tuple[int, int]:
    """Return how many workers there are and how many threads each has.

    Args:
        cores: Those of each machine that Ray may use; 0 where it computes nothing.
        workers: As asked for.
        threads: As asked for.

    Raises:
        RequestError: There is no room for so many.
    """
    machines = [count for count in cores if count]
    if not machines:
        raise RequestError("the cluster has no core", remedy="start a machine with `ray start --address HOST:PORT`")
    count = workers or len(machines)
    rooms = {each: sum(machine // each for machine in machines) for each in range(1, min(machines) + 1)}
    each = threads or max((each for each, room in rooms.items() if room >= count), default=1)
    room = sum(machine // each for machine in machines)
    if count > room:
        raise RequestError(
            f"workers: {count} with {each} threads each",
            found=f"{', '.join(map(str, machines))} cores",
            expected=f"{room} workers at most",
            remedy="give fewer --workers or --threads",
        )
    return count, each


def _reason(error: BaseException) -> str:
    """Return why Ray failed: the last exception in its message, a traceback of another process, that is not Ray's."""
    text = _COLOURS.sub("", str(error)).strip()
    return (_EXCEPTION.findall(text) or text.splitlines())[-1].rstrip(".")
