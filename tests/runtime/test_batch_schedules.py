"""Random schedules on tiny models: a request gets what it gets alone, and a model that is closed ends all at once."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helpers.kv_bundles import KVBundles
from helpers.quantized import QuantizedBundles, preset
from helpers.schedules import Outcome, Tally, any_request, any_texts, outcome_of, run_schedule, spoilt
from helpers.tiny_models import SPECULATOR, TinyBundles
from shortstack import Stream
from shortstack.graphs.errors import RequestError
from shortstack.graphs.precision import BlockFormat
from shortstack.runtime import Model, Request, load
from shortstack.runtime.result import Result

CONTEXT = 40  # what prompts are drawn from; the models have room for more
COMPLETE, SHARED = (0, 1, 1, 1), (0, 0, 2, 0)
BUNDLES = ("float", "int4 with an int8 cache", "int4 with a float cache", "complete", "shared", "shared, int4")
WAIT_S = 60.0  # until a test fails instead of hanging


@pytest.fixture(scope="module")
def paths(tiny_bundles: TinyBundles, kv_bundles: KVBundles, quantized: QuantizedBundles) -> dict[str, Path]:
    plain, shared = tiny_bundles.bundle(SPECULATOR, 1, 3), kv_bundles.bundle(SHARED, 1, 2)
    return {
        "float": plain,
        "int4 with an int8 cache": quantized(plain, preset(BlockFormat(4, has_offsets=True), "int8")),
        "int4 with a float cache": quantized(plain, preset(BlockFormat(4))),
        "complete": kv_bundles.bundle(COMPLETE, 2, 3),
        "shared": shared,
        "shared, int4": quantized(shared, preset(BlockFormat(4), "int8")),
    }


@pytest.fixture(scope="module", params=BUNDLES)
def model(request: pytest.FixtureRequest, paths: dict[str, Path]) -> Iterator[Model]:
    with load(paths[request.param], slots=3) as found:
        yield found


class Serving:
    """A loaded model as schedules see it."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.start: Callable[[Request], Stream] = model.start

    def batch(self, requests: Iterable[Request]) -> Iterator[tuple[int, Result]]:
        return self._model.stream_batch(requests, keep_going=True)

    def check(self) -> None:
        """Nothing to check from outside."""

    def check_ended(self, stream: Stream) -> None:
        """Likewise."""


@pytest.mark.parametrize("schedules", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_a_request_gets_what_it_gets_alone_whoever_comes_and_goes(model: Model, seed: int, schedules: int) -> None:
    exits = model.bundle.manifest.plan.exits
    vocab = model.bundle.manifest.spec.vocab_size
    for number in range(schedules):
        rng = random.Random(f"{seed} {number}")
        texts = any_texts(rng, vocab, CONTEXT)
        requests = [any_request(rng, exits, vocab, CONTEXT, texts) for _ in range(7)]
        requests = [spoilt(rng, request) if rng.random() < 0.1 else request for request in requests]
        alone: dict[int, Outcome] = {}

        def wanted(request: Request, alone: dict[int, Outcome] = alone) -> Outcome:
            return alone[id(request)]

        for request in requests:
            alone[id(request)] = outcome_of(model.start(request))
        try:
            run_schedule(Serving(model), rng, requests, wanted, Tally())
        except Exception as error:
            error.add_note(f"schedule {number} of seed {seed}")
            raise


@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_model_that_is_closed_ends_the_generations_of_all_threads(
    paths: dict[str, Path], rounds: int, seed: int
) -> None:
    rng = random.Random(seed)
    for _ in range(rounds):
        model = load(paths["int4 with an int8 cache"], slots=2)
        started = threading.Barrier(5)

        def whole(number: int, model: Model = model, started: threading.Barrier = started) -> set[str]:
            started.wait(WAIT_S)
            return ends_of(lambda: model.generate([number], max_new_tokens=400, ignore_eos=True).finish_reason)

        def one_by_one(number: int, model: Model = model, started: threading.Barrier = started) -> set[str]:
            started.wait(WAIT_S)
            return ends_of(lambda: outcome_of(model.stream([number], max_new_tokens=400, ignore_eos=True)).end)

        def many(number: int, model: Model = model, started: threading.Barrier = started) -> set[str]:
            started.wait(WAIT_S)
            found: set[str] = set()
            for _, result in model.stream_batch([[number]] * 9, max_new_tokens=99, ignore_eos=True, keep_going=True):
                found |= {result.finish_reason if result.error is None else str(result.error).split(".")[0][-6:]}
            return found

        with ThreadPoolExecutor(4) as pool:
            running = [pool.submit(whole, 5), pool.submit(whole, 6), pool.submit(one_by_one, 7), pool.submit(many, 8)]
            started.wait(WAIT_S)
            for _ in range(rng.randrange(40)):
                model.tokenizer.decode([5])  # some work, so that the model is closed at one moment or another
            model.close()
            ends = [each.result(WAIT_S) for each in running]
        for found in ends:
            assert found <= {"cancelled", "closed", "length"}, found
        with pytest.raises(RequestError, match="is closed"):
            model.generate([5])


def ends_of(generate: Callable[[], str]) -> set[str]:
    """Return how a generation ends: by a reason, or ``closed`` where the model was before it began."""
    try:
        return {generate()}
    except RequestError as error:
        return {"closed" if "is closed" in str(error) else str(error)}
