"""A worker of Ray Data: lines of a file of prompts in, answers out.

::

    lines = ray.data.from_items([{"line": '{"id": "a", "prompt": "Why is the sky blue?"}'}])
    answers = lines.map_batches(
        RayGenerator,
        fn_constructor_kwargs={"bundle": "/models/out", "threads": 4, "max_new_tokens": 64},
        compute=ray.data.ActorPoolStrategy(size=2),
        num_cpus=4,
    )

It does not import ray, which makes one object of the class in each worker.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from shortstack.graphs.errors import RequestError
from shortstack.runtime.batch.answers import answer, digest_of, failure
from shortstack.runtime.batch.lines import Line, read_line, unread_line
from shortstack.runtime.batch.usual_slots import USUAL_SLOTS
from shortstack.runtime.decode.step import Stats
from shortstack.runtime.model import load
from shortstack.runtime.request import RequestOptions, make_request

LINE, NUMBER, ANSWER, STATS = "line", "number", "answer", "stats"
"""Columns: of what comes in the first two, of what goes out the other two."""


class RayGenerator:
    """Answers lines of a file of prompts with a bundle. A class for Ray Data's ``map_batches``.

    Ray sends the class and these arguments to each worker and makes the object there, which loads the bundle.

    Args:
        bundle: The bundle's folder on the machine of the worker.
        slots: How many sequences run at once.
        threads: Threads that compute. Say the same number as ``num_cpus`` to ``map_batches``, so that workers do not
            fight for cores. None: all usable cores of the machine.
        providers: See :func:`~shortstack.runtime.model.load`.
        options: What lines do not say themselves, as in :meth:`Model.stream`.

    Raises:
        BundleError: The folder is not a valid bundle.
        RequestError: An option is not valid.
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        slots: int = USUAL_SLOTS,
        threads: int | None = 1,
        providers: Sequence[str] | None = None,
        **options: Unpack[RequestOptions],
    ) -> None:
        self._defaults = make_request("any", **options)
        self._model = load(bundle, slots=slots, threads=threads, providers=providers)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Answer the lines of one batch.

        Args:
            batch: Columns of equal length. ``line`` holds the JSON text of a line, in any form that ``shortstack
                batch`` reads. ``number`` holds its id where it says none; without this column every line needs one.

        Returns:
            The other columns as they are, ``answer``: the JSON text of each line's answer, and ``stats``: that of its
            counts, :meth:`Stats.to_json`. The answer to a line that is no prompt, or fails, has an ``error``.

        Raises:
            RequestError: There is no column ``line``.
        """
        if LINE not in batch:
            raise RequestError(f"a batch needs a column {LINE!r}", found=", ".join(batch), remedy="rename the column")
        texts = [str(text) for text in batch[LINE]]
        numbers = [int(number) for number in batch[NUMBER]] if NUMBER in batch else [None] * len(texts)
        found: list[tuple[dict[str, Any], Stats]] = [({}, Stats())] * len(texts)
        lines: dict[int, Line] = {}
        for row, (text, number) in enumerate(zip(texts, numbers, strict=True)):
            try:
                lines[row] = read_line(text, number, "the line", self._defaults, self._model.tokenizer)
            except RequestError as error:
                found[row] = failure(unread_line(text, number), error), Stats()
        rows, weights = list(lines), self._model.bundle.manifest.weights_sha256
        for index, result in self._model.stream_batch((lines[row].request for row in rows), keep_going=True):
            line = lines[rows[index]]
            found[rows[index]] = answer(line, digest_of(line, weights), result), result.stats
        return {name: column for name, column in batch.items() if name != LINE} | {
            ANSWER: [json.dumps(entry) for entry, _ in found],
            STATS: [json.dumps(stats.to_json()) for _, stats in found],
        }
