"""``--log-level``: what the library logs reaches stderr, from the level that was asked for."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from shortstack.__main__ import run
from shortstack.log_level import show_log
from shortstack.runtime.decode.draft_length import DraftLength, DraftPolicy

if TYPE_CHECKING:
    from helpers.tiny_models import TinyBundles

log = logging.getLogger("shortstack.probe")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    logger = logging.getLogger("shortstack")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


def test_a_line_has_the_time_the_level_and_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    show_log("info")
    log.info("opened %s", "x")
    log.debug("details")
    error = capsys.readouterr().err
    assert re.fullmatch(r"\d\d:\d\d:\d\d INFO shortstack\.probe: opened x\n", error)


def test_asking_again_changes_the_level_and_doubles_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    show_log("debug")
    show_log("warning")
    log.info("hidden")
    log.warning("shown")
    assert capsys.readouterr().err == "warning: shown\n"


def test_lines_go_to_stderr_as_it_is_when_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    show_log("info")
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream):  # as a progress bar does
        log.info("above the bar")
    monkeypatch.setattr(sys, "stderr", None)
    log.info("to nobody")
    assert stream.getvalue().endswith("above the bar\n")


@pytest.mark.parametrize("how", ["option", "variable"])
def test_info_shows_the_load_and_the_growth_of_the_cache(
    how: str, tiny_bundles: TinyBundles, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from helpers.tiny_models import BASE

    bundle = str(tiny_bundles.bundle(BASE, 1))
    monkeypatch.delenv("SHORTSTACK_LOG", raising=False)
    generate = ["generate", bundle, "Hello", "--raw", "-n", "2", "--json"]
    assert run(generate) == 0
    assert "INFO" not in capsys.readouterr().err
    if how == "variable":
        monkeypatch.setenv("SHORTSTACK_LOG", "info")
    assert run(["--log-level", "info", *generate] if how == "option" else generate) == 0
    error = capsys.readouterr().err
    loaded = rf"{re.escape(bundle)} opened in \d+\.\d\d s: 2 graphs on CPUExecutionProvider, threads: \d+\n"
    assert re.search(loaded, error)
    assert re.search(r"the cache holds 256 positions now: 0\.\d MB\n", error)
    assert "DEBUG" not in error


@pytest.mark.parametrize("level", ["INFO", "Info", "info"])
def test_a_level_may_be_written_in_capitals(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORTSTACK_LOG", level)
    assert run(["completion", "bash"]) == 0
    assert logging.getLogger("shortstack").level == logging.INFO


@pytest.mark.parametrize(
    ("option", "place"),
    [
        (["--log-level", "info"], "shortstack --log-level info inspect ..."),
        (["--log-level=info"], "shortstack --log-level info inspect ..."),
        (["--debug"], "shortstack --debug inspect ..."),
    ],
)
def test_an_option_after_the_command_that_goes_before_it_says_so(
    option: list[str], place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", "x", *option]) == 2
    assert f"It goes before the command: {place}\n" in capsys.readouterr().err


def test_an_option_that_nobody_knows_gets_no_hint_at_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["inspect", "x", "--loud"], ["--loud", "inspect", "x"]):
        assert run(arguments) == 2
        error = capsys.readouterr().err
        assert "--loud" in error
        assert "before the command" not in error


def test_debug_shows_every_graph(tiny_bundles: TinyBundles, capsys: pytest.CaptureFixture[str]) -> None:
    from helpers.tiny_models import BASE

    bundle = str(tiny_bundles.bundle(BASE, 1))
    capsys.readouterr()
    assert run(["--log-level", "debug", "generate", bundle, "Hello", "--raw", "-n", "2", "--json"]) == 0
    opened = re.findall(r"(layers\S+\.onnx) opened on CPUExecutionProvider", capsys.readouterr().err)
    assert sorted(opened) == ["layers-00-01.onnx", "layers-01-04.onnx"]


def test_drafting_is_logged_when_it_is_switched_and_only_then(caplog: pytest.LogCaptureFixture) -> None:
    length = DraftLength(DraftPolicy(4, is_adaptive=True))
    with caplog.at_level(logging.INFO, logger="shortstack"):
        length.observe_plain(1.0)
        length.observe_round(2, 2, rows=2, draft_s=0.2, verify_s=1.0)
        for _ in range(3):
            assert length.choose(8) == 4
        for _ in range(30):
            length.observe_round(2, 0, rows=2, draft_s=0.2, verify_s=1.0)
        for _ in range(3):
            assert length.choose(8) == 0
    on, off = (record.getMessage() for record in caplog.records)
    assert re.fullmatch(r"drafting on: rounds of 4 drafts predicted at [12]\.\d\dx of plain decoding", on)
    assert re.fullmatch(r"drafting off: rounds of \d drafts predicted at 0\.\d\dx of plain decoding", off)
