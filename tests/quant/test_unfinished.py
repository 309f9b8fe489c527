"""A quantization that was killed goes on after its last whole layer, and trusts nothing that is not as it was."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers.bad_input import left_behind
from helpers.tiny_models import SPECULATOR, TinyBundles
from shortstack.__main__ import run
from shortstack.graphs import names
from shortstack.graphs.bundle import open_bundle
from shortstack.quant.rounding import LayerwiseRounding, Rounded
from shortstack.quant.vocabulary import RowsOf

OPTIONS = ("--preset", "int4", "--calibration-tokens", "256")
LAYERS = SPECULATOR.layers
# Dies like a process that is short of memory: after LAYERS were saved, or in the middle of the next one.
DYING = """
import os, signal, sys
from shortstack.__main__ import run
from shortstack.quant import engine
layers, where = int(sys.argv[1]), sys.argv[2]
save, put, seen = engine.Unfinished.save, engine._Writing._put, []
def saving(self, done, *rest):
    save(self, done, *rest)
    seen.append(done)
    if done == layers and where == "between layers":
        os.kill(os.getpid(), signal.SIGKILL)
def putting(self, *rest):
    put(self, *rest)
    if seen and seen[-1] == layers:
        os.kill(os.getpid(), signal.SIGKILL)
engine.Unfinished.save, engine._Writing._put = saving, putting
sys.exit(run(sys.argv[3:]))
"""


@dataclass(frozen=True)
class Killed:
    """What a killed command has left.

    Attributes:
        arguments: The command and its source.
        partial: The folder with its work.
        layers: How many layers are whole.
        whole: The bundle that the same command writes when it is not killed.
    """

    arguments: tuple[str, ...]
    partial: Path
    layers: int
    whole: Path

    def put(self, folder: Path) -> Path:
        """Copy what is left to where ``folder/out`` was being written; return the copy."""
        return Path(shutil.copytree(self.partial, folder / f".out.partial-{self.partial.name.rpartition('-')[2]}"))

    def again(self, folder: Path, *options: str) -> int:
        """Run the command again, to write ``folder/out``."""
        return run([*self.arguments, str(folder / "out"), *OPTIONS, *options, *self.last])

    @property
    def last(self) -> tuple[str, ...]:
        return ("--no-report",) if self.arguments[0] == "quantize" else ("-e", "3")


@contextmanager
def all_cores() -> Iterator[None]:
    """Let this process start others on all cores, where it was given some of them."""
    if not hasattr(os, "sched_setaffinity"):  # Linux only
        yield
        return
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


def kill(arguments: tuple[str, ...], layers: int, where: str, folder: Path) -> Killed:
    whole = Killed(arguments, folder, layers, folder / "out")
    assert whole.again(folder) == 0
    last = whole.last
    command = [sys.executable, "-c", DYING, str(layers), where, *arguments, str(folder / "killed"), *OPTIONS, *last]
    # Rounding depends on how many threads BLAS has: as many as the test's own process got, before it gave up cores.
    with all_cores():
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (partial,) = folder.glob(".killed.partial-*")
    return Killed(arguments, partial, layers, folder / "out")


@pytest.fixture(scope="module", params=["quantize", "export"])
def killed(
    request: pytest.FixtureRequest, tiny_bundles: TinyBundles, tmp_path_factory: pytest.TempPathFactory
) -> Killed:
    """GPTQ over a text, killed between two layers of a bundle, or in the middle of a layer of a checkpoint."""
    folder = tmp_path_factory.mktemp("killed")
    if request.param == "quantize":
        return kill(("quantize", str(tiny_bundles.bundle(SPECULATOR, 3))), 4, "between layers", folder)
    return kill(("export", str(tiny_bundles.checkpoint(SPECULATOR))), 2, "in a layer", folder)


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that were rounded."""
    found: list[int] = []
    layer = LayerwiseRounding.layer

    def watched(self: LayerwiseRounding, number: int) -> Iterator[Rounded | RowsOf]:
        found.append(number)
        return layer(self, number)

    monkeypatch.setattr(LayerwiseRounding, "layer", watched)
    return found


def check_whole(killed: Killed, folder: Path) -> None:
    assert left_behind(folder) == ["out"]
    open_bundle(folder / "out", verify_hashes=True)
    for file in (names.WEIGHTS_FILE, names.QUANTIZATION_FILE, names.MANIFEST_FILE):
        assert (folder / "out" / file).read_bytes() == (killed.whole / file).read_bytes(), file


def test_the_same_command_goes_on_after_the_last_whole_layer(
    killed: Killed, tmp_path: Path, rounded: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    partial = killed.put(tmp_path)
    state = json.loads((partial / names.UNFINISHED_FILE).read_text(encoding="utf-8"))
    assert killed.again(tmp_path) == 0
    assert rounded == list(range(killed.layers, LAYERS))
    check_whole(killed, tmp_path)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "killed run" in line]
    taken_over, left = line.split("; left: ")
    megabytes = f"{state['store']['bytes'] / 1e6:.1f} MB"
    assert taken_over == (
        f"going on after a killed run: {killed.layers} of {LAYERS} layers are taken over ({megabytes})"
    )
    assert left.startswith(f"{LAYERS - killed.layers} layers and the vocabulary, ")
    assert 0 < int(left.split()[-4].removesuffix("%")) < 100


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def claim_more(partial: Path) -> None:
    path = partial / names.UNFINISHED_FILE
    state = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**state, "layers": state["layers"] + 1}), encoding="utf-8")


def drop(partial: Path, field: str) -> None:
    path = partial / names.UNFINISHED_FILE
    state = json.loads(path.read_text(encoding="utf-8"))
    del state[field]
    path.write_text(json.dumps(state), encoding="utf-8")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a byte of the weights": lambda partial: flip(partial / names.WEIGHTS_FILE, 5000),
    "the end of the weights": lambda partial: (partial / names.WEIGHTS_FILE).write_bytes(b""),
    "a byte of the stream": lambda partial: flip(next(partial.glob("stream-*")), 900),
    "the end of the stream": lambda partial: cut(next(partial.glob("stream-*"))),
    "no stream": lambda partial: next(partial.glob("stream-*")).unlink(),
    "the end of the state": lambda partial: cut(partial / names.UNFINISHED_FILE),
    "a layer too many": claim_more,
    "a field": lambda partial: drop(partial, "store"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_work_is_begun_anew(
    killed: Killed, tmp_path: Path, rounded: list[int], capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    if killed.arguments[0] == "export":
        pytest.skip("the same files, in the same folder")
    DAMAGES[damage](killed.put(tmp_path))
    assert killed.again(tmp_path) == 0
    assert rounded == list(range(LAYERS))
    check_whole(killed, tmp_path)
    is_known = damage != "the end of the state"  # without it, nobody knows whose work it was
    assert ("what a killed run has left is damaged" in capsys.readouterr().err) == is_known


def test_other_options_begin_anew_and_remove_what_was_left(
    killed: Killed, tmp_path: Path, rounded: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    killed.put(tmp_path)
    assert killed.again(tmp_path, "--method", "rtn") == 0
    assert rounded == list(range(LAYERS))
    assert left_behind(tmp_path) == ["out"]
    assert "killed run" not in capsys.readouterr().err


def test_another_checkpoint_begins_anew(
    killed: Killed, tmp_path: Path, tiny_bundles: TinyBundles, rounded: list[int]
) -> None:
    if killed.arguments[0] != "export":
        pytest.skip("about checkpoints")
    killed.put(tmp_path)
    checkpoint = Path(shutil.copytree(killed.arguments[1], tmp_path / "checkpoint"))
    flip(checkpoint / "model.safetensors", -3)
    assert Killed(("export", str(checkpoint)), killed.partial, 0, killed.whole).again(tmp_path) == 0
    assert rounded == list(range(LAYERS))
    assert left_behind(tmp_path) == ["checkpoint", "out"]


def test_an_interrupt_leaves_nothing(killed: Killed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: LayerwiseRounding) -> Iterator[RowsOf]:
        raise KeyboardInterrupt

    killed.put(tmp_path)
    monkeypatch.setattr(LayerwiseRounding, "heads", interrupted)
    assert killed.again(tmp_path) == 130
    assert left_behind(tmp_path) == []
