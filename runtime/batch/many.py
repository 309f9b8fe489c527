"""Many requests, one after the other or in the slots of an engine: their results in the order in which they end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from shortstack.graphs.errors import ShortstackError
from shortstack.runtime.batch.generations import Generations, MakeStream, Prepared
from shortstack.runtime.request import Request
from shortstack.runtime.result import Result, failed_result, result_of

Prepare = Callable[[Request], tuple[Sequence[int], tuple[int, ...]]]
"""Checks a request; returns its prompt's token ids and the exits that its strategy uses."""


def one_by_one(
    requests: Iterable[Request | ShortstackError], finish: Callable[[Request], Result]
) -> Iterator[tuple[int, Result]]:
    """Yield the number and the result of each request, in order."""
    for number, request in enumerate(requests):
        if isinstance(request, ShortstackError):
            yield number, failed_result(request)
            continue
        try:
            yield number, finish(request)
        except ShortstackError as error:
            yield number, failed_result(error)


def in_slots(
    batch: Generations, requests: Iterable[Request | ShortstackError], prepare: Prepare, make: MakeStream, ahead: int
) -> Iterator[tuple[int, Result]]:
    """Yield the number and the result of each request, in the order in which they end.

    Args:
        batch: Runs them.
        requests: The requests, or why one is none; read as they are needed.
        prepare: Checks a request before it starts.
        make: Makes its stream.
        ahead: How many may wait for a slot.
    """

    def prepared(request: Request | ShortstackError) -> Prepared | ShortstackError:
        if isinstance(request, ShortstackError):
            return request
        try:
            return request, *prepare(request)
        except ShortstackError as error:
            return error

    for number, ended in batch.run_all(map(prepared, requests), make, ahead):
        yield number, failed_result(ended) if isinstance(ended, Exception) else result_of(ended)
