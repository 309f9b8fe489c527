"""Several sequences at once over scripted graphs: a request gets what it gets alone, whoever comes and goes.

The scripted segments (tests/helpers/scripted_slots.py) fail on any read of a row that is missing or belongs to another
text, and check order, room and waits as the engine runs.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import pytest

from helpers.schedules import Outcome, Tally, any_request, outcome_of, run_schedule, spoilt, step_of
from helpers.scripted import ScriptedModel
from helpers.scripted_serving import Case, ScriptedServing
from helpers.scripted_slots import SHAPES, VOCAB, SlotScript
from shortstack.graphs.errors import RequestError
from shortstack.runtime import DraftPolicy, ExitEarly, ExitPolicy, Request, Speculate
from shortstack.runtime.early_exit.criteria import Need
from shortstack.runtime.early_exit.expression import parse_criterion
from shortstack.runtime.early_exit.reading import Reading
from shortstack.runtime.engine.stack import WINDOW_ROWS

WAYS = {"batches", "batches closed", "cancelled", "cancelled and left", "closed", "context", "dropped", "eos"}
WAYS |= {"length", "FaultOnPurposeError"}
SIZES = {"chunk": 4, "prompt_chunk": 8, "worth_copying": 4}


def served(name: str, slots: int, *, context: int = 48, agreement: float = 0.7) -> ScriptedServing:
    return ScriptedServing(SlotScript(SHAPES[name], ScriptedModel(5, VOCAB, agreement), context), slots)


def leaving(rule: str, most: int, prompt: list[int], **policy: object) -> Request:
    strategy = ExitEarly(ExitPolicy(parse_criterion(rule), **policy))  # type: ignore[arg-type]
    return Request(prompt, strategy, max_new_tokens=most, ignore_eos=True)


def plain(most: int, prompt: list[int], *, reuses: bool = False) -> Request:
    return Request(prompt, max_new_tokens=most, ignore_eos=True, reuse_cache=reuses)


def run_case(seed: int, tally: Tally) -> None:
    case = Case(seed)
    serving = case.serving(case.rng.randint(1, 4))
    with case.script.sizes(**case.sizes):
        run_schedule(serving, case.rng, case.requests, case.wanted, tally)
        serving.run_to_the_end()
    for source, count in serving.engine.copies.items():
        tally.add(source, count)


@pytest.mark.parametrize("seeds", [range(400), pytest.param(range(400, 2000), marks=pytest.mark.slow)], ids=str)
def test_a_request_gets_what_it_gets_alone_whoever_comes_and_goes(seeds: range) -> None:
    tally = Tally()
    for seed in seeds:
        try:
            run_case(seed, tally)
        except Exception as error:
            error.add_note(f"schedule {seed}")
            raise
    happened = {what for what, count in tally.counts.items() if count}
    assert happened == {*WAYS, "from a busy slot", "from a slot that is drafted in"}


@pytest.mark.parametrize("requests", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_slot_is_lost(requests: int, seed: int) -> None:
    rng = random.Random(seed)
    serving = served("float", 3, context=24)
    streams = []
    with serving.script.sizes(**SIZES):
        for _ in range(requests):
            request = any_request(rng, SHAPES["float"].exits, VOCAB, 24)
            streams.append(serving.start(spoilt(rng, request) if rng.random() < 0.1 else request))
            while len(streams) > 6:
                stream = rng.choice(streams)
                if step_of(stream) is not None or rng.random() < 0.05:
                    rng.choice((stream.close, stream.cancel))()
                    streams.remove(stream)
        for stream in streams:
            outcome_of(stream)
        serving.run_to_the_end()
    assert sorted(serving.engine._slots._free) == [0, 1, 2]


@pytest.mark.parametrize("name", ["complete", "float"])
@pytest.mark.parametrize("from_prompt", [False, True])
def test_who_never_wants_the_upper_layers_keeps_nobody_waiting_who_does(name: str, from_prompt: bool) -> None:
    """Where exits are complete, tokens that leave never ask for the layers above."""
    serving = served(name, 4, context=400)
    with serving.script.sizes():
        eager = serving.start(leaving("always", 300, [3, 4], prefill_exit=from_prompt))
        other = serving.start(plain(300, [5, 6]))
        next(other)
        (job,) = (job for job in serving.engine._active if job.ids == [5, 6])
        came = [job.stats.emitted for _ in eager]
    longest = max(Counter(came).values())
    assert longest <= 2 * WINDOW_ROWS
    assert came[-1] >= 300 // (2 * WINDOW_ROWS)


def test_a_long_prompt_stops_the_others_for_two_of_their_rounds_at_most() -> None:
    """Rows of a chunk cost what rows of a round cost here, so rows are counted in place of seconds."""
    serving = served("float", 4, context=200)
    script = serving.script
    script.run_s, script.row_s = 0.0, 1.0
    with script.sizes(chunk=1):
        others = [serving.start(plain(60, [3 + i])) for i in range(3)]
        for stream in others:
            next(stream)
        script.runs.clear()
        long = serving.start(plain(3, [4] * 150))
        outcome_of(long)
    chunks = [(index, run) for index, run in enumerate(script.runs) if run.is_prompt and run.segment == 0]
    assert len(chunks) > 10
    assert all(run.rows <= 2 * len(others) for _, run in chunks[2:])  # after the first ones, costs are known
    for (before, _), (after, _) in pairwise(chunks):
        rounds = [run for run in script.runs[before:after] if not run.is_prompt]
        assert {run.segment for run in rounds} == {0, 1, 2}, "no whole round between two chunks"


def test_a_prompt_that_ran_alone_below_runs_in_small_chunks_above_once_others_have_joined() -> None:
    serving = served("float", 2, context=100)
    script = serving.script
    alone = outcome_of(served("float", 2, context=100).start(leaving("never", 4, [5] * 60, prefill_exit=True)))
    with script.sizes(chunk=4):
        first = serving.start(leaving("never", 4, [5] * 60, prefill_exit=True))
        serving.engine.run_once()
        assert script.runs[-1].rows == 60
        other = serving.start(plain(60, [3]))
        next(other)
        script.runs.clear()
        assert outcome_of(first) == alone
        assert next(other)
    assert max(run.rows for run in script.runs) <= 8


def test_a_cancelled_generation_emits_one_token_more_at_most_though_nobody_reads_it() -> None:
    serving = served("float", 3)
    streams = [serving.start(plain(30, [3 + i])) for i in range(3)]
    for stream in streams:
        next(stream)
    jobs = list(serving.engine._active)
    streams[0].cancel()
    del stream, streams[1]
    before = [job.stats.emitted for job in jobs]
    outcome_of(streams[-1])
    assert [job.stats.emitted - was for job, was in zip(jobs, before, strict=True)][:2] <= [1, 1]
    assert [job.is_done for job in jobs] == [True, True, True]
    assert next(streams[0], None) is None
    assert streams[0].finish_reason == "cancelled"


def test_a_closed_generation_has_no_row_in_any_later_run() -> None:
    serving = served("float", 2)
    first, second = serving.start(plain(30, [3])), serving.start(plain(30, [4]))
    next(first), next(second)
    first.close()
    serving.script.runs.clear()
    outcome_of(second)
    assert {run.slots for run in serving.script.runs} == {(1,)}


@pytest.mark.parametrize("name", ["float", "int8 cache"])
def test_a_text_at_the_end_of_the_context_has_room_beside_the_longest_round(name: str) -> None:
    """The kernel wants room for as many rows behind each text as the longest part of the run has."""
    serving = served(name, 2, context=40)
    wanted = outcome_of(serving.start(plain(2, [3] * 38)))
    with serving.script.sizes():
        eager = serving.start(leaving("always", 30, [4], max_pending=WINDOW_ROWS))
        next(eager)
        last = serving.start(plain(2, [3] * 38))
        assert outcome_of(eager).end == "length"
        assert outcome_of(last) == wanted
    assert WINDOW_ROWS + 1 in {run.rows for run in serving.script.runs if len(run.slots) == 2}


def test_a_run_that_fails_ends_those_who_had_rows_in_it_and_leaves_the_cache_right() -> None:
    serving = served("float", 3)
    wanted = {token: outcome_of(serving.start(plain(20, [token]))) for token in (3, 4, 5)}
    script = serving.script
    streams = {token: serving.start(plain(20, [token])) for token in (3, 4)}
    for stream in streams.values():
        next(stream)
    script.fails = lambda segment, parts: segment == 2 and len(parts) == 2
    assert {step_of(stream) for stream in streams.values() for _ in range(5)} >= {"ScriptedError"}
    script.fails = lambda segment, parts: False
    serving.check()
    for token, alone in wanted.items():
        assert outcome_of(serving.start(plain(20, [token], reuses=True))) == alone
    serving.run_to_the_end()


def test_a_run_that_fails_ends_nobody_who_waits_for_another_run() -> None:
    serving = served("float", 2)
    alone = outcome_of(serving.start(plain(20, [3])))
    script = serving.script
    other = serving.start(plain(20, [3]))
    drafting = serving.start(Request([4], Speculate(1, DraftPolicy(7)), max_new_tokens=20, ignore_eos=True))
    next(other), next(drafting)
    (slot,) = (job.slot.number for job in serving.engine._active if job.slot is not None and job.ids == [4])
    script.fails = lambda segment, parts: [part.slot for part in parts] == [slot]
    assert outcome_of(other) == alone
    assert outcome_of(drafting).end == "ScriptedError"
    assert script.runs[-1].slots == (1 - slot,)
    serving.run_to_the_end()


def test_a_prompt_that_was_cancelled_between_two_chunks_leaves_a_prefix_that_is_right() -> None:
    text = [3, 4, 5, 6] * 10
    wanted = outcome_of(served("float", 1).start(plain(5, text)))
    for chunks in range(1, 4):  # of four
        serving = served("float", 1)
        with serving.script.sizes(prompt_chunk=7):
            done = serving.start(plain(2, [*text[:9], 7]))
            outcome_of(done)
            half = serving.start(plain(5, [*text[:20], *[7] * 15], reuses=True))
            for _ in range(chunks):
                serving.engine.run_once()
            assert half.stats.emitted == 0
            half.close()
            serving.check()
            again = serving.start(plain(5, text, reuses=True))
            assert outcome_of(again) == wanted
        assert again.stats.reused == 9


@pytest.mark.parametrize("agreement", [0.0, 0.5, 1.0])
def test_a_prefix_is_copied_from_a_slot_that_is_being_drafted_in(agreement: float) -> None:
    """The slot has rows of drafts behind its text, some of which are taken back; a copy stops before them."""
    drafting = Request([3, 4, 5, 6], Speculate(1, DraftPolicy(7)), max_new_tokens=40, ignore_eos=True)
    text = [3, 4, 5, 6, *served("float", 1, agreement=agreement).script.model.continuation([3, 4, 5, 6], 40, 44)]
    wanted = outcome_of(served("float", 1, agreement=agreement).start(plain(4, [*text[:30], 2])))
    copies = 0
    for steps in range(2, 40, 5):
        serving = served("float", 2, agreement=agreement)
        with serving.script.sizes(worth_copying=1):
            first = serving.start(drafting)
            for _ in range(steps):
                serving.engine.run_once()
            second = serving.start(plain(4, [*text[:30], 2], reuses=True))
            assert outcome_of(second) == wanted
            assert outcome_of(first).tokens == tuple(text[4:44])
            serving.run_to_the_end()
        copies += serving.engine.copies["from a slot that is drafted in"]
    assert copies > 2


def test_who_is_not_read_keeps_nobody_waiting() -> None:
    serving = served("float", 2)
    alone = [outcome_of(serving.start(plain(9, [3 + i]))) for i in range(4)]
    unread = serving.start(plain(30, [7]))
    streams = [serving.start(plain(9, [3 + i])) for i in range(4)]
    assert [outcome_of(stream) for stream in streams] == alone
    assert outcome_of(unread).end == "length"


@dataclass(frozen=True)
class Calls:
    """A criterion that calls something in the middle of a step; no token leaves."""

    call: Callable[[], object]
    needs = frozenset[Need]()
    least_exits = 1
    exit_layers = frozenset[int]()

    def leaves(self, reading: Reading) -> bool:
        self.call()
        return False


def test_a_step_within_a_step_is_refused_and_disturbs_nobody() -> None:
    serving = served("float", 3)
    alone = [outcome_of(serving.start(plain(12, [3 + i]))) for i in range(2)]
    others = [serving.start(plain(12, [3 + i])) for i in range(2)]
    refused: list[str] = []

    def call() -> None:
        for again in (
            lambda: next(others[1]),
            lambda: serving.start(plain(3, [6])),
            lambda: list(serving.batch([plain(3, [6])])),
        ):
            try:
                again()
            except RequestError as error:
                refused.append(str(error))

    meddling = serving.start(Request([5], ExitEarly(ExitPolicy(Calls(call))), max_new_tokens=9, ignore_eos=True))
    texts = [outcome_of(stream) for stream in (others[0], meddling, others[1])]
    assert [texts[0], texts[2]] == alone
    assert texts[1].end == "length"
    assert len(refused) > 8
    assert all("in the middle of a step" in message for message in refused)
    serving.run_to_the_end()


def test_a_generation_that_is_closed_from_within_a_run_ends_after_it() -> None:
    """As from a signal handler, or a criterion of the caller's own."""
    serving = served("float", 3)
    alone = outcome_of(serving.start(plain(12, [3])))
    kept, closed = serving.start(plain(12, [3])), serving.start(plain(12, [4]))
    next(closed)
    closing = Request([5], ExitEarly(ExitPolicy(Calls(closed.close))), max_new_tokens=9, ignore_eos=True)
    streams = [serving.start(closing), kept]
    assert [outcome_of(stream).end for stream in streams] == ["length", "length"]
    assert tuple(kept.token_ids) == alone.tokens
    assert closed.finish_reason == "cancelled"
    serving.run_to_the_end()


def test_a_model_that_is_closed_from_within_a_run_ends_all_generations_after_it() -> None:
    serving = served("float", 2)
    closing = Request(
        [5],
        ExitEarly(ExitPolicy(Calls(lambda: serving.generations.close(lambda: True)))),
        max_new_tokens=9,
        ignore_eos=True,
    )
    streams = [serving.start(request) for request in (plain(12, [3]), closing, plain(12, [4]))]
    assert {outcome_of(stream).end for stream in streams} == {"cancelled"}
    serving.run_to_the_end()


def test_a_stream_whose_loop_somebody_else_has_ended_says_that_it_was_cancelled() -> None:
    serving = served("float", 2)
    stream = serving.start(plain(12, [3]))
    next(stream)
    serving.engine.cancel_all()
    assert list(stream) == []
    assert stream.finish_reason == "cancelled"


def test_prompts_that_do_not_come_keep_nobody_else_waiting() -> None:
    """The prompts of a batch are read without the lock that runs need."""
    serving = served("float", 2)
    found: list[Outcome] = []

    def requests() -> Iterator[Request]:
        yield plain(3, [3])
        thread = threading.Thread(target=lambda: found.append(outcome_of(serving.start(plain(5, [4])))), daemon=True)
        thread.start()
        thread.join(60)
        yield plain(3, [5])

    assert len(list(serving.batch(requests()))) == 2
    assert [outcome.end for outcome in found] == ["length"]
