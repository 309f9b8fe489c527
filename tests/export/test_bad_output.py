"""If the output path is occupied, or the export dies, the old bundle stays or nothing is left."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.bad_input import Refused, left_behind
from helpers.tiny_models import BASE, TinyBundles
from shortstack.__main__ import run
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.ir import write_bundle as bundle_writer


def test_files_at_the_output_path_are_never_touched(
    tiny_bundles: TinyBundles, tmp_path: Path, refused: Refused
) -> None:
    export = ["export", tiny_bundles.checkpoint(BASE)]
    file, folder, link = tmp_path / "file", tmp_path / "folder", tmp_path / "link"
    file.write_text("keep me")
    folder.mkdir()
    (folder / "thesis.tex").write_text("keep me")
    link.symlink_to(tmp_path / "nowhere")
    for options in ((), ("--overwrite",)):
        refused([*export, file, *options], str(file), "not a folder", "another name")
        refused([*export, folder, *options], str(folder), "other files", "another name")
        refused([*export, link, *options], str(link), "another name")
        refused([*export, file / "out", *options], str(file), "another folder")
    assert file.read_text() == (folder / "thesis.tex").read_text() == "keep me"
    assert left_behind(tmp_path) == ["file", "folder", "link"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_parent_that_cannot_be_written_is_named(tiny_bundles: TinyBundles, tmp_path: Path, refused: Refused) -> None:
    tmp_path.chmod(0o500)
    try:
        refused(["export", tiny_bundles.checkpoint(BASE), tmp_path / "out"], str(tmp_path), "another folder")
    finally:
        tmp_path.chmod(0o700)


def test_a_bundle_is_replaced_only_with_overwrite(
    tiny_bundles: TinyBundles, bundle: Path, refused: Refused, tmp_path: Path
) -> None:
    export = ["export", tiny_bundles.checkpoint(BASE), bundle]
    refused(export, "already holds a bundle", "--overwrite")
    assert open_bundle(bundle, verify_hashes=True).manifest.plan.boundaries == (1, 3)
    assert run([*map(str, export), "--overwrite"]) == 0
    assert open_bundle(bundle, verify_hashes=True).manifest.plan.boundaries == ()
    assert left_behind(tmp_path) == ["bundle"]


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "No space left on device"), 2),
        (RuntimeError("a bug"), None),
    ],
)
def test_an_export_that_dies_half_way_leaves_the_old_bundle_and_nothing_else(
    tiny_bundles: TinyBundles,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    code: int | None,
) -> None:
    def fail(*_: object) -> None:
        assert any(path.name.startswith(".") for path in tmp_path.iterdir()), "nothing is being written yet"
        raise raised

    monkeypatch.setattr(bundle_writer, "describe_files", fail)
    for out in (bundle, tmp_path / "new"):
        command = ["export", str(tiny_bundles.checkpoint(BASE)), str(out), "-e", "2", "--overwrite"]
        if code is None:
            with pytest.raises(RuntimeError):
                run(command)
        else:
            assert run(command) == code
    assert left_behind(tmp_path) == ["bundle"]
    assert open_bundle(bundle, verify_hashes=True).manifest.plan.boundaries == (1, 3)
    if code == 2:
        last = capsys.readouterr().err.splitlines()[-1]
        assert "No space left on device" in last
        assert str(tmp_path) in last


def test_an_export_that_is_killed_leaves_no_bundle_and_the_next_one_succeeds(
    tiny_bundles: TinyBundles, tmp_path: Path
) -> None:
    script = (
        "import os, signal, sys; from shortstack.__main__ import run\n"
        "from shortstack.graphs.ir import write_bundle as bundle_writer\n"
        "bundle_writer.write_manifest = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "run(sys.argv[1:])"
    )
    command = ["export", str(tiny_bundles.checkpoint(BASE)), str(tmp_path / "out"), "-e", "2"]
    killed = subprocess.run([sys.executable, "-c", script, *command], cwd=tmp_path, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out").exists()
    assert run(command) == 0
    open_bundle(tmp_path / "out", verify_hashes=True)
    assert [name for name in left_behind(tmp_path) if not name.startswith(".")] == ["out"]
