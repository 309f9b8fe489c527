"""A bundle's name stands for a whole bundle at every moment, whatever kills or races the process that writes it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.bad_input import left_behind
from shortstack.graphs import bundle
from shortstack.graphs.bundle import staged_folder
from shortstack.graphs.errors import BundleError


def put(out: Path, content: str, *, overwrite: bool = False) -> None:
    with staged_folder(out, overwrite=overwrite) as folder:
        (folder / "bundle.json").write_text(content, encoding="utf-8")


def content(out: Path) -> str:
    return (out / "bundle.json").read_text(encoding="utf-8")


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
        return process.pid


@pytest.fixture(params=["at once", "by two renames"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A system that can exchange two folders at once, and one that cannot."""
    if request.param == "by two renames":
        monkeypatch.setattr(bundle, "exchange", lambda one, other: False)
    return str(request.param)


def test_overwriting_replaces_the_bundle_and_leaves_nothing_else(tmp_path: Path, system: str) -> None:
    put(tmp_path / "out", "one")
    put(tmp_path / "out", "two", overwrite=True)
    assert content(tmp_path / "out") == "two"
    assert left_behind(tmp_path) == ["out"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems rename twice")
def test_the_name_never_stands_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "out", "one")
    seen: list[str] = []
    rmtree = bundle.shutil.rmtree

    def look_first(path: Path, **options: bool) -> None:
        seen.append(content(tmp_path / "out"))
        rmtree(path, **options)

    monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("two renames leave a gap"))
    monkeypatch.setattr(bundle.shutil, "rmtree", look_first)
    put(tmp_path / "out", "two", overwrite=True)
    assert seen == ["two"]


def test_a_bundle_that_a_killed_process_had_set_aside_comes_back(tmp_path: Path, dead: int) -> None:
    put(tmp_path / "out", "one")
    (tmp_path / "out").rename(tmp_path / f".out.old-{dead}")
    (tmp_path / f".out.partial-{dead}").mkdir()
    with pytest.raises(BundleError, match="already holds a bundle"):
        put(tmp_path / "out", "two")
    assert content(tmp_path / "out") == "one"
    assert left_behind(tmp_path) == ["out"]


def test_what_a_running_process_has_set_aside_is_left_alone(tmp_path: Path) -> None:
    put(tmp_path / "out", "one")
    (tmp_path / "out").rename(tmp_path / f".out.old-{os.getppid()}")
    put(tmp_path / "out", "two")
    assert left_behind(tmp_path) == [f".out.old-{os.getppid()}", "out"]


def race(slow: Path, fast: Path) -> None:
    """Write a bundle, and while that is under way another one to the same name."""
    with staged_folder(slow) as folder:
        (folder / "bundle.json").write_text("slow", encoding="utf-8")
        fast.mkdir(exist_ok=True)
        (fast / "bundle.json").write_text("fast", encoding="utf-8")


def test_of_two_exports_at_once_the_first_to_finish_keeps_its_result(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(BundleError, match="already holds a bundle"):
        race(out, out)
    assert content(out) == "fast"
    assert left_behind(tmp_path) == ["out"]


def test_a_bundle_that_comes_at_the_last_moment_is_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(bundle, "check_free", lambda path, overwrite: None)
    with pytest.raises(BundleError, match="written by another process meanwhile"):
        race(out, out)
    assert content(out) == "fast"
    assert left_behind(tmp_path) == ["out"]
