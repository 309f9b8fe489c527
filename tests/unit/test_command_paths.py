"""Wrong paths on the command line: one line, exit code 2, and a command that can be run as it is printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.command_paths import Says, make_folder
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.errors import BundleError
from shortstack.graphs.path_kind import PathKind, bundle_name, path_kind


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with one of each kind; nothing in it is sound, since nothing should be read."""
    monkeypatch.chdir(tmp_path)
    make_folder("smol-bundle", "bundle.json", "weights.data")
    make_folder("smol", "config.json", "model.safetensors")
    make_folder("megatron", "latest_checkpointed_iteration.txt")
    make_folder("exits", "exits.json", "exits.safetensors")
    make_folder("empty")
    make_folder("bundles/one", "bundle.json")
    Path("my model.gguf").touch()
    Path("readme.txt").touch()


# What a path is


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("smol-bundle", PathKind.BUNDLE),
        ("smol", PathKind.CHECKPOINT),
        ("megatron", PathKind.CHECKPOINT),
        ("my model.gguf", PathKind.GGUF),
        ("readme.txt", PathKind.FILE),
        ("empty", PathKind.FOLDER),
        ("exits", PathKind.FOLDER),
        ("org/name", PathKind.HUB_ID),
        ("bundles/two", PathKind.ABSENT),
        ("nowhere", PathKind.ABSENT),
        ("nowhere/x.gguf", PathKind.ABSENT),
        ("/a/b/c", PathKind.ABSENT),
        ("nul\0character", PathKind.ABSENT),
        ("long" * 2000, PathKind.ABSENT),
    ],
)
def test_a_path_is_known_by_its_names(path: str, kind: PathKind) -> None:
    assert path_kind(path) is kind


@pytest.mark.parametrize(
    ("source", "name"),
    [("models/x.gguf", "x-bundle"), ("smol/", "smol-bundle"), ("org/name", "name-bundle"), (".gguf", "model-bundle")],
)
def test_a_bundle_is_named_after_its_checkpoint(source: str, name: str) -> None:
    assert bundle_name(source) == name


def test_the_bundle_of_the_current_folder_has_its_name(tmp_path: Path) -> None:
    assert bundle_name(".") == f"{tmp_path.name}-bundle"


# A bundle is wanted


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["inspect", "my model.gguf", "--json"],
            "my model.gguf is a GGUF file and not a bundle. Run: "
            "shortstack export 'my model.gguf' 'my model-bundle' && shortstack inspect 'my model-bundle' --json",
        ),
        (
            ["generate", "megatron", "Say hi", "-n", "5", "--stop", "a b", "--stop", "c"],
            "megatron is a checkpoint and not a bundle. Run: shortstack export megatron megatron-bundle && "
            "shortstack generate megatron-bundle 'Say hi' --max-new-tokens 5 --stop 'a b' --stop c",
        ),
        (
            ["generate", "megatron", "Hi", "--strategy", "self-speculative"],
            "megatron is a checkpoint and not a bundle. Run: "
            "shortstack export megatron megatron-bundle --exit-layer E && "
            "shortstack generate megatron-bundle Hi --strategy self-speculative",
        ),
        (
            ["generate", "megatron", "Hi", "--compare", "-e", "4"],
            "megatron is a checkpoint and not a bundle. Run: "
            "shortstack export megatron megatron-bundle --exit-layer 4 && "
            "shortstack generate megatron-bundle Hi --compare --exit-layer 4",
        ),
        (
            ["doctor", "smol"],
            "smol is a checkpoint and not a bundle. Run: shortstack doctor smol-bundle",
        ),
        (
            ["calibrate", "org/name", "--data", "x.jsonl"],
            "org/name does not exist, and a model of the hub is not a bundle yet. Run: "
            "shortstack export org/name name-bundle --exit-layer E && shortstack calibrate name-bundle --data x.jsonl",
        ),
        (
            ["inspect", "smol-bundle/weights.data"],
            "smol-bundle/weights.data is a file in a bundle. Run: shortstack inspect smol-bundle",
        ),
        (
            ["inspect", "megatron/latest_checkpointed_iteration.txt"],
            "megatron/latest_checkpointed_iteration.txt is a file and not a bundle. Run: "
            "shortstack export megatron megatron-bundle && shortstack inspect megatron-bundle",
        ),
        (
            ["inspect", "bundles"],
            "bundles is not a bundle: it has no bundle.json, but it holds bundles (one). Run: "
            "shortstack inspect bundles/one",
        ),
        (
            ["inspect", "smoll-bundle", "--verify"],
            "smoll-bundle does not exist; smol-bundle does. Run: shortstack inspect smol-bundle --verify",
        ),
        (
            ["inspect", "empty"],
            "empty is not a bundle: it has no bundle.json. Make one: "
            "shortstack export CHECKPOINT empty-bundle && shortstack inspect empty-bundle",
        ),
        (
            ["inspect", "/nowhere/x"],
            "/nowhere/x does not exist. Make one: "
            "shortstack export CHECKPOINT /nowhere/x && shortstack inspect /nowhere/x",
        ),
        (
            ["parity", "smol", "smol", "--greedy-tokens", "0"],
            "smol is a checkpoint and not a bundle. Run: shortstack parity smol smol-bundle --greedy-tokens 0",
        ),
        (
            ["generate", "--", "megatron", "-x"],
            "megatron is a checkpoint and not a bundle. Run: shortstack export megatron megatron-bundle && "
            "shortstack generate -- megatron-bundle -x",
        ),
        (
            ["generate", "megatron", "two\nlines"],
            "megatron is a checkpoint and not a bundle. Run: shortstack export megatron megatron-bundle && "
            "shortstack generate megatron-bundle $'two\\nlines'",
        ),
        (
            ["generate", "", "x"],
            "BUNDLE is empty: name the folder of a bundle. Run: shortstack generate BUNDLE x",
        ),
    ],
)
def test_where_a_bundle_belongs(says: Says, arguments: list[str], expected: str) -> None:
    assert says(*arguments) == expected


# A checkpoint is wanted


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["export", "smol-bundle", "small"],
            "smol-bundle is a bundle and not a checkpoint. To cut it elsewhere, export the checkpoint that it was made "
            "from; to shrink it, run: shortstack quantize smol-bundle small",
        ),
        (
            ["export", "bundles/one", "out", "-e", "4"],
            "bundles/one is a bundle and not a checkpoint. Give the checkpoint that it was made from: "
            "shortstack export CHECKPOINT out --exit-layer 4",
        ),
        (
            ["export", "smol/model.safetensors", "out", "-e", "4"],
            "smol/model.safetensors is a file in a checkpoint: give the folder. Run: "
            "shortstack export smol out --exit-layer 4",
        ),
        (
            ["export", "my modle.gguf", "out", "--keep-blocks"],
            "my modle.gguf does not exist; my model.gguf does. Run: "
            "shortstack export 'my model.gguf' out --keep-blocks",
        ),
        (
            ["export", "nowhere", "out"],
            "'nowhere' does not exist and is not a hub id: expected a folder, a .gguf file or organisation/name. "
            "Check the path.",
        ),
    ],
)
def test_where_a_checkpoint_belongs(says: Says, arguments: list[str], expected: str) -> None:
    assert says(*arguments) == expected


# Swapped arguments


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["parity", "smol-bundle", "smol", "--prompts", "2"],
            "CHECKPOINT and BUNDLE are swapped. Run: shortstack parity smol smol-bundle --prompts 2",
        ),
        (
            ["parity", "smol-bundle", "org/name"],
            "CHECKPOINT and BUNDLE are swapped. Run: shortstack parity org/name smol-bundle",
        ),
        (
            ["generate", "Say hi", "smol-bundle"],
            "BUNDLE and PROMPT are swapped. Run: shortstack generate smol-bundle 'Say hi'",
        ),
        (
            ["generate", "yes/no?", "smol-bundle"],
            "BUNDLE and PROMPT are swapped. Run: shortstack generate smol-bundle 'yes/no?'",
        ),
        (
            ["quantize", "small", "smol-bundle", "--preset", "int4"],
            "BUNDLE and OUT are swapped. Run: shortstack quantize smol-bundle small --preset int4",
        ),
        (
            ["quantize", "smol-bundle-int4", "smol-bundle"],
            "BUNDLE and OUT are swapped. Run: shortstack quantize smol-bundle smol-bundle-int4",
        ),
        (
            ["quantize", "empty", "smol-bundle"],
            "BUNDLE and OUT are swapped. Run: shortstack quantize smol-bundle empty",
        ),
        (
            ["export", "out", "my model.gguf", "-e", "8"],
            "CHECKPOINT and OUT are swapped. Run: shortstack export 'my model.gguf' out --exit-layer 8",
        ),
        (
            ["export", "smol-bundle", "smol"],
            "smol-bundle is a bundle and smol is a checkpoint: they are swapped. To replace the bundle, run: "
            "shortstack export smol smol-bundle --overwrite",
        ),
    ],
)
def test_swapped_arguments_are_swapped_back(says: Says, arguments: list[str], expected: str) -> None:
    assert says(*arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["quantize", "bundles/oen", "smol-bundle", "--overwrite"],
            "bundles/oen does not exist; bundles/one does. Run: "
            "shortstack quantize bundles/one smol-bundle --overwrite",
        ),
        (
            ["quantize", "bundles/oen", "smol-bundle"],
            "bundles/oen does not exist; bundles/one does. Run: shortstack quantize bundles/one smol-bundle",
        ),
        (
            ["generate", "bundles/oen", "smol-bundle"],
            "bundles/oen does not exist; bundles/one does. Run: shortstack generate bundles/one smol-bundle",
        ),
        (
            ["quantize", "nowhere", "smol-bundle", "--overwrite"],
            "nowhere does not exist. Make one: "
            "shortstack export CHECKPOINT nowhere && shortstack quantize nowhere smol-bundle --overwrite",
        ),
        (
            ["quantize", "nowhere", "smol-bundle", "--report-only"],
            "nowhere does not exist. Make one: "
            "shortstack export CHECKPOINT nowhere && shortstack quantize nowhere smol-bundle --report-only",
        ),
        (
            ["quantize", "bundles", "smol-bundle"],
            "bundles is not a bundle: it has no bundle.json, but it holds bundles (one). Run: "
            "shortstack quantize bundles/one smol-bundle",
        ),
        (
            ["export", "my modle.gguf", "smol"],
            "my modle.gguf does not exist; my model.gguf does. Run: shortstack export 'my model.gguf' smol",
        ),
    ],
)
def test_a_mistyped_path_is_not_taken_for_a_swapped_one(says: Says, arguments: list[str], expected: str) -> None:
    assert says(*arguments) == expected


def test_an_empty_text_is_not_taken_for_a_swapped_argument(says: Says) -> None:
    assert "swapped" not in says("export", "", "smol")
    assert "swapped" not in says("generate", "", "smol-bundle")


def test_an_output_folder_that_reads_like_a_hub_id_is_not_taken_for_a_checkpoint(says: Says) -> None:
    assert "swapped" not in says("export", "nowhere", "new/place")


# Python


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("my model.gguf", "is a GGUF file and not a bundle. Make a bundle with `shortstack export 'my model.gguf' "),
        ("smol", "is a checkpoint and not a bundle. Make a bundle with `shortstack export smol smol-bundle "),
        ("empty", "it has no bundle.json. Make a bundle with `shortstack export CHECKPOINT OUT"),
        ("nowhere", "nowhere does not exist"),
    ],
)
def test_opening_something_else_says_what_it_is(path: str, says: str) -> None:
    with pytest.raises(BundleError) as error:
        open_bundle(path)
    assert says in str(error.value)
