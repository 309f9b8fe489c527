"""Random requests, and random orders in which they join, are read, are cancelled and fail.

A schedule starts streams and batches on a model of several slots, takes tokens here and there, and ends some of the
streams on the way. Every token that comes is compared with what the same request gets alone. So is every end: by
length, by an end token, or by an error of the request's own.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from shortstack.graphs.plan import ExitSpec
from shortstack.runtime import DraftPolicy, ExitEarly, ExitPolicy, Plain, Request, SamplingParams, Speculate
from shortstack.runtime.decode.drafters import Draft
from shortstack.runtime.decode.stream import Stream
from shortstack.runtime.early_exit.criteria import Criterion, Need
from shortstack.runtime.early_exit.expression import parse_criterion
from shortstack.runtime.early_exit.reading import Reading
from shortstack.runtime.request import Strategy
from shortstack.runtime.result import Result

RULES = (
    "always",
    "never",
    "top_prob >= 0.3",
    "top_prob >= 0.7",
    "margin >= 0.2",
    "entropy <= 1.3",
    "similarity >= 0.9",
    "mean_prob >= 0.3",
    "top_prob >= 0.5 [{first}: 0.2] ~ 4",
    "patience >= 2",
    "votes >= 2",
    "max_depth = {last}..{first}",
)
OF_SEVERAL = ("patience >= 2", "votes >= 2", "similarity >= 0.9")  # rules that one exit cannot follow
SAMPLINGS = (
    SamplingParams(temperature=0.9, seed=3),
    SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.3, seed=4),
)


class FaultOnPurposeError(Exception):
    """A fault of one request, on purpose."""


@dataclass(frozen=True)
class Raises:
    """A criterion that raises at a position."""

    inner: Criterion
    position: int
    least_exits = 1

    @property
    def needs(self) -> frozenset[Need]:
        return self.inner.needs

    @property
    def exit_layers(self) -> frozenset[int]:
        return self.inner.exit_layers

    def leaves(self, reading: Reading) -> bool:
        if reading.position >= self.position:
            raise FaultOnPurposeError("of a criterion")
        return self.inner.leaves(reading)


@dataclass(frozen=True)
class BadDrafts:
    """A source of drafts that raises: when its drafter is made, or when a text has reached a length."""

    length: int | None

    def exits_in(self, plan: object) -> tuple[int, ...]:
        return ()

    def drafter(self, stack: object, choice: object) -> BadDrafts:
        if self.length is None:
            raise FaultOnPurposeError("of a source")
        return self

    def start(self, tokens: Sequence[int], cached: int) -> int:
        return cached

    def end(self) -> None:
        pass

    def draft(self, past: int, tokens: Sequence[int], most: int, least_confidence: float) -> Draft:
        if self.length is not None and len(tokens) >= self.length:
            raise FaultOnPurposeError("of a drafter")
        return Draft(())

    def observe(self, emitted: int, rows: int) -> None:
        pass


def any_strategy(rng: random.Random, exits: Sequence[ExitSpec], *, is_sampled: bool) -> Strategy:
    """Return a strategy at random whose tokens do not depend on measured times."""
    layers = [each.exit_layer for each in exits]
    kind = rng.choice(("plain", "speculative", "speculative", "early", "early", "early"))
    if kind == "plain":
        return Plain()
    if kind == "speculative":
        adapts = not is_sampled and rng.random() < 0.3
        draft = DraftPolicy(rng.randint(1, 15), rng.choice((0.0, 0.0, 0.4)), adapts, has_bonus=rng.random() < 0.5)
        return Speculate(rng.choice(layers), draft)
    used = tuple(sorted(rng.sample(layers, rng.randint(1, len(layers)))))
    rule = rng.choice([rule for rule in RULES if len(used) > 1 or rule not in OF_SEVERAL])
    if all(each.has_gate for each in exits) and rng.random() < 0.2:
        rule = "gate >= 0.3"
    criterion = parse_criterion(rule.format(first=used[0], last=used[-1]))
    verify = rng.choice(("none", "exact") if is_sampled else ("none", "none", "exact", "rollback"))
    from_prompt = verify == "none" and not any(each.sees_state for each in exits) and rng.random() < 0.3
    ways = ("flush", "recompute") if from_prompt or verify != "none" else ("flush", "recompute", "pipeline", "auto")
    return ExitEarly(
        ExitPolicy(
            criterion,
            used,
            verify=verify,
            kv_policy=rng.choice(ways),
            max_pending=rng.choice((None, 1, 2, 5, 16)),
            prefill_exit=from_prompt,
        )
    )


def any_request(
    rng: random.Random, exits: Sequence[ExitSpec], vocab: int, context: int, texts: Sequence[Sequence[int]] = ()
) -> Request:
    """Return a request at random; some begin like one of the texts, some fill the context."""
    is_sampled = rng.random() < 0.3
    sampling = rng.choice(SAMPLINGS) if is_sampled else SamplingParams(repetition_penalty=rng.choice((1.0, 1.0, 1.5)))
    strategy = any_strategy(rng, exits, is_sampled=is_sampled)
    if isinstance(strategy, ExitEarly) and strategy.policy.verify == "rollback":
        sampling = SamplingParams()
    length = min(rng.choice((1, 2, 5, 9, 17, 30, context - 3)), context - 1)
    prompt = list(rng.choice(texts)[:length]) if texts and rng.random() < 0.6 else []
    prompt = prompt[: rng.randint(0, len(prompt))] if rng.random() < 0.3 else prompt
    prompt += [rng.randrange(3, vocab) for _ in range(length - len(prompt))]
    return Request(
        prompt,
        strategy,
        sampling,
        max_new_tokens=rng.choice((1, 2, 7, 12, 25)),
        ignore_eos=rng.random() < 0.7,
        reuse_cache=rng.random() < 0.6,
    )


def spoilt(rng: random.Random, request: Request) -> Request:
    """Return the request with a criterion or a source of drafts that raises somewhere."""
    fields = {name: getattr(request, name) for name in ("prompt", "sampling", "max_new_tokens", "reuse_cache")}
    strategy = request.strategy
    if isinstance(strategy, ExitEarly):
        policy = strategy.policy
        bad = Raises(policy.criterion, rng.randint(0, 6))
        kept = {name: getattr(policy, name) for name in ("verify", "max_pending", "prefill_exit", "exit_layers")}
        return Request(strategy=ExitEarly(ExitPolicy(bad, **kept)), **fields)
    length = len(request.prompt) + rng.randint(1, 5)  # type: ignore[arg-type]
    source = BadDrafts(rng.choice((None, length, length)))
    return Request(strategy=Speculate(None, DraftPolicy(3), source), **fields)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Outcome:
    """What a request gives: tokens, and how it ends, by a reason or by the name of an error's class."""

    tokens: tuple[int, ...]
    end: str


class Served(Protocol):
    """A model of several slots, real or scripted."""

    def start(self, request: Request) -> Stream: ...

    def batch(self, requests: Iterable[Request]) -> Iterator[tuple[int, Result]]: ...

    def check(self) -> None:
        """Check what can be checked at any time."""
        ...

    def check_ended(self, stream: Stream) -> None:
        """Check that nothing runs for a stream any more."""
        ...


def outcome_of(stream: Stream, so_far: Callable[[tuple[int, ...]], None] = lambda tokens: None) -> Outcome:
    """Read a stream to its end."""
    while (end := step_of(stream)) is None:
        so_far(tuple(stream.token_ids))
    return Outcome(tuple(stream.token_ids), end)


def step_of(stream: Stream) -> str | None:
    """Take a token; return how the stream has ended, None if it has not."""
    try:
        next(stream)
    except StopIteration:
        assert stream.finish_reason is not None
        return stream.finish_reason
    except Exception as error:
        return type(error).__name__
    return None


@dataclass
class Tally:
    """What schedules did, so that a test can say that all of it happened."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, what: str, count: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + count


def run_schedule(
    served: Served, rng: random.Random, requests: Sequence[Request], wanted: Callable[[Request], Outcome], tally: Tally
) -> None:
    """Let requests join, be read, leave and fail in a random order.

    Args:
        served: The model.
        rng: Decides.
        requests: The requests.
        wanted: What a request gives alone.
        tally: Counts what happens.
    """
    left = list(requests)
    live: dict[int, tuple[Request, Stream, float]] = {}  # with how eager its reader is
    batches: list[tuple[list[Request], Iterator[tuple[int, Result]], set[int]]] = []
    numbers = itertools.count()

    def check_text(request: Request, stream: Stream) -> None:
        found, alone = tuple(stream.token_ids), wanted(request)
        assert found == alone.tokens[: len(found)], f"{request}: {found}, alone {alone}"

    while left or live or batches:
        act = rng.random()
        if left and (act < 0.25 or not (live or batches)):
            if rng.random() < 0.15:
                group = [left.pop() for _ in range(min(len(left), rng.randint(1, 5)))]
                batches.append((group, served.batch(group), set(range(len(group)))))
                tally.add("batches")
            else:
                request = left.pop()
                live[next(numbers)] = request, served.start(request), rng.choice((0.02, 1.0, 1.0, 3.0))
        elif live and act < 0.33:
            number = rng.choice(list(live))
            request, stream, _ = live.pop(number)
            check_text(request, stream)
            way = rng.choice(("closed", "cancelled", "dropped", "cancelled and left"))
            tally.add(way)
            ended = stream.finish_reason  # its last token has been read, but nobody has asked for another one
            if way == "closed":
                stream.close()
            elif way.startswith("cancelled"):
                stream.cancel()
                if way == "cancelled":
                    assert next(stream, None) is None
            if way in ("closed", "cancelled"):
                assert stream.finish_reason == (ended or "cancelled")
                served.check_ended(stream)
            del stream
        elif batches and (act < 0.45 or not live):
            group, results, missing = rng.choice(batches)
            if rng.random() < 0.1:
                results.close()  # type: ignore[attr-defined]
                tally.add("batches closed")
                batches = [each for each in batches if each[1] is not results]
            elif (ended := next(results, None)) is None:
                assert not missing
                batches = [each for each in batches if each[1] is not results]
            else:
                number, result = ended
                missing.remove(number)
                end = type(result.error).__name__ if result.error is not None else result.finish_reason
                alone = wanted(group[number])
                assert end == alone.end, f"{group[number]}: {end}, {result.error}, alone {alone}"
                if result.error is None:
                    assert result.tokens == alone.tokens, f"{group[number]}: {result.tokens}, alone {alone}"
                    assert result.stats.is_balanced
        elif live:
            number = rng.choices(list(live), [each[2] for each in live.values()])[0]
            request, stream, _ = live[number]
            end = step_of(stream)
            check_text(request, stream)
            if end is not None:
                del live[number]
                alone = wanted(request)
                assert (tuple(stream.token_ids), end) == (alone.tokens, alone.end), f"{request}: {end}, alone {alone}"
                tally.add(end)
        served.check()


def any_texts(rng: random.Random, vocab: int, context: int) -> list[list[int]]:
    """Return a few texts that prompts begin with."""
    return [[rng.randrange(3, vocab) for _ in range(context)] for _ in range(rng.randint(1, 3))]
