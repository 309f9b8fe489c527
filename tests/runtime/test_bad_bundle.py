"""A damaged or forged bundle gives one line with the file, the field and a remedy, and exit code 2."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from helpers.bad_input import MAX_LENGTH, Refused, edit_json
from helpers.tiny_models import BASE, TinyBundles
from shortstack.graphs import manifest, names
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.errors import (
    BundleError,
    ContractError,
    ShortstackError,
)
from shortstack.graphs.plan import ExitSpec
from shortstack.runtime import load


def commands(bundle: Path) -> list[list[str | Path]]:
    return [["generate", bundle, "Hello"], ["inspect", bundle]]


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-8, os.SEEK_END)
        file.write(bytes([byte ^ 255]))


def link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("elsewhere")


def link_to_a_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


FILES = ("weights.data", "layers-01-03.onnx", "tokenizer.json", "draft-vocab-01.npy")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut, "bytes, bundle.json says"),
        (Path.unlink, "is missing"),
        (link_to_nothing, "is missing"),
        (link_to_a_device, "is missing"),
    ],
    ids=["cut", "missing", "dangling link", "endless"],
)
def test_a_damaged_file_of_a_bundle_is_named(
    bundle: Path, refused: Refused, file: str, damage: Callable[[Path], object], says: str
) -> None:
    damage(bundle / file)
    for command in commands(bundle):
        refused(command, str(bundle), f"{file} ", says, "Copy the bundle again")
    with pytest.raises(BundleError, match=file):
        load(bundle)


def test_all_damaged_files_are_named_at_once(bundle: Path, refused: Refused) -> None:
    for file in FILES:
        cut(bundle / file)
    refused(["inspect", bundle], *FILES)


@pytest.mark.parametrize("file", FILES)
def test_verify_finds_a_changed_byte(bundle: Path, refused: Refused, file: str) -> None:
    flip(bundle / file)
    refused(["generate", bundle, "Hello", "--verify"], file, "sha256", "Copy the bundle again")
    with pytest.raises(BundleError, match=file):
        load(bundle, verify_hashes=True)


@pytest.mark.parametrize("file", ["layers-00-01.onnx", "tokenizer.json", "draft-vocab-01.npy", "draft-vocab-03.npy"])
@pytest.mark.parametrize("fill", [b"\0", b"\xff", b"{"])
def test_garbage_of_the_right_size_is_refused_when_it_is_read(
    bundle: Path, refused: Refused, file: str, fill: bytes
) -> None:
    (bundle / file).write_bytes(fill * (bundle / file).stat().st_size)
    exit_layer = 3 if "03" in file else 1
    refused(["generate", bundle, "Hello", "--strategy", "self-speculative", "-e", exit_layer, "--json"], file)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (b"SkipSimplifiedLayerNormalization", "cannot be loaded by onnxruntime"),
        (b"com.microsoft", "cannot be loaded by onnxruntime"),
        (b"seqlens_k", r"an output or a dimension is not text: found b'\xf3eqlens_k'"),
        (b"hidden_states_out", "an output or a dimension is not text"),
        (b"capacity", "an output or a dimension is not text"),
    ],
    ids=lambda value: value.decode() if isinstance(value, bytes) else "",
)
def test_a_graph_whose_names_are_not_text_is_refused_and_nothing_reaches_stdout(
    bundle: Path, refused: Refused, name: bytes, says: str
) -> None:
    """A message of onnxruntime that quotes such a name is a ValueError, upon which it would print and try again."""
    graph = bundle / "layers-01-03.onnx"
    content = graph.read_bytes()
    assert name in content
    graph.write_bytes(content.replace(name, b"\xf3" + name[1:]))
    error = refused(["generate", bundle, "Hello"], str(graph), says, "Copy the bundle again")
    assert "codec" not in error


def test_a_graph_of_another_model_is_refused_port_by_port(
    tiny_bundles: TinyBundles, bundle: Path, refused: Refused
) -> None:
    other = tiny_bundles.bundle(BASE, 2, draft_vocab=64, max_length=MAX_LENGTH)
    shutil.copy(other / "layers-00-02.onnx", bundle / "layers-00-01.onnx")
    recorded = open_bundle(other).manifest.files["layers-00-02.onnx"]
    files = json.loads((bundle / names.MANIFEST_FILE).read_text())["files"]
    files["layers-00-01.onnx"] = {"bytes": recorded.bytes, "sha256": recorded.sha256}
    forge(bundle, files=files)
    refused(
        ["generate", bundle, "Hello", "--verify"],
        "layers-00-01.onnx does not match its contract",
        "extra input past_key_values.1.key",
        "Re-export",
    )
    with pytest.raises(ContractError):
        load(bundle)


# bundle.json


def forge(bundle: Path, **fields: Any) -> None:
    """Edit bundle.json as an attacker would, who also corrects the digest."""
    path = bundle / names.MANIFEST_FILE
    data = json.loads(path.read_text(encoding="utf-8")) | fields
    data["digest"] = manifest._digest(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def content(bundle: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((bundle / names.MANIFEST_FILE).read_text(encoding="utf-8"))
    return data


@pytest.mark.parametrize("field", ["model", "exits", "dtype", "max_length", "segments", "files", "source", "tools"])
def test_an_edited_field_of_bundle_json_is_detected(bundle: Path, refused: Refused, field: str) -> None:
    edit_json(bundle / names.MANIFEST_FILE, **{field: "something else"})
    for command in commands(bundle):
        refused(command, "bundle.json: field digest", "edited", "e-export")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"bundle"', "{}", '{"format_version": 1}', "\udcff"])
def test_a_bundle_json_that_is_not_valid_is_named(bundle: Path, refused: Refused, text: str) -> None:
    (bundle / names.MANIFEST_FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    for command in commands(bundle):
        refused(command, "bundle.json", "e-export")


@pytest.mark.parametrize("version", [0, 6, 99, "1", None, 1.5, True, [1]])
def test_an_unknown_format_version_is_named(bundle: Path, refused: Refused, version: object) -> None:
    forge(bundle, format_version=version)
    for command in commands(bundle):
        refused(
            command,
            "bundle.json: field format_version",
            repr(version),
            "expected 1 or 2 or 3 or 4 or 5",
            "install the shortstack",
        )


def model_with(**fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda data: {"model": data["model"] | fields}


def attention_with(**fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def edit(data: dict[str, Any]) -> dict[str, Any]:
        kinds = [kind | {"attention": kind["attention"] | fields} for kind in data["model"]["layer_kinds"]]
        return {"model": data["model"] | {"layer_kinds": kinds}}

    return edit


FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], tuple[str, ...]]] = {
    "dtype": (lambda _: {"dtype": "bfloat16"}, ("field dtype", "bfloat16", "float32 or float16")),
    "dtype-other": (lambda _: {"dtype": "float16"}, ("does not match its contract", "float16")),
    "max_length-0": (lambda _: {"max_length": 0}, ("field max_length", "found 0")),
    "max_length-negative": (lambda _: {"max_length": -3}, ("field max_length", "found -3")),
    "max_length-text": (lambda _: {"max_length": "64"}, ("field max_length", "'64'")),
    "max_length-bool": (lambda _: {"max_length": True}, ("field max_length", "True")),
    "max_length-beyond": (lambda _: {"max_length": 1025}, ("field max_length", "found 1025")),
    "exits-outside": (lambda _: {"exits": [asdict(ExitSpec(4))]}, ("bundle.json", "found 4")),
    "exits-unsorted": (lambda data: {"exits": data["exits"][::-1]}, ("bundle.json", "[3, 1]")),
    "exits-text": (lambda _: {"exits": "none"}, ("bundle.json",)),
    "exits-moved": (
        lambda _: {"exits": [asdict(ExitSpec(2))]},
        ("field files does not list", "layers-00-02.onnx"),
    ),
    "draft_vocab": (
        lambda _: {"exits": [asdict(ExitSpec(e, 63)) for e in (1, 3)]},
        ("does not match its contract", "logits"),
    ),
    "draft_vocab-text": (
        lambda _: {"exits": [asdict(ExitSpec(e)) | {"draft_vocab": "64"} for e in (1, 3)]},
        ("bundle.json", "draft_vocab"),
    ),
    "draft_vocab-0": (
        lambda _: {"exits": [asdict(ExitSpec(e, 0)) for e in (1, 3)]},
        ("bundle.json", "draft_vocab"),
    ),
    "exits-without-fields": (
        lambda _: {"exits": [{"exit_layer": e, "draft_vocab": 64} for e in (1, 3)]},
        ("bundle.json", "an exit has the fields"),
    ),
    "exits-flag-as-number": (
        lambda data: {"exits": [e | {"has_gate": 1} for e in data["exits"]]},
        ("bundle.json", "has_gate is 1"),
    ),
    "exits-of-another-kind": (
        lambda data: {"exits": [e | {"branch": "linear", "sees_state": True} for e in data["exits"]]},
        ("does not match its contract", "_state"),
    ),
    "exits-impossible": (
        lambda data: {"exits": [e | {"sees_state": True} for e in data["exits"]]},
        ("field exits", "only a linear branch has sees_state"),
    ),
    "layers": (model_with(layers=[0] * 5), ("bundle.json: model.kv_map", "one for each of layers, 5")),
    "layers-count": (model_with(layers=10**9), ("bundle.json: model.layers", "found 1000000000", "a list")),
    "layers-text": (model_with(layers=["0", 0, 0, 0]), ("model.layers[0]", "'0'", "an integer")),
    "layers-flat": (model_with(num_hidden_layers=4), ("unknown: num_hidden_layers", "Re-export")),
    "heads": (attention_with(kv_heads=1), ("does not match its contract", "past_key_values.3.key")),
    "heads-0": (attention_with(kv_heads=0), ("bundle.json: model.layer_kinds[0].attention", "kv_heads is 0")),
    "heads-not-divided": (attention_with(kv_heads=3), ("model.layer_kinds[0].attention", "kv_heads 3 does not divide")),
    "heads-huge": (attention_with(heads=10**30), ("model.layer_kinds[0].attention.heads", "0..2147483647")),
    "window": (attention_with(window=-1), ("model.layer_kinds[0].attention.window", "found -1")),
    "hidden": (model_with(hidden_size=65), ("does not match its contract", "hidden_states")),
    "hidden-negative": (model_with(hidden_size=-64), ("bundle.json", "hidden_size")),
    "vocab": (model_with(vocab_size=200), ("does not match its contract", "logits")),
    "kv_map": (model_with(kv_map=[0, 1, 2, 9]), ("model.kv_map", "9")),
    "kv_map-text": (model_with(kv_map=["0", 1, 2, 3]), ("bundle.json", "kv_map")),
    "unknown-field": (model_with(window=4), ("unknown: window", "Re-export")),
    "rope": (model_with(ropes=[{"flavour": "sweet"}]), ("bundle.json: model.ropes[0]", "unknown: flavour")),
    "rope-odd": (
        model_with(ropes=[{"theta": 1e4, "head_dim": 16, "dims": 7}]),
        ("model.ropes[0]", "dims 7 is not even"),
    ),
    "rope-none": (model_with(ropes=[]), ("bundle.json: model", "ropes has 0 entries")),
    "eps": (model_with(ends={"final_norm": {"eps": math.nan}}), ("model.ends.final_norm.eps", "a finite number")),
    "model-none": (lambda _: {"model": None}, ("bundle.json", "e-export")),
    "files-none": (lambda _: {"files": None}, ("bundle.json", "e-export")),
    "files-empty": (lambda _: {"files": {}}, ("field files does not list", "weights.data")),
    "files-upwards": (
        lambda data: {"files": data["files"] | {"../secret": {"bytes": 1, "sha256": "0" * 64}}},
        ("files names '../secret'", "not a plain file name"),
    ),
    "files-absolute": (
        lambda data: {"files": data["files"] | {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}},
        ("files names '/etc/passwd'", "not a plain file name"),
    ),
    "files-dots": (
        lambda data: {"files": data["files"] | {"..": {"bytes": 1, "sha256": "0" * 64}}},
        ("files names '..'", "not a plain file name"),
    ),
    "files-backslash": (
        lambda data: {"files": data["files"] | {"..\\secret": {"bytes": 1, "sha256": "0" * 64}}},
        ("not a plain file name",),
    ),
    "files-zero-byte": (
        lambda data: {"files": data["files"] | {"a\0b": {"bytes": 1, "sha256": "0" * 64}}},
        ("not a plain file name",),
    ),
    "files-size": (
        lambda data: {"files": data["files"] | {"weights.data": {"bytes": 12, "sha256": "0" * 64}}},
        ("weights.data has", "bundle.json says 12"),
    ),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_a_contradictory_bundle_json_is_refused_even_with_a_valid_digest(
    bundle: Path, refused: Refused, case: str
) -> None:
    edit, says = FORGERIES[case]
    forge(bundle, **edit(content(bundle)))
    refused(["generate", bundle, "Hello"], *says)
    with pytest.raises(ShortstackError):
        load(bundle)


@pytest.mark.parametrize("field", ["digest", "model", "exits", "dtype", "max_length", "files", "source", "tools"])
def test_a_missing_field_of_bundle_json_is_named(bundle: Path, refused: Refused, field: str) -> None:
    data = content(bundle)
    del data[field]
    if field != "digest":
        data["digest"] = manifest._digest(data)
    (bundle / names.MANIFEST_FILE).write_text(json.dumps(data), encoding="utf-8")
    refused(["inspect", bundle], "bundle.json", field, "e-export")


@pytest.mark.parametrize("where", ["nowhere", "file", "folder"])
def test_a_bundle_that_does_not_exist_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused, where: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder").mkdir()
    for command in commands(Path(where)):
        refused(command, where, "shortstack export")


def test_an_empty_name_of_a_bundle_is_called_empty(refused: Refused) -> None:
    refused(["generate", "", "Hello"], "BUNDLE is empty", "shortstack generate BUNDLE Hello")
