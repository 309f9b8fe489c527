"""Bundles whose bundle.json is of format 1, 2 or 3 load, and give the tokens that they gave."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers.bad_input import MAX_LENGTH, Refused
from helpers.older_formats import as_format
from helpers.tiny_models import BASE, TinyBundles
from shortstack.__main__ import run
from shortstack.graphs import manifest, names
from shortstack.graphs.bundle import open_bundle


@pytest.fixture
def older(tiny_bundles: TinyBundles, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A bundle of this version, and the same one of an older format."""
    newest = tiny_bundles.bundle(BASE, 2, draft_vocab=64, max_length=MAX_LENGTH)
    folder = Path(shutil.copytree(newest, tmp_path / "older"))
    file = folder / names.MANIFEST_FILE
    file.write_text(json.dumps(as_format(json.loads(file.read_text()), request.param)))
    return newest, folder


VERSIONS = pytest.mark.parametrize("older", [1, 2, 3], indirect=True)


@VERSIONS
def test_an_older_format_gives_the_same_model_and_tokens(
    older: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    newest, folder = older
    assert open_bundle(folder).manifest.spec == open_bundle(newest).manifest.spec
    assert open_bundle(folder).manifest.plan == open_bundle(newest).manifest.plan
    texts = []
    for bundle in (folder, newest):
        assert run(["generate", str(bundle), "Hello", "-n", "8", "--strategy", "self-speculative", "-e", "2"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0]


@VERSIONS
def test_an_older_format_does_not_take_fields_of_this_one(older: tuple[Path, Path], refused: Refused) -> None:
    newest, folder = older
    file = folder / names.MANIFEST_FILE
    data = json.loads(file.read_text())
    data["model"] = json.loads((newest / names.MANIFEST_FILE).read_text())["model"]
    file.write_text(json.dumps(data | {"digest": manifest._digest(data)}))
    refused(["inspect", folder], f"{file}: model does not describe a model", "missing: ", "unknown: ends, layer_kinds")
