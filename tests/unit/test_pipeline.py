"""Early exit as a pipeline: the threads of the levels above the lowest, in whatever order they run."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from helpers.exit_runs import Pattern, run
from helpers.scripted import ScriptedError, ScriptedModel
from helpers.scripted_levels import ScriptedLevels
from shortstack.runtime.decode.step import Stats
from shortstack.runtime.early_exit.auto import WayCosts
from shortstack.runtime.early_exit.catch_up import FlushCatchUp
from shortstack.runtime.early_exit.pending import PendingCap
from shortstack.runtime.early_exit.pipeline import PipelineCatchUp
from shortstack.runtime.early_exit.policy import ExitPolicy

SCHEDULES = 1000


def levels_alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("shortstack level")]


def test_a_thousand_random_schedules_give_the_tokens_and_caches_of_a_flush() -> None:
    rng = random.Random(0)
    runs_of_several, most_pending = 0, 0
    for seed in range(SCHEDULES):
        pattern = Pattern([rng.random() < 0.7 for _ in range(rng.randint(1, 12))])
        exits, prompt = rng.randint(1, 3), [rng.randrange(8) for _ in range(3)]
        model = ScriptedModel(seed)
        stop_after = rng.randint(1, 14)
        flush = run(ScriptedLevels(model, exits), prompt, ExitPolicy(pattern), 14, stop_after=stop_after)
        levels = ScriptedLevels(model, exits, naps=seed)
        policy = ExitPolicy(pattern, kv_policy="pipeline")
        pipeline = run(levels, prompt, policy, 14, stop_after=stop_after)
        assert pipeline.tokens == flush.tokens
        assert [s.exit_layer for s in pipeline.steps] == [s.exit_layer for s in flush.steps]
        runs_of_several += sum(end - start > 1 for level, start, end, _ in levels.runs if level)
        most_pending = max(most_pending, *(s.pending for s in pipeline.steps))
    assert runs_of_several > SCHEDULES / 10, "no thread ever fell behind"
    assert most_pending == 8, "the window was never full"
    assert levels_alive() == []


@pytest.fixture
def pipeline() -> Iterator[tuple[ScriptedLevels, PipelineCatchUp]]:
    levels = ScriptedLevels(ScriptedModel(1), 2)
    levels.prefill([1, 2], 0, False)
    catch_up = PipelineCatchUp(levels, Stats())
    catch_up.begin_round(2)
    yield levels, catch_up
    catch_up.close()


def enter(levels: ScriptedLevels, catch_up: PipelineCatchUp, row: int) -> None:
    levels.put(row, row)
    catch_up.run_lowest(row, False)


def wait_for(levels: ScriptedLevels, runs: Sequence[tuple[int, int, int, int]]) -> None:
    """Wait until exactly these runs have been made, in any order."""
    end = time.monotonic() + 20
    while sorted(levels.runs) != sorted(runs):
        assert time.monotonic() < end, levels.runs
        time.sleep(0.001)


def test_the_levels_above_work_while_the_caller_does_something_else(
    pipeline: tuple[ScriptedLevels, PipelineCatchUp],
) -> None:
    levels, catch_up = pipeline
    enter(levels, catch_up, 0)
    catch_up.mark_pending(0, 0)
    wait_for(levels, [(0, 0, 1, 1), (1, 0, 1, 0), (2, 0, 1, 0)])


def test_the_next_level_waits_until_the_caller_has_read_the_row(
    pipeline: tuple[ScriptedLevels, PipelineCatchUp],
) -> None:
    levels, catch_up = pipeline
    enter(levels, catch_up, 0)
    catch_up.mark_pending(0, 0)
    enter(levels, catch_up, 1)
    catch_up.run_level(1, 1, 1, False)
    assert (2, 0, 2, 0) not in levels.runs
    assert levels.heads[1].token[1] >= 0, "the head did not run on the row"
    wait = [run for run in levels.runs if run[0] == 2]
    assert all(end == 1 for _, _, end, _ in wait)
    catch_up.mark_pending(1, 1)
    catch_up.fill_pending(2)
    levels.assert_holds([1, 2, 0, 1])


def test_an_error_in_a_thread_is_raised_in_the_caller_with_its_own_type(
    pipeline: tuple[ScriptedLevels, PipelineCatchUp],
) -> None:
    levels, catch_up = pipeline
    levels.fails = lambda level, start, end: level == 2
    enter(levels, catch_up, 0)
    catch_up.mark_pending(0, 0)
    with pytest.raises(ScriptedError):
        catch_up.fill_pending(1)
    with pytest.raises(ScriptedError):
        catch_up.run_lowest(1, False)


def test_closing_in_the_middle_waits_for_the_run_and_starts_no_other() -> None:
    levels = ScriptedLevels(ScriptedModel(1), 1)
    levels.prefill([1, 2], 0, False)
    started, may_end = threading.Event(), threading.Event()

    def block(level: int, start: int, end: int) -> bool:
        if level == 1:
            started.set()
            may_end.wait(20)
        return False

    levels.fails = block
    catch_up = PipelineCatchUp(levels, Stats())
    catch_up.begin_round(2)
    for row in range(3):
        enter(levels, catch_up, row)
        catch_up.mark_pending(0, row)
    assert started.wait(20)
    closing = threading.Thread(target=catch_up.close)
    closing.start()
    may_end.set()
    closing.join(20)
    assert not closing.is_alive()
    assert sum(level == 1 for level, *_ in levels.runs) == 1
    assert levels_alive() == []


def test_the_cap_and_the_relative_costs_follow_what_was_measured() -> None:
    cap = PendingCap(16)
    assert cap.rows == 16
    for _ in range(20):
        for rows, cost in ((1, 1.0), (2, 1.1), (4, 1.6), (8, 3.2), (16, 6.4)):
            cap.observe(rows, cost)
    assert cap.rows == 4, "from four rows on the cost per position is constant"
    assert cap.relative_costs() == pytest.approx({1: 1.0, 2: 1.1, 4: 1.6, 8: 3.2, 16: 6.4})


@pytest.mark.parametrize(("costs", "rows"), [({1: 1, 16: 16}, 2), ({1: 1, 16: 1}, 16), ({1: 1, 3: 3}, 2), ({}, 16)])
def test_the_cap_follows_the_measured_costs(costs: dict[int, float], rows: int) -> None:
    cap = PendingCap(16)
    for count, cost in costs.items():
        cap.observe(count, cost)
    assert cap.rows == rows


def caps(cap: PendingCap, runs: int, rows: int | None = None, *, has_head: bool = True) -> list[int]:
    """The cap before each of many runs, of as many rows as it allows or of ``rows``; a row takes a second."""
    seen = []
    for _ in range(runs):
        seen.append(cap.rows)
        found = cap.rows if rows is None else rows
        cap.observe(found, float(found), has_head=has_head)
    return seen


def test_the_whole_window_is_measured_again_now_and_then() -> None:
    cap = PendingCap(8)
    for rows in (1, 2, 8):
        cap.observe(rows, float(rows))
    seen = caps(cap, 200)
    assert set(seen) == {2, 8}
    assert seen.count(8) < 10
    fixed = PendingCap(8, 3)
    fixed.observe(1, 1.0)
    fixed.observe(8, 1.0)
    assert fixed.rows == 3


def test_runs_without_a_head_end_the_measuring_of_the_whole_window() -> None:
    """As in decoding: a run at the cap has no head, and one with a head is shorter."""
    cap = PendingCap(16)
    for rows in (1, 2, 3, 16):
        cap.observe(rows, float(rows) + 0.3)
    seen = caps(cap, 300, has_head=False)
    assert seen.count(16) < 10
    assert set(seen[-50:]) <= {2, 16}, "what the head costs is known by now, and no reason to wait"


def test_measuring_the_whole_window_ends_even_if_no_run_fills_it() -> None:
    cap = PendingCap(16)
    for rows in (1, 2, 16):
        cap.observe(rows, float(rows))
    seen = caps(cap, 400, rows=2)  # a token that does not leave comes early, every time
    assert 8 <= seen.count(16) <= 50


def test_what_a_head_costs_is_no_reason_to_wait() -> None:
    """The upper layers cost one second a row, so waiting gains nothing; the head costs two more."""
    cap = PendingCap(16)
    for rows in range(1, 17):
        cap.observe(rows, rows + 2.0)
        cap.observe(rows, float(rows), has_head=False)
    assert cap.rows == 2
    assert cap.relative_costs() == pytest.approx({rows: float(rows) for rows in range(1, 17)})
    assert PendingCap(16).relative_costs() == {}


def test_the_faster_way_is_taken_and_the_other_tried_now_and_then() -> None:
    for faster in ("flush", "pipeline"):
        costs, taken = WayCosts(), []
        for _ in range(300):
            way = costs.choose()
            taken.append(way)
            costs.observe(way, 4, 1.0 if way == faster else 2.0)
        assert costs.best == faster
        assert 280 < taken.count(faster) < 300


def test_a_flush_needs_no_thread() -> None:
    before = threading.active_count()
    levels = ScriptedLevels(ScriptedModel(1), 2)
    FlushCatchUp(levels, Stats(), PendingCap(8)).begin_round(0)
    assert threading.active_count() == before
