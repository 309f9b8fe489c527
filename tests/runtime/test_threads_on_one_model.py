"""Several threads on one loaded model: whoever comes first is not disturbed, and everybody gets a text or a reason."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from shortstack.graphs.errors import RequestError
from shortstack.runtime import ExitPolicy, Model, load
from shortstack.runtime.decode.stream import Stream
from shortstack.runtime.decode.turns import Turns
from shortstack.runtime.early_exit.criteria import Need
from shortstack.runtime.early_exit.reading import Reading

LONG: dict[str, Any] = {"max_new_tokens": 40, "ignore_eos": True}
WAIT_S = 60.0  # until a test fails instead of hanging
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "self-speculative": {"strategy": "self-speculative"},
    "early exit": {"exits": "top_prob >= 0.01"},
}


@dataclass(frozen=True)
class Gate:
    """A criterion that waits in the middle of a step until the test lets it go on; no token leaves."""

    entered: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)
    then: Callable[[], object] | None = None
    needs = frozenset[Need]()
    least_exits = 1
    exit_layers = frozenset[int]()

    def leaves(self, reading: Reading) -> bool:
        self.entered.set()
        assert self.opened.wait(WAIT_S)
        if self.then is not None:
            self.then()
        return False


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def in_a_step(pool: ThreadPoolExecutor, model: Model, gate: Gate) -> Future[Any]:
    """Start a generation on another thread and return once it is in the middle of a step."""
    running = pool.submit(lambda: model.generate([5, 6, 7], exits=ExitPolicy(gate), **LONG))
    assert gate.entered.wait(WAIT_S)
    return running


@pytest.mark.parametrize("way", WAYS)
def test_threads_that_generate_at_the_same_time_get_the_texts_that_they_get_alone(
    model: Model, pool: ThreadPoolExecutor, way: str
) -> None:
    prompts = [[5 + i, 40, 77] for i in range(8)]
    alone = [model.generate(prompt, **LONG, **WAYS[way]).tokens for prompt in prompts]
    together = pool.map(lambda prompt: model.generate(prompt, **LONG, **WAYS[way]).tokens, prompts)
    assert list(together) == alone


def test_a_newcomer_waits_for_a_generation_in_the_middle_of_a_step(model: Model, pool: ThreadPoolExecutor) -> None:
    alone = model.generate([5, 6, 7], **LONG).tokens
    gate = Gate()
    first = in_a_step(pool, model, gate)
    second = pool.submit(lambda: model.generate([5, 6, 7], **LONG).tokens)
    third = pool.submit(lambda: [token.id for token in model.stream([5, 6, 7], **LONG)])
    assert not any(each.done() for each in (first, second, third))
    gate.opened.set()
    assert first.result(WAIT_S).tokens == second.result(WAIT_S) == alone
    assert tuple(third.result(WAIT_S)) == alone


def test_a_stream_of_another_thread_is_not_ended_by_a_newcomer(model: Model, pool: ThreadPoolExecutor) -> None:
    alone = model.generate([5, 6, 7], **LONG).tokens
    stream = model.stream([5, 6, 7], **LONG)
    taken = [next(stream).id for _ in range(3)]
    for newcomer in (
        lambda: model.generate([8, 9], **LONG),
        lambda: model.stream([8, 9], **LONG),
        lambda: model.exclusive_stack(1),
    ):
        with pytest.raises(RequestError, match=r"another thread has a stream .* 3 tokens.*close\(\), or load"):
            pool.submit(newcomer).result(WAIT_S)
    assert (*taken, *(token.id for token in stream)) == alone
    assert pool.submit(lambda: model.generate([5, 6, 7], **LONG).tokens).result(WAIT_S) == alone


def test_a_stream_that_was_dropped_cancelled_or_whose_thread_has_ended_is_in_nobodys_way(
    model: Model, pool: ThreadPoolExecutor
) -> None:
    alone = model.generate([5, 6, 7], **LONG).tokens

    def newcomer() -> Any:
        return pool.submit(lambda: model.generate([5, 6, 7], **LONG).tokens).result(WAIT_S)

    for _ in model.stream([8, 9], **LONG):
        break
    assert newcomer() == alone

    stream = model.stream([8, 9], **LONG)
    next(stream)
    stream.cancel()
    assert newcomer() == alone
    assert next(stream, None) is None
    assert stream.finish_reason == "cancelled"

    kept = []
    thread = threading.Thread(target=lambda: kept.append(model.stream([8, 9], **LONG)))
    thread.start()
    thread.join()
    assert newcomer() == alone
    with pytest.raises(RequestError, match="ended by a newer one"):
        next(kept[0])


def test_a_stream_may_be_closed_by_another_thread_in_the_middle_of_a_step(
    model: Model, pool: ThreadPoolExecutor
) -> None:
    alone = model.generate([5, 6, 7], **LONG).tokens
    gate = Gate()
    stream = model.stream([5, 6, 7], exits=ExitPolicy(gate), **LONG)
    taken = pool.submit(lambda: [token.id for token in stream])
    assert gate.entered.wait(WAIT_S)
    closing = pool.submit(stream.close)
    gate.opened.set()
    closing.result(WAIT_S)
    assert stream.finish_reason == "cancelled"
    tokens = taken.result(WAIT_S)
    assert 1 <= len(tokens) < len(alone)
    assert tuple(tokens) == alone[: len(tokens)]
    assert model.generate([5, 6, 7], **LONG).tokens == alone


def test_closing_a_model_ends_the_generation_of_another_thread_after_its_step(
    sound: Path, pool: ThreadPoolExecutor
) -> None:
    model, gate = load(sound), Gate()
    first = in_a_step(pool, model, gate)
    second = pool.submit(lambda: model.generate([5, 6, 7], **LONG))
    closing = pool.submit(model.close)
    gate.opened.set()
    closing.result(WAIT_S)
    assert first.result(WAIT_S).finish_reason == "cancelled"
    with pytest.raises(RequestError, match="is closed"):
        second.result(WAIT_S)
    with pytest.raises(RequestError, match="is closed"), model:
        pass


def test_calls_from_within_a_step_are_refused_and_cancelling_there_is_not(
    model: Model, pool: ThreadPoolExecutor
) -> None:
    """As from a signal handler, which runs wherever the main thread is."""
    found: list[str] = []

    def call() -> None:
        for again in (lambda: model.generate([5]), lambda: model.stream([5]), lambda: next(stream)):
            with pytest.raises(RequestError, match="in the middle of a step"):
                again()
            found.append("refused")
        stream.close()

    gate = Gate(then=call)
    gate.opened.set()
    stream = model.stream([5, 6, 7], exits=ExitPolicy(gate), **LONG)
    list(stream)
    assert len(found) >= 3
    assert stream.finish_reason == "cancelled"


def stream_that_raises(model: Model, error: BaseException) -> Stream:
    """A stream whose second step ends with an error."""

    def fail() -> None:
        raise error

    gate = Gate(then=fail)
    gate.opened.set()
    stream = model.stream([5, 6, 7], exits=ExitPolicy(gate), **LONG)
    next(stream)
    return stream


def test_a_generation_that_ended_with_an_error_stays_an_error(model: Model) -> None:
    stream = stream_that_raises(model, ArithmeticError("of the criterion"))
    with pytest.raises(ArithmeticError):
        next(stream)
    assert stream.finish_reason == "error"
    for _ in range(2):
        with pytest.raises(RequestError, match=r"ended with an error: of the criterion\. Start another one"):
            next(stream)
    stream.close()
    assert stream.finish_reason == "error"
    assert len(model.generate([5, 6, 7], **LONG).tokens) == 40


def test_a_step_that_is_interrupted_ends_the_generation(model: Model) -> None:
    stream = stream_that_raises(model, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert next(stream, None) is None
    assert stream.finish_reason == "cancelled"


def test_turns_are_taken_in_the_order_in_which_threads_asked() -> None:
    turns, order = Turns(), []
    waiting: list[threading.Thread] = []
    with turns, turns:
        for number in range(6):

            def take(number: int = number) -> None:
                with turns:
                    order.append(number)

            waiting.append(threading.Thread(target=take))
            waiting[-1].start()
            while len(turns._queue) < number + 2:
                time.sleep(0.001)
    with turns:
        order.append(6)
    for thread in waiting:
        thread.join(WAIT_S)
    assert order == [*range(7)]
