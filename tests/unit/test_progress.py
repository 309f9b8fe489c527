"""Progress on stderr: lines in a log, bars on a terminal, an estimate that works for slow steps, the total time."""

from __future__ import annotations

import io
import sys
import threading

import pytest

from shortstack.progress import QUICK_S, Pace, duration, progress_stages

NEVER_S = 3600.0


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Log(io.StringIO):
    """A stderr that is not a terminal, and tells when so many lines have been written."""

    def __init__(self, lines: int) -> None:
        super().__init__()
        self.is_full = threading.Event()
        self._lines = lines

    def write(self, text: str) -> int:
        written = super().write(text)
        if self.getvalue().count("\n") >= self._lines:
            self.is_full.set()
        return written


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def use_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Makes stderr a terminal; not a fixture, since pytest's capture would take stderr back before the test."""
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def speakers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "shortstack-progress"]


# The estimate


def test_one_slow_step_is_enough_for_an_estimate(clock: FakeClock) -> None:
    pace = Pace("Rounding", 4, clock)
    assert pace.left_s() is None
    clock.now_s += 120
    assert pace.left_s() is None, "nothing is known before the first step is done"
    pace.advance(1)
    assert pace.left_s() == 360


def test_the_estimate_counts_down_between_two_steps_and_never_below_zero(clock: FakeClock) -> None:
    pace = Pace("Rounding", 2, clock)
    clock.now_s += 100
    pace.advance(1)
    clock.now_s += 60
    assert pace.left_s() == 40
    clock.now_s += 500
    assert pace.left_s() == 0


def test_the_estimate_is_the_mean_over_the_whole_stage(clock: FakeClock) -> None:
    pace = Pace("Rounding", 4, clock)
    for seconds in (10, 50):
        clock.now_s += seconds
        pace.advance(1)
    assert pace.left_s() == 60


def test_a_stage_that_is_done_has_nothing_left_and_one_without_work_is_done(clock: FakeClock) -> None:
    pace = Pace("Hashing", 1, clock)
    clock.now_s += 5
    pace.advance(2)
    assert pace.share == 1
    assert pace.left_s() == 0
    assert Pace("Nothing", 0, clock).share == 1


@pytest.mark.parametrize(("seconds", "words"), [(0, "0:00"), (42.4, "0:42"), (725, "12:05"), (3723, "1:02:03")])
def test_a_duration_reads_like_a_clock(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_line_names_stage_percent_elapsed_and_the_time_left(clock: FakeClock) -> None:
    pace = Pace("Writing weights", 30, clock)
    clock.now_s += 70
    assert pace.line() == "Writing weights: 0%, 1:10 elapsed"
    pace.advance(12)
    assert pace.line() == "Writing weights: 40%, 1:10 elapsed, about 1:45 left"


# Where stderr is not a terminal


def test_a_stage_that_never_advances_speaks_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(lines=3)
    monkeypatch.setattr(sys, "stderr", log)
    with progress_stages(every_s=0.01) as stage:
        stage("One long call", 1)
        assert log.is_full.wait(10)
    assert log.getvalue().splitlines()[-1] == "One long call: 0%, 0:00 elapsed"


def test_work_before_the_first_stage_speaks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(lines=1)
    monkeypatch.setattr(sys, "stderr", log)
    with progress_stages(every_s=0.01):
        assert log.is_full.wait(10)
    assert log.getvalue().startswith("Preparing: 0%, ")


@pytest.mark.parametrize("error", [None, ValueError("broken"), KeyboardInterrupt()])
def test_the_thread_that_speaks_is_always_stopped(error: BaseException | None) -> None:
    before = speakers()
    caught: BaseException | None = None
    try:
        with progress_stages(every_s=NEVER_S):
            assert len(speakers()) == len(before) + 1
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt) as found:
        caught = found
    assert caught is error
    assert speakers() == before


def test_quick_work_says_nothing(clock: FakeClock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_stages(clock=clock) as stage:
        stage("Hashing", 1)(1)
        clock.now_s += QUICK_S - 0.1
    assert capsys.readouterr() == ("", "")


def test_long_work_ends_with_its_total_time(clock: FakeClock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_stages(clock=clock) as stage:
        for title in ("Writing", "Hashing"):
            advance = stage(title, 1)
            clock.now_s += 100
            advance(1)
    assert capsys.readouterr() == ("", "done in 3:20\n")


def test_work_that_failed_has_no_total_time(clock: FakeClock, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with progress_stages(clock=clock):
            clock.now_s += 100
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert capsys.readouterr() == ("", "")


def test_a_stderr_that_is_closed_stops_no_work(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (None, io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_stages(clock=clock) as stage:
            advance = stage("Hashing", 1)
            clock.now_s += 100
            if stream is not None:
                stream.close()
            advance(1)


def test_a_log_with_forced_colours_has_lines_and_no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(lines=1)
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_stages(every_s=0.01) as stage:
        stage("Hashing", 1)
        assert log.is_full.wait(10)
    assert "\x1b" not in log.getvalue()


# On a terminal


def test_a_terminal_has_a_bar_a_stage_with_its_times_and_the_total(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = use_terminal(monkeypatch)
    with progress_stages(clock=clock) as stage:
        advance = stage("Writing weights", 4)
        clock.now_s += 120
        advance(1)
        advance(3)
        stage("Hashing", 1)
        clock.now_s += 5
    shown = terminal.getvalue()
    assert "Writing weights" in shown
    assert "100%" in shown
    assert "2:00" in shown
    assert shown.endswith("done in 2:05\n")
    assert not speakers()


def test_a_terminal_shows_the_time_left_of_a_stage_that_is_interrupted(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = use_terminal(monkeypatch)

    def interrupted_after_one_step() -> None:
        with progress_stages(clock=clock) as stage:
            advance = stage("Rounding", 4)
            clock.now_s += 120
            advance(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_after_one_step()
    assert "2:00, 6:00 left" in terminal.getvalue()
    assert "done in" not in terminal.getvalue()
