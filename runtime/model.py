"""A loaded bundle: text in, text out.

::

    with load("smollm2/") as model:
        for token in model.stream("Why is the sky blue?"):
            print(token.text, end="")
        result = model.generate("Why is the sky blue?", max_new_tokens=64, strategy="self-speculative")
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack

import numpy as np

from shortstack.graphs.arguments import expect, is_whole
from shortstack.graphs.bundle import Bundle, open_bundle
from shortstack.graphs.errors import RequestError, ShortstackError
from shortstack.runtime.batch.engine import Engine, EngineStats
from shortstack.runtime.batch.generations import Generations
from shortstack.runtime.batch.many import in_slots, one_by_one
from shortstack.runtime.decode.step import Stats, Step
from shortstack.runtime.decode.stream import Stream
from shortstack.runtime.encode import PromptEncoder
from shortstack.runtime.engine.cache import KVCache
from shortstack.runtime.engine.open_graphs import open_graphs
from shortstack.runtime.engine.passes import PrefillPasses, check_passes
from shortstack.runtime.engine.row_classes import fewest_packed_rows
from shortstack.runtime.engine.session import Placement
from shortstack.runtime.engine.stack import Stack
from shortstack.runtime.engine.whole_text import Activations, Array, run_text
from shortstack.runtime.loops import Loops
from shortstack.runtime.one_slot import OneSlot
from shortstack.runtime.request import Prompt, Request, RequestOptions, make_request, prompt_items
from shortstack.runtime.result import Result, result_of
from shortstack.runtime.text.stop import StopStrings
from shortstack.runtime.text.tokenizer import Tokenizer


def load(
    path: str | Path,
    *,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    upper: Placement | None = None,
    prefill_passes: PrefillPasses = "converged",
    verify_hashes: bool = False,
    slots: int = 1,
) -> Model:
    """Load a bundle.

    Args:
        path: The bundle's folder.
        providers: Execution providers in order of preference: ``cpu``, ``cuda``, or onnxruntime's names. None: CPU.
        threads: Size of the process's one thread pool. The first load in a process sets it; None takes the number of
            usable cores. Later loads leave it out or repeat it.
        upper: Where all segments but the lowest compute, for early exit as a pipeline. None: where the lowest segment
            computes.
        prefill_passes: How often a prompt runs through layers that use keys and values of layers above them: a number
            of times, as in training with that number, or until the layers have ``converged``, or ``sequential``:
            position by position.
        verify_hashes: Whether to check every file's sha256 first.
        slots: How many sequences may run at once. With more than one, generations share runs, see
            :meth:`Model.generate_batch`; that needs onnxruntime 1.32 or later.

    Raises:
        BundleError: The folder is not a valid bundle.
        ContractError: A graph does not match bundle.json.
        RequestError: A provider is unknown, ``threads`` differs from the process's pool, or ``prefill_passes`` is not
            valid.
    """
    expect(isinstance(path, str | Path), "path of a bundle", path, "text or a pathlib.Path")
    expect(isinstance(verify_hashes, bool), "verify_hashes", verify_hashes, "True or False")
    bundle = open_bundle(path, verify_hashes=verify_hashes)
    return Model(bundle, providers=providers, threads=threads, upper=upper, prefill_passes=prefill_passes, slots=slots)


class Model:
    """A bundle with its sessions, its cache and its tokenizer. One generation at a time.

    As a context manager, it is closed at the end, which frees its memory.

    Threads may share a model. While one thread is in :meth:`generate`, calls of others that start a generation wait, in
    their order. While one thread has a stream that has not ended, they are refused, since nobody knows when it will
    end. A generation that was started first is never disturbed. :meth:`close`, and the stream's own ``cancel`` and
    ``close``, may be called by any thread at any time: the generation then ends after the step that is running.

    Args:
        bundle: The bundle.
        providers: See :func:`load`.
        threads: See :func:`load`.
        upper: See :func:`load`.
        prefill_passes: See :func:`load`.
        slots: See :func:`load`.

    Attributes:
        bundle: The bundle.
        tokenizer: Its tokenizer.
        slots: How many sequences may run at once.
        graphs: Its graphs, open.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        upper: Placement | None = None,
        prefill_passes: PrefillPasses = "converged",
        slots: int = 1,
    ) -> None:
        expect(is_whole(slots, 1), "slots", slots, "a whole number, 1 or more")
        expect(isinstance(bundle, Bundle), "bundle", bundle, "what open_bundle returns; load() takes a path")
        self.bundle = bundle
        check_passes(prefill_passes)
        with ThreadPoolExecutor(1) as pool:  # onnxruntime packs weights meanwhile
            tokenizer = pool.submit(Tokenizer.load, bundle.folder, bundle.manifest.files)
            self.graphs = open_graphs(bundle, providers, threads, upper, is_packed=slots > 1)
            self.tokenizer = tokenizer.result()
        self.slots = slots
        self._encoder = PromptEncoder(bundle.manifest, self.tokenizer)
        self._is_closed = False
        loops = Loops()
        self._one: OneSlot | None = None
        self._batch: Generations | None = None
        if slots > 1:
            engine = Engine(self.graphs, slots, fewest_packed_rows(self.graphs))
            self._batch = Generations(engine, loops, self._check_open)
        else:
            self._one = OneSlot(self.graphs, loops, check_passes(prefill_passes), self._check_open)

    def __repr__(self) -> str:
        manifest = self.bundle.manifest
        exits = f"exits after {', '.join(map(str, self.exit_layers))}" if self.exit_layers else "no exit"
        bits = sorted({block_format.bits for block_format in manifest.precision.weights.values()})
        stored = f"{' and '.join(f'int{each}' for each in bits)} weights" if bits else manifest.dtype
        state = "closed" if self._is_closed else f"{manifest.max_length} positions"
        return (
            f"<Model {str(self.bundle.folder)!r}: {manifest.source_name}, {manifest.spec.num_hidden_layers} layers, "
            f"{exits}, {stored}, {state}>"
        )

    def __enter__(self) -> Model:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """The exits of the bundle, each by the number of layers run before it."""
        return self.bundle.manifest.plan.boundaries

    @property
    def engine_stats(self) -> EngineStats | None:
        """What the runs of several sequences were; None in a model with one slot."""
        return None if self._batch is None else self._batch.stats

    @property
    def cache(self) -> KVCache:
        """Its KV buffers.

        Raises:
            RequestError: The model has several slots.
        """
        return self._alone().cache

    def _alone(self) -> OneSlot:
        self._check_open()
        if self._one is None:
            raise RequestError(
                f"the model has {self.slots} slots, and this works with one sequence", remedy="load it with slots=1"
            )
        return self._one

    def stream(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> Stream:
        """Start generating.

        Args:
            prompt: Chat messages (``[{"role": "user", "content": ...}]``) go through the bundle's chat template. A
                string is encoded as it is, and token ids are used unchanged.
            options: ``max_new_tokens``, 256 by default; ``strategy``: ``plain``, ``self-speculative`` or
                ``early-exit`` (left out, it follows from ``exits``, or from ``exit_layer`` and ``draft``, and is plain
                without them), or one of the values :class:`~shortstack.runtime.request.Plain`, ``Speculate`` and
                ``ExitEarly``; for self-speculation, ``exit_layer`` and ``draft``; for early exit, ``exits``: when
                tokens leave; ``sampling``, or ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty``,
                ``seed``; ``stop``, ``stop_token_ids``, ``ignore_eos``, ``reuse_cache``, ``tools``,
                ``template_variables``.
                :mod:`shortstack.runtime.request` explains them all.

        Returns:
            An iterator over :class:`~shortstack.runtime.decode.stream.Token`; closing it early leaves the model usable.

        Raises:
            RequestError: The prompt is empty or too long, the strategy or an exit is unknown, the bundle cannot follow
                the exit policy, or options do not go together.
        """
        return self.start(make_request(prompt, **options))

    def generate(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> Result:
        """Generate to the end; see :meth:`stream` for the arguments and errors."""
        return self._finished(make_request(prompt, **options))

    def stream_batch(
        self, prompts: Iterable[Prompt | Request], *, keep_going: bool = False, **options: Unpack[RequestOptions]
    ) -> Iterator[tuple[int, Result]]:
        """Generate for many prompts, as many at once as the model has slots.

        Each text is the one that the prompt gets alone in this model, whatever else runs with it: greedy for every
        strategy, sampled for a seed. Only thresholds that learn (``auto``) learn from all texts.

        Args:
            prompts: Prompts, or requests with options of their own; read as they are needed.
            keep_going: Yield a result with an ``error`` for a generation that cannot start or fails, and go on with
                the others.
            options: Those of :meth:`stream`, for the prompts that are not requests.

        Yields:
            The number of a prompt, counted from 0, and its result, in the order in which they end.

        Raises:
            RequestError: See :meth:`stream`, without ``keep_going``. The other generations are ended.
        """
        is_right = isinstance(prompts, Iterable) and not isinstance(prompts, str | bytes | Mapping)
        expect(is_right, "prompts", prompts, 'a list of prompts such as ["One day", "Two days"]')

        def made(prompt: Prompt | Request) -> Request | ShortstackError:
            try:
                if isinstance(prompt, Request):
                    expect(not options, "options", ", ".join(options), "none beside a Request, which has its own")
                    return prompt
                return make_request(prompt, **options)
            except ShortstackError as error:
                return error

        requests = map(made, prompts)
        if self._batch is None:
            found = one_by_one(requests, self._finished)
        else:
            found = in_slots(self._batch, requests, self._prepared, self._make_stream, ahead=self.slots)
        for number, result in found:
            if result.error is not None and not keep_going:
                raise result.error
            yield number, result

    def generate_batch(self, prompts: Iterable[Prompt | Request], **options: Unpack[RequestOptions]) -> list[Result]:
        """Generate for many prompts to their ends; see :meth:`stream_batch`.

        Returns:
            The results, in the order of the prompts.
        """
        found = dict(self.stream_batch(prompts, **options))
        return [found[number] for number in sorted(found)]

    def _finished(self, request: Request) -> Result:
        if self._one is not None:
            self._one.check_not_stepping()
        with nullcontext() if self._one is None else self._one.turns:
            stream = self.start(request)
            for _ in stream:
                pass
        return result_of(stream)

    def start(self, request: Request) -> Stream:
        """Start the generation that a request describes; :meth:`stream` makes the request and calls this."""
        expect(isinstance(request, Request), "request", request, "a Request(...); stream() and generate() make one")
        ids, exit_layers = self._prepared(request)
        runner = self._batch or self._alone()
        return runner.start(request, ids, exit_layers, self._make_stream)

    def _prepared(self, request: Request) -> tuple[list[int], tuple[int, ...]]:
        """Check a request; return its prompt's token ids and the exits that its strategy uses."""
        ids = self.encode(request.prompt, tools=request.tools, template_variables=request.template_variables)
        StopStrings(request.stop)
        self._encoder.check_vocabulary("stop_token_ids", request.stop_token_ids)
        return ids, request.strategy.exits_in(self.bundle.manifest.plan)

    def _make_stream(self, request: Request, steps: Iterator[Step], stats: Stats, limit: int) -> Stream:
        return Stream(
            steps,
            stats,
            self.tokenizer,
            eos_ids=() if request.ignore_eos else self.tokenizer.eos_token_ids,
            stop=StopStrings(request.stop),
            stop_ids=[int(token) for token in request.stop_token_ids],
            limit=limit,
            limit_reason="length" if limit == request.max_new_tokens else "context",
            lock=None if self._one is None else self._one.lock,
        )

    def encode(
        self,
        prompt: Prompt,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return a prompt's token ids, checked against the vocabulary and the context.

        Args:
            prompt: Text, chat messages or token ids.
            tools: See :class:`~shortstack.runtime.request.Request`.
            template_variables: Likewise.

        Raises:
            RequestError: The prompt is of another type, is empty or too long, holds an id outside the vocabulary, or
                the chat template refuses it.
        """
        self._check_open()
        return self._encoder.encode(prompt, tools=tools, template_variables=template_variables)

    def activations(self, tokens: Sequence[int], states: Array | None = None) -> Activations:
        """Run one text and return the logits of every head, the hidden states, the keys and the values.

        The text runs through separate buffers, so a generation in progress is not disturbed.

        Args:
            tokens: The text, as token ids.
            states: See :func:`~shortstack.runtime.engine.whole_text.run_text`.
        """
        given = prompt_items(tokens)
        is_right = given is not None and not any(isinstance(item, Mapping) for item in given)
        expect(is_right, "tokens of a text", tokens, "token ids", "call encode(...) first")
        items = [int(item) for item in given or ()]
        with self._alone().lock:
            self._check_open()
            graphs = self.graphs
        manifest = self.bundle.manifest
        self._encoder.check_ids(items)
        expect(len(items) <= manifest.max_length, "tokens of a text", len(items), f"at most {manifest.max_length}")
        if states is not None:
            found, wanted = np.shape(states), (len(items), manifest.spec.hidden_size)
            expect(found == wanted, "states", found, f"None or an array {list(wanted)}")
        return run_text(graphs, items, states)

    def exclusive_stack(self, exit_layers: int | Sequence[int] | None = None) -> Stack:
        """Return a stack for direct use. This ends the previous generation and forgets its cache.

        Args:
            exit_layers: The exits that it uses; None gives the uncut stack.

        Raises:
            RequestError: The bundle lacks one of them, or another thread has a stream that has not ended.
        """
        wanted = () if exit_layers is None else exit_layers if isinstance(exit_layers, Sequence) else (exit_layers,)
        is_right = all(is_whole(layer) and layer in self.exit_layers for layer in wanted)
        expect(is_right, "exit_layers", exit_layers, f"some of {list(self.exit_layers)}, or None")
        return self._alone().exclusive_stack(wanted)

    def close(self) -> None:
        """End generations that are still running, and release sessions and buffers. Any thread may call it."""
        runner = self._batch or self._one
        if runner is not None:
            runner.close(self._set_closed)

    def _set_closed(self) -> bool:
        if self._is_closed:
            return False
        self._is_closed = True
        self._one = self._batch = None
        del self.graphs  # bindings, sessions and buffers go with them
        return True

    def _check_open(self) -> None:
        if self._is_closed:
            raise RequestError(f"the model of {self.bundle.folder} is closed", remedy="load it again")
