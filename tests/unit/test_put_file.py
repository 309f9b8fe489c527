"""A file is put into a finished bundle: what changes in bundle.json, and what does not."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from helpers.inspect_bundles import MakeBundle, tiny_spec
from helpers.older_formats import as_format
from shortstack.graphs import names
from shortstack.graphs.bundle import open_bundle, put_file
from shortstack.graphs.errors import BundleError
from shortstack.graphs.plan import ExitSpec

CONTENT = b'{"a": "report"}\n'


def rewrite(folder: Path, version: int) -> dict[str, Any]:
    """Give a bundle the bundle.json that an older format version wrote, with a field that this version ignores."""
    file = folder / names.MANIFEST_FILE
    data = as_format(json.loads(file.read_text()) | {"a field of later": {"b": 1, "a": [2]}}, version)
    file.write_text(json.dumps(data))
    return data


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_file_that_is_added_changes_files_and_digest_in_a_manifest_of_any_version(
    make_bundle: MakeBundle, version: int
) -> None:
    folder = make_bundle(tiny_spec(), ExitSpec(1, 25), ExitSpec(3))
    before = rewrite(folder, version)
    bundle = open_bundle(folder)
    entry = {"bytes": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()}
    for _ in range(2):  # the second replaces the first
        bundle = put_file(bundle, names.QUALITY_FILE, CONTENT)
        after = json.loads((folder / names.MANIFEST_FILE).read_text())
        assert list(after) == list(before)
        assert after["digest"] != before["digest"]
        assert after == before | {
            "files": before["files"] | {names.QUALITY_FILE: entry},
            "digest": after["digest"],
        }
        assert open_bundle(folder, verify_hashes=True) == bundle


def test_a_file_is_not_added_to_a_manifest_that_was_edited(make_bundle: MakeBundle) -> None:
    folder = make_bundle(tiny_spec())
    bundle = open_bundle(folder)
    file = folder / names.MANIFEST_FILE
    edited = file.read_text().replace('"tiny"', '"huge"')
    assert edited != file.read_text()
    file.write_text(edited)
    with pytest.raises(BundleError, match="field digest does not match"):
        put_file(bundle, names.QUALITY_FILE, CONTENT)
    assert file.read_text() == edited
    assert not (folder / names.QUALITY_FILE).exists()


@pytest.mark.parametrize("name", [names.QUALITY_FILE, names.MANIFEST_FILE])
@pytest.mark.parametrize("exists", [True, False], ids=["of a file", "of nothing"])
def test_a_link_at_the_name_of_the_partial_file_is_not_followed(
    make_bundle: MakeBundle, tmp_path: Path, name: str, exists: bool
) -> None:
    folder, target = make_bundle(tiny_spec()), tmp_path / "target"
    if exists:
        target.write_bytes(b"mine")
    planted = folder / f".{name}.partial-{os.getpid()}"
    planted.symlink_to(target)
    put_file(open_bundle(folder), names.QUALITY_FILE, CONTENT)
    assert (target.read_bytes() if exists else target.exists()) == (b"mine" if exists else False)
    assert not planted.is_symlink()
    for file in (names.QUALITY_FILE, names.MANIFEST_FILE):
        assert not (folder / file).is_symlink()
    open_bundle(folder, verify_hashes=True)


def test_a_link_that_is_planted_again_before_the_partial_file_is_opened_is_refused(
    make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, target = make_bundle(tiny_spec()), tmp_path / "target"
    planted = folder / f".{names.QUALITY_FILE}.partial-{os.getpid()}"
    original = Path.unlink

    def unlink(self: Path, missing_ok: bool = False) -> None:
        original(self, missing_ok=missing_ok)
        if self == planted:
            planted.symlink_to(target)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(FileExistsError):
        put_file(open_bundle(folder), names.QUALITY_FILE, CONTENT)
    assert not target.exists()
    assert names.QUALITY_FILE not in open_bundle(folder, verify_hashes=True).manifest.files


def test_what_a_killed_process_left_at_the_name_of_the_partial_file_is_replaced(make_bundle: MakeBundle) -> None:
    folder = make_bundle(tiny_spec())
    (folder / f".{names.QUALITY_FILE}.partial-{os.getpid()}").write_bytes(b"half of a longer report")
    put_file(open_bundle(folder), names.QUALITY_FILE, CONTENT)
    assert (folder / names.QUALITY_FILE).read_bytes() == CONTENT
    assert not list(folder.glob(".*"))
