"""A file is put into a finished bundle: what changes in bundle.json, and what does not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from helpers.inspect_bundles import MakeBundle, tiny_spec
from shortstack.graphs import names
from shortstack.graphs.bundle import open_bundle, put_file
from shortstack.graphs.errors import BundleError
from shortstack.graphs.plan import ExitSpec

CONTENT = b'{"a": "report"}\n'


def rewrite(folder: Path, version: int) -> dict[str, Any]:
    """Give a bundle the bundle.json that an older format version wrote, with a field that this version ignores."""
    file = folder / names.MANIFEST_FILE
    data: dict[str, Any] = json.loads(file.read_text())
    del data["digest"]
    data |= {"format_version": version, "a field of later": {"b": 1, "a": [2]}}
    if version < 3:
        data["exits"] = [{"draft_vocab": e["draft_vocab"], "exit_layer": e["exit_layer"]} for e in data["exits"]]
    if version < 2:
        del data["precision"]
    content = json.dumps(data, sort_keys=True, ensure_ascii=True).encode()
    data["digest"] = hashlib.sha256(content).hexdigest()
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
