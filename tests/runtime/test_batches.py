"""Several sequences at once: each text is the one that its prompt gets alone, whatever else runs with it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.kv_bundles import KVBundles
from helpers.quantized import QuantizedBundles, preset
from helpers.tiny_models import SPECULATOR, TinyBundles
from shortstack import Stream
from shortstack.graphs.errors import RequestError
from shortstack.graphs.precision import BlockFormat
from shortstack.runtime import (
    DraftPolicy,
    ExitEarly,
    ExitPolicy,
    Model,
    Plain,
    Request,
    SamplingParams,
    Speculate,
    load,
    parse_criterion,
)
from shortstack.runtime.decode import choice as one_choice

EXITS = (1, 3)
SLOTS = 4
COMPLETE = (0, 1, 1, 1)  # above layer 1 nothing owns a cache
BUNDLES = ("float", "int4 with an int8 cache", "int8", "complete", "shared across cuts")
SHARED = (0, 0, 2, 0)


@pytest.fixture(scope="module")
def paths(tiny_bundles: TinyBundles, kv_bundles: KVBundles, quantized: QuantizedBundles) -> dict[str, Path]:
    plain = tiny_bundles.bundle(SPECULATOR, *EXITS)
    return {
        "float": plain,
        "int4 with an int8 cache": quantized(plain, preset(BlockFormat(4, has_offsets=True), "int8")),
        "int8": quantized(plain, preset(BlockFormat(8))),
        "complete": kv_bundles.bundle(COMPLETE, 2, 3),
        "shared across cuts": quantized(kv_bundles.bundle(SHARED, 1, 2), preset(BlockFormat(4), "int8")),
    }


@pytest.fixture(scope="module", params=BUNDLES)
def model(request: pytest.FixtureRequest, paths: dict[str, Path]) -> Iterator[Model]:
    with load(paths[request.param], slots=SLOTS) as found:
        yield found


def any_request(model: Model, rng: random.Random) -> Request:
    """Return a request at random: any strategy, length and sampling whose draws do not depend on measured times."""
    vocab = model.bundle.manifest.spec.vocab_size
    prompt = [rng.randrange(3, vocab) for _ in range(rng.choice((1, 2, 5, 17, 40)))]
    sampling = SamplingParams(temperature=0.9, seed=rng.randrange(99)) if rng.random() < 0.3 else SamplingParams()
    exits = model.exit_layers
    rule = rng.choice(("always", "top_prob >= 0.2", "top_prob >= 0.6", "margin >= 0.3", "never"))
    drafts = DraftPolicy(rng.randint(1, 6), rng.choice((0.0, 0.4)), has_bonus=rng.random() < 0.5)
    strategy = rng.choice(
        (
            Plain(),
            Speculate(rng.choice(exits), drafts),
            ExitEarly(ExitPolicy(parse_criterion(rule), verify="exact", max_pending=rng.randint(2, 8))),
            ExitEarly(ExitPolicy(parse_criterion(rule), max_pending=rng.randint(2, 8))),
            ExitEarly(ExitPolicy(parse_criterion(rule), prefill_exit=True, max_pending=4)),
        )
    )
    if strategy == Plain() or rng.random() < 0.5:
        sampling = sampling if isinstance(strategy, Plain | Speculate) else SamplingParams()
    else:
        sampling = SamplingParams()
    most, ignores = rng.randint(1, 24), rng.random() < 0.7
    return Request(prompt, max_new_tokens=most, strategy=strategy, sampling=sampling, ignore_eos=ignores)


def test_a_text_is_the_one_that_its_prompt_gets_alone(model: Model, seed: int) -> None:
    rng = random.Random(seed)
    requests = [any_request(model, rng) for _ in range(16)]
    together = model.generate_batch(requests)
    for request, result in zip(requests, together, strict=True):
        alone = model.generate_batch([request])[0]
        assert (result.tokens, result.finish_reason) == (alone.tokens, alone.finish_reason), request
        assert result.stats.is_balanced


def run_schedule(model: Model, rng: random.Random, requests: list[Request], wanted: list[tuple[int, ...]]) -> None:
    """Start, advance and close generations in a random order; check every token that comes."""
    live: dict[int, Stream] = {}
    left = list(range(len(requests)))
    while left or live:
        act = rng.random()
        if left and (act < 0.3 or not live):
            number = left.pop()
            live[number] = model.start(requests[number])
        elif act < 0.35:
            live.pop(rng.choice(list(live))).close()
        else:
            number = rng.choice(list(live))
            if next(live[number], None) is None:
                assert tuple(live.pop(number).token_ids) == wanted[number], requests[number]
            else:
                found = tuple(live[number].token_ids)
                assert found == wanted[number][: len(found)], requests[number]


@pytest.mark.parametrize("schedules", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_no_token_depends_on_who_joins_and_who_leaves(model: Model, seed: int, schedules: int) -> None:
    rng = random.Random(seed)
    for _ in range(schedules):
        requests = [any_request(model, rng) for _ in range(10)]
        wanted = [model.generate_batch([request])[0].tokens for request in requests]
        run_schedule(model, rng, requests, wanted)


def test_greedy_texts_are_those_of_plain_decoding(model: Model, seed: int) -> None:
    rng = random.Random(seed)
    requests = [any_request(model, rng) for _ in range(12)]
    exact = [
        r
        for r in requests
        if r.sampling == SamplingParams()
        and not (isinstance(r.strategy, ExitEarly) and r.strategy.policy.verify == "none")
    ]
    plain = model.generate_batch(
        [Request(r.prompt, max_new_tokens=r.max_new_tokens, ignore_eos=r.ignore_eos) for r in exact]
    )
    for request, drafted, wanted in zip(exact, model.generate_batch(exact), plain, strict=True):
        assert drafted.tokens == wanted.tokens, request


@pytest.mark.parametrize("name", [name for name in BUNDLES if name != "float"])
def test_one_slot_and_several_give_the_same_tokens(paths: dict[str, Path], name: str, seed: int) -> None:
    rng = random.Random(seed)
    with load(paths[name], slots=3) as several, load(paths[name]) as one:
        requests = [any_request(one, rng) for _ in range(10)]
        wanted = one.generate_batch(requests)
        for request, found, alone in zip(requests, several.generate_batch(requests), wanted, strict=True):
            assert found.tokens == alone.tokens, request


def test_streams_of_one_model_run_side_by_side(model: Model) -> None:
    first = model.stream([5, 6, 7], max_new_tokens=8, ignore_eos=True)
    second = model.stream([9, 8], max_new_tokens=8, ignore_eos=True)
    taken: dict[str, list[int]] = {"first": [], "second": []}
    for a, b in zip(first, second, strict=True):
        taken["first"].append(a.id)
        taken["second"].append(b.id)
    assert tuple(taken["first"]) == model.generate([5, 6, 7], max_new_tokens=8, ignore_eos=True).tokens
    assert tuple(taken["second"]) == model.generate([9, 8], max_new_tokens=8, ignore_eos=True).tokens


def test_a_closed_stream_frees_its_slot(model: Model) -> None:
    streams = [model.stream([5 + i], max_new_tokens=30, ignore_eos=True) for i in range(SLOTS)]
    for stream in streams:
        next(stream)
        stream.close()
    assert [len(r.tokens) for r in model.generate_batch([[4]] * 6, max_new_tokens=3, ignore_eos=True)] == [3] * 6


def test_a_prompt_starts_from_what_a_slot_still_holds(model: Model) -> None:
    text = [7, 8, 9] * 12
    fresh = model.generate(text, max_new_tokens=6, ignore_eos=True, reuse_cache=False)
    again = model.generate_batch([[*text, 5]] * SLOTS, max_new_tokens=6, ignore_eos=True, reuse_cache=True)
    assert all(result.stats.reused == len(text) for result in again)
    assert len({result.tokens for result in again}) == 1
    assert model.generate(text, max_new_tokens=6, ignore_eos=True).tokens == fresh.tokens


def test_what_needs_one_sequence_is_refused_by_name(model: Model) -> None:
    for call in (lambda: model.activations([1, 2]), model.exclusive_stack, lambda: model.cache):
        with pytest.raises(RequestError, match="slots=1"):
            call()


def test_models_that_run_one_sequence_at_a_time_say_so(kv_bundles: KVBundles) -> None:
    bundle = kv_bundles.bundle((0, 2, 2, 3), 3)
    with pytest.raises(RequestError, match="one sequence at a time"):
        load(bundle, slots=2)
    with load(bundle) as model:
        assert len(model.generate_batch([[4, 5], [6]], max_new_tokens=3, ignore_eos=True)) == 2


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "4"])
def test_slots_are_a_whole_number(paths: dict[str, Path], wrong: Any) -> None:
    with pytest.raises(RequestError, match="slots"):
        load(paths["float"], slots=wrong)


def test_a_closed_model_cancels_what_still_runs(paths: dict[str, Path]) -> None:
    model = load(paths["int8"], slots=2)
    batch = model.stream_batch([[5], [6], [7]], max_new_tokens=40, ignore_eos=True, keep_going=True)
    stream = model.stream([9], max_new_tokens=40, ignore_eos=True)
    next(stream)
    model.close()
    assert list(stream) == []
    assert stream.finish_reason == "cancelled"
    assert all("closed" in str(result.error) for _, result in batch)


def test_an_interrupt_ends_one_generation_and_no_other(paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with load(paths["int8"], slots=2) as model:
        streams = [model.stream([5 + i], max_new_tokens=6, ignore_eos=True) for i in range(2)]
        for stream in streams:
            next(stream)
        with monkeypatch.context() as patch:
            patch.setattr(one_choice, "confidence_of", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                list(streams[0])
        for stream in streams:  # one of the two was interrupted; none waits for ever
            with contextlib.suppress(RequestError):
                list(stream)
            assert stream.finish_reason is not None or stream.token_ids
        assert len(model.generate([4], max_new_tokens=3, ignore_eos=True).tokens) == 3


def _interrupt(*_: object) -> float:
    raise KeyboardInterrupt


def test_what_is_no_prompt_fails_alone(model: Model) -> None:
    found = dict(model.stream_batch([[5], 3, {"a": 1}], max_new_tokens=2, ignore_eos=True, keep_going=True))  # type: ignore[list-item]
    assert [found[number].error is None for number in range(3)] == [True, False, False]
    with pytest.raises(RequestError, match="a list of prompts"):
        model.generate_batch("hello")
