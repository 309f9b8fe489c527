"""What users get wrong and what damage files meet: one line that names file or option and a remedy, exit code 2."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers.tiny_models import BASE, SPECULATOR, TinyBundles, TinyModel
from shortstack.__main__ import run
from shortstack.export import assemble
from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec
from shortstack.graphs import manifest, names
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.errors import (
    BundleError,
    CheckpointError,
    ContractError,
    RequestError,
    ShortstackError,
    UnsupportedError,
)
from shortstack.runtime import DraftPolicy, Model, SamplingParams, load

Refused = Callable[..., str]
MAX_LENGTH = 64


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command line that must be refused: exit code 2, nothing on stdout, one line on stderr with these words."""

    def refused(arguments: list[str | Path], *says: str) -> str:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        out, error = capsys.readouterr()
        assert code == 2, error
        assert out == ""
        assert error.startswith("error: ")
        assert error.count("\n") == 1, error
        assert "Traceback" not in error
        for words in says:
            assert words in error, error
        return error

    return refused


@pytest.fixture
def checkpoint(tiny_bundles: TinyBundles, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(tiny_bundles.checkpoint(BASE), tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def sound(tiny_bundles: TinyBundles) -> Path:
    return tiny_bundles.bundle(BASE, 1, 3, draft_vocab=64, max_length=MAX_LENGTH)


@pytest.fixture
def bundle(sound: Path, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(sound, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def model(sound: Path) -> Model:
    return load(sound)


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# The checkpoint


def edit_tensors(checkpoint: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


DOWN = "model.layers.2.mlp.down_proj.weight"
TENSOR_EDITS: dict[str, tuple[Callable[[dict[str, np.ndarray]], object], tuple[str, ...]]] = {
    "missing": (lambda t: t.pop(DOWN), ("1 missing", DOWN, "Check that weights and config belong")),
    "extra": (
        lambda t: t.update({"model.layers.2.router.weight": np.zeros((2, 2), np.float32)}),
        ("1 extra", "model.layers.2.router.weight", "Check that weights and config belong"),
    ),
    "misshapen": (
        lambda t: t.update({DOWN: np.zeros((64, 95), np.float32)}),
        ("1 misshapen", f"{DOWN} is [64, 95], not [64, 96]"),
    ),
    "everything": (
        lambda t: t.update({"a": t.pop("model.norm.weight"), DOWN: t["lm_head.weight"]}),
        ("1 missing", "1 extra", "1 misshapen"),
    ),
    "headless": (lambda t: t.pop("lm_head.weight"), ("lm_head.weight", "tie_word_embeddings")),
}


@pytest.mark.parametrize("case", TENSOR_EDITS)
def test_tensors_that_do_not_fit_the_config_are_listed(
    checkpoint: Path, tmp_path: Path, refused: Refused, case: str
) -> None:
    edit, says = TENSOR_EDITS[case]
    edit_tensors(checkpoint, edit)
    refused(["export", checkpoint, tmp_path / "out", "-e", 2], str(checkpoint), *says)
    assert left_behind(tmp_path) == ["checkpoint"]
    with pytest.raises(CheckpointError):
        export_bundle(ExportSpec(str(checkpoint), tmp_path / "out", (2,)))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model_type": "mamba"}, ("config.json: model_type", "'mamba'", "llama")),
        ({"model_type": None}, ("config.json: model_type is missing",)),
        ({"hidden_act": "gelu"}, ("config.json: hidden_act", "silu")),
        ({"num_hidden_layers": "4"}, ("config.json: num_hidden_layers", "'4'", "an integer")),
        ({"num_key_value_heads": 3}, ("config.json: num_key_value_heads", "divisor")),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, ("rope_type", "'yarn'")),
        ({"rms_norm_eps": math.nan}, ("config.json: rms_norm_eps",)),
    ],
)
def test_a_config_that_cannot_be_exported_names_file_and_field(
    checkpoint: Path, tmp_path: Path, refused: Refused, fields: dict[str, Any], says: tuple[str, ...]
) -> None:
    edit_json(checkpoint / "config.json", **fields)
    refused(["export", checkpoint, tmp_path / "out"], *says)
    assert left_behind(tmp_path) == ["checkpoint"]


def test_an_unknown_architecture_is_unsupported_not_broken(checkpoint: Path, tmp_path: Path) -> None:
    edit_json(checkpoint / "config.json", model_type="qwen9")
    with pytest.raises(UnsupportedError, match="model_type"):
        export_bundle(ExportSpec(str(checkpoint), tmp_path / "out"))


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("config.json", ("config.json",)),
        ("model.safetensors", ("no weights", "model.safetensors")),
        ("tokenizer.json", ("tokenizer.json", "Save it beside the weights")),
    ],
)
def test_a_missing_checkpoint_file_is_named(
    checkpoint: Path, tmp_path: Path, refused: Refused, file: str, says: tuple[str, ...]
) -> None:
    (checkpoint / file).unlink()
    refused(["export", checkpoint, tmp_path / "out", "-e", 1], *says)
    assert left_behind(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_checkpoint_file_cut_short_is_named(
    checkpoint: Path, tmp_path: Path, refused: Refused, file: str, share: float
) -> None:
    content = (checkpoint / file).read_bytes()
    (checkpoint / file).write_bytes(content[: int(share * len(content))])
    refused(["export", checkpoint, tmp_path / "out", "-e", 1, "--draft-vocab", 64], file)
    assert left_behind(tmp_path) == ["checkpoint"]


def test_a_gguf_file_cut_short_is_named(smollm2_gguf: Path, tmp_path: Path, refused: Refused) -> None:
    with smollm2_gguf.open("rb") as whole:
        for size in (0, 100, 1 << 20, 40 << 20):
            (tmp_path / "model.gguf").write_bytes(whole.read(size))
            whole.seek(0)
            refused(["export", tmp_path / "model.gguf", tmp_path / "out", "-e", 4], "model.gguf")
    assert left_behind(tmp_path) == ["model.gguf"]


class Bomb:
    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._file,)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "model.pt"]
)
def test_a_pickle_is_refused_and_never_run(checkpoint: Path, tmp_path: Path, refused: Refused, name: str) -> None:
    boom = tmp_path / "boom"
    pickle.loads(pickle.dumps(Bomb(boom)))
    assert boom.is_file(), "the bomb does not work"
    boom.unlink()
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / name).write_bytes(pickle.dumps(Bomb(boom)))
    refused(["export", checkpoint, tmp_path / "out", "-e", 1], str(checkpoint), name, "safe_serialization")
    refused(["export", checkpoint / name, tmp_path / "out", "-e", 1], name)
    assert left_behind(tmp_path) == ["checkpoint"]


def test_parity_never_runs_a_pickle_either(
    checkpoint: Path, tiny_bundles: TinyBundles, tmp_path: Path, refused: Refused
) -> None:
    boom = tmp_path / "boom"
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(boom)))
    refused(["parity", checkpoint, tiny_bundles.bundle(BASE, 2), "--greedy-tokens", 0], str(checkpoint))
    assert not boom.exists()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("no/such/folder", "does not exist"),
        ("nowhere.gguf", "does not exist"),
        ("", "has no config.json"),
        ("readme.txt", "is a file"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused, source: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("readme.txt").write_text("hello")
    refused(["export", source, "out", "-e", 1], says)
    assert left_behind(tmp_path) == ["readme.txt"]


# The request to export


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("-e", 0), ("--exit-layer", "found 0", "1..3", "Choose a depth")),
        (("-e", 4), ("--exit-layer", "found 4", "1..3", "Choose a depth")),
        (("-e", 400), ("--exit-layer", "found 400", "1..3")),
        (("-e", -1), ("--exit-layer", "found -1", "1..3")),
        (("-e", 2, "-e", 2), ("--exit-layer", "[2, 2]", "Give each depth once")),
        (("-e", 1, "--draft-vocab", 1), ("--draft-vocab", "found 1", "2..300")),
        (("-e", 1, "--draft-vocab", 301), ("--draft-vocab", "found 301", "2..300")),
        (("-e", 1, "--draft-vocab", -5), ("--draft-vocab", "found -5", "2..300")),
        (("--draft-vocab", 64), ("--draft-vocab", "Add --exit-layer E")),
        (("-e", 1, "--draft-text", "some.txt"), ("--draft-text", "Add --draft-vocab N")),
        (("-e", 1, "--draft-vocab", 64, "--draft-text", "no.txt"), ("--draft-text no.txt", "UTF-8 text file")),
        (("-e", 1, "--draft-vocab", 64, "--draft-text", "empty.txt"), ("--draft-text empty.txt is empty", "Give")),
        (("-e", 1, "--draft-vocab", 64, "--draft-text", "latin.txt"), ("--draft-text latin.txt", "UTF-8")),
        (("--max-length", 1), ("--max-length", "found 1", "2 or more")),
        (("--max-length", 1025), ("--max-length", "found 1025", "max_position_embeddings = 1024")),
    ],
)
def test_options_that_do_not_fit_the_model_are_named(
    tiny_bundles: TinyBundles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Refused,
    options: tuple[str | int, ...],
    says: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text(" \n\n")
    Path("latin.txt").write_bytes("café".encode("latin-1"))
    refused(["export", tiny_bundles.checkpoint(BASE), "out", *map(str, options)], *says)
    assert left_behind(tmp_path) == ["empty.txt", "latin.txt"]


def test_weights_too_large_for_float16_are_named_before_anything_is_kept(
    checkpoint: Path, tmp_path: Path, refused: Refused
) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors[DOWN].__setitem__((0, 0), 1e6))
    refused(["export", checkpoint, tmp_path / "out", "--dtype", "fp16"], "down_proj", "1e+06", "--dtype fp32")
    assert left_behind(tmp_path) == ["checkpoint"]


# The output folder


def test_an_output_that_is_in_the_way_is_never_touched(
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


def test_a_bundle_is_replaced_only_when_asked(
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

    monkeypatch.setattr(assemble, "describe_files", fail)
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
        "import os, signal, sys; from shortstack.export import assemble; from shortstack.__main__ import run\n"
        "assemble.write_manifest = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "run(sys.argv[1:])"
    )
    command = ["export", str(tiny_bundles.checkpoint(BASE)), str(tmp_path / "out"), "-e", "2"]
    killed = subprocess.run([sys.executable, "-c", script, *command], cwd=tmp_path, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out").exists()
    assert run(command) == 0
    open_bundle(tmp_path / "out", verify_hashes=True)
    assert [name for name in left_behind(tmp_path) if not name.startswith(".")] == ["out"]


# The bundle on disk


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


def link(path: Path) -> None:
    moved = path.with_name("elsewhere")
    path.rename(moved)
    path.symlink_to(moved)


FILES = ("weights.data", "layers-01-03.onnx", "tokenizer.json", "draft-vocab-01.npy")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    ("damage", "says"),
    [(cut, "bytes, bundle.json says"), (Path.unlink, "is missing"), (link, "is a symbolic link")],
    ids=["cut", "missing", "link"],
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
def test_a_changed_byte_is_found_when_asked_for(bundle: Path, refused: Refused, file: str) -> None:
    flip(bundle / file)
    refused(["generate", bundle, "Hello", "--verify"], file, "sha256", "Copy the bundle again")
    with pytest.raises(BundleError, match=file):
        load(bundle, verify_hashes=True)


@pytest.mark.parametrize("file", ["layers-00-01.onnx", "tokenizer.json", "draft-vocab-01.npy", "draft-vocab-03.npy"])
@pytest.mark.parametrize("fill", [b"\0", b"\xff", b"{"])
def test_garbage_of_the_right_size_is_refused_where_it_is_read(
    bundle: Path, refused: Refused, file: str, fill: bytes
) -> None:
    (bundle / file).write_bytes(fill * (bundle / file).stat().st_size)
    exit_layer = 3 if "03" in file else 1
    refused(["generate", bundle, "Hello", "--strategy", "self-speculative", "-e", exit_layer, "--json"], file)


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
    """Edit bundle.json as somebody would who also corrects the digest."""
    path = bundle / names.MANIFEST_FILE
    data = json.loads(path.read_text(encoding="utf-8")) | fields
    data["digest"] = manifest._digest(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def content(bundle: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((bundle / names.MANIFEST_FILE).read_text(encoding="utf-8"))
    return data


@pytest.mark.parametrize("field", ["model", "exits", "dtype", "max_length", "segments", "files", "source", "tools"])
def test_an_edited_field_of_bundle_json_is_noticed(bundle: Path, refused: Refused, field: str) -> None:
    edit_json(bundle / names.MANIFEST_FILE, **{field: "something else"})
    for command in commands(bundle):
        refused(command, "bundle.json: field digest", "edited", "e-export")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"bundle"', "{}", '{"format_version": 1}', "\udcff"])
def test_a_bundle_json_that_is_none_is_named(bundle: Path, refused: Refused, text: str) -> None:
    (bundle / names.MANIFEST_FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    for command in commands(bundle):
        refused(command, "bundle.json", "e-export")


@pytest.mark.parametrize("version", [0, 2, 99, "1", None, 1.5, True, [1]])
def test_another_format_version_is_named(bundle: Path, refused: Refused, version: object) -> None:
    forge(bundle, format_version=version)
    for command in commands(bundle):
        refused(command, "bundle.json: field format_version", repr(version), "expected 1", "install the shortstack")


def model_with(**fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda data: {"model": data["model"] | fields}


FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], tuple[str, ...]]] = {
    "dtype": (lambda _: {"dtype": "bfloat16"}, ("field dtype", "bfloat16", "float32 or float16")),
    "dtype-other": (lambda _: {"dtype": "float16"}, ("does not match its contract", "float16")),
    "max_length-0": (lambda _: {"max_length": 0}, ("field max_length", "found 0")),
    "max_length-negative": (lambda _: {"max_length": -3}, ("field max_length", "found -3")),
    "max_length-text": (lambda _: {"max_length": "64"}, ("field max_length", "'64'")),
    "max_length-bool": (lambda _: {"max_length": True}, ("field max_length", "True")),
    "max_length-beyond": (lambda _: {"max_length": 1025}, ("field max_length", "found 1025")),
    "exits-outside": (lambda _: {"exits": [{"exit_layer": 4, "draft_vocab": None}]}, ("bundle.json", "found 4")),
    "exits-unsorted": (lambda data: {"exits": data["exits"][::-1]}, ("bundle.json", "[3, 1]")),
    "exits-text": (lambda _: {"exits": "none"}, ("bundle.json",)),
    "exits-moved": (
        lambda _: {"exits": [{"exit_layer": 2, "draft_vocab": None}]},
        ("field files does not list", "layers-00-02.onnx"),
    ),
    "draft_vocab": (
        lambda _: {"exits": [{"exit_layer": e, "draft_vocab": 63} for e in (1, 3)]},
        ("does not match its contract", "logits"),
    ),
    "draft_vocab-text": (
        lambda _: {"exits": [{"exit_layer": e, "draft_vocab": "64"} for e in (1, 3)]},
        ("bundle.json", "draft_vocab"),
    ),
    "draft_vocab-0": (
        lambda _: {"exits": [{"exit_layer": e, "draft_vocab": 0} for e in (1, 3)]},
        ("bundle.json", "draft_vocab"),
    ),
    "layers": (model_with(num_hidden_layers=5), ("bundle.json", "kv_map")),
    "layers-text": (model_with(num_hidden_layers="4"), ("model.num_hidden_layers", "'4'")),
    "heads": (model_with(num_key_value_heads=1), ("does not match its contract", "past_key_values.3.key")),
    "heads-0": (model_with(num_key_value_heads=0), ("bundle.json", "num_key_value_heads")),
    "hidden": (model_with(hidden_size=65), ("does not match its contract", "hidden_states")),
    "hidden-negative": (model_with(hidden_size=-64), ("bundle.json", "hidden_size")),
    "vocab": (model_with(vocab_size=200), ("does not match its contract", "logits")),
    "kv_map": (model_with(kv_map=[0, 1, 2, 9]), ("model.kv_map", "9")),
    "kv_map-text": (model_with(kv_map=["0", 1, 2, 3]), ("bundle.json", "kv_map")),
    "unknown-field": (model_with(window=4), ("unknown: window", "Re-export")),
    "rope": (model_with(rope_scaling={"flavour": "sweet"}), ("rope_scaling", "flavour")),
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
def test_a_bundle_json_that_cannot_be_true_is_refused_even_with_a_right_digest(
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


@pytest.mark.parametrize("where", ["nowhere", "file", "folder", ""])
def test_a_bundle_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused, where: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder").mkdir()
    for command in commands(Path(where)) if where else [["generate", "", "Hello"], ["inspect", ""]]:
        refused(command, where, "shortstack export")


# The request to generate

DRAFTING = ("--strategy", "self-speculative")
SAMPLING = ("--temperature", 1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("Hello", *DRAFTING, "--exit-layer", 2), ("exit_layer", "found 2", "[1, 3]", "--exit-layer 2")),
        (("Hello", *DRAFTING, "-e", 0), ("exit_layer", "found 0", "[1, 3]")),
        (("Hello", "--provider", "abacus"), ("provider 'abacus'", "CPUExecutionProvider", "hoose one")),
        (("", "--raw"), ("the prompt is empty", "ive at least one token")),
        (("",), ("the prompt is empty",)),
        ((" \n",), ("the prompt is empty",)),
        (("word " * 100, "--raw"), ("too long", f"fewer than {MAX_LENGTH}", "--max-length")),
        (("Hello", "-n", 0), ("max_new_tokens", "found 0", "1 or more")),
        (("Hello", *DRAFTING, "-k", 0), ("max_draft_tokens", "found 0", "1..15")),
        (("Hello", *DRAFTING, "-k", 16), ("max_draft_tokens", "found 16", "1..15")),
        (("Hello", *DRAFTING, "--confidence", 1.5), ("confidence", "1.5", "0..1")),
        (("Hello", *DRAFTING, "--confidence", "nan"), ("confidence", "nan", "0..1")),
        (("Hello", "--temperature", -1), ("temperature", "-1", "0 (greedy)")),
        (("Hello", "--temperature", "nan"), ("temperature", "nan", "0 (greedy)")),
        (("Hello", "--temperature", "inf"), ("temperature", "inf", "0 (greedy)")),
        (("Hello", *SAMPLING, "--top-p", 1.1), ("top_p", "1.1", "from 0 to 1")),
        (("Hello", *SAMPLING, "--top-k", -1), ("top_k", "-1", "0 (off) or more")),
        (("Hello", *SAMPLING, "--min-p", -0.1), ("min_p", "-0.1", "from 0 to 1")),
        (("Hello", "--repetition-penalty", 0), ("repetition_penalty", "0", "1 is off")),
        (("Hello", *SAMPLING, "--seed", -1), ("seed", "-1", "0 or more")),
        (("Hello", *SAMPLING, "--top-p", 2, "--min-p", 2), ("top_p", "min_p")),
        (("Hello", "--threads", 0), ("threads", "found 0", "expected 1")),
        (("Hello", "--stop", ""), ("stop string", "at least one character")),
        (("Hello", "--raw", "--system", "x"), ("--system", "--raw")),
        (("Hello", "-e", 1), ("--exit-layer would have no effect", "--strategy self-speculative")),
        (("Hello", "--top-p", 0.9), ("--top-p would have no effect", "--temperature")),
        (("Hello", "--compare", "--strategy", "plain"), ("--compare", "rop --strategy")),
    ],
)
def test_a_request_that_cannot_be_met_names_the_option(
    sound: Path, refused: Refused, options: tuple[str | int | float, ...], says: tuple[str, ...]
) -> None:
    refused(["generate", sound, *map(str, options)], *says)


def test_an_uncut_bundle_cannot_draft(tiny_bundles: TinyBundles, refused: Refused) -> None:
    whole = tiny_bundles.bundle(BASE)
    refused(["generate", whole, "Hi", *DRAFTING], "has none", "--exit-layer E")
    refused(["generate", whole, "Hi", *DRAFTING, "-e", 1], "this bundle has none", "--exit-layer 1")


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ([], {}, "empty"),
        ("", {}, "empty"),
        ([3, -1], {}, r"outside the vocabulary: found -1, expected 0\.\.299"),
        ([3, 300], {}, r"outside the vocabulary: found 300, expected 0\.\.299"),
        ([3] * MAX_LENGTH, {}, "too long"),
        ([{"role": "user"}, 3], {}, "mix"),
        (["Hello"], {}, "token id"),
        ([1.5], {}, "token id"),
        ("Hello", {"strategy": "psychic"}, "strategy: found 'psychic'"),
        ("Hello", {"exit_layer": 2}, "exit_layer"),
        ("Hello", {"max_new_tokens": -1}, "max_new_tokens"),
        ("Hello", {"stop": ["", "x"]}, "stop"),
        ("Hello", {"stop": "x"}, "stop"),
    ],
)
def test_the_python_api_refuses_the_same_and_stays_usable(
    model: Model, prompt: Any, options: dict[str, Any], says: str
) -> None:
    before = model.generate([5, 6, 7], max_new_tokens=4).tokens
    with pytest.raises(RequestError, match=says):
        model.generate(prompt, **options)
    assert model.generate([5, 6, 7], max_new_tokens=4).tokens == before


def test_options_are_checked_where_they_are_made() -> None:
    for make in (
        lambda: DraftPolicy(0),
        lambda: DraftPolicy(4, confidence=-0.5),
        lambda: SamplingParams(temperature=-1.0),
        lambda: SamplingParams(top_p=float("nan")),
    ):
        with pytest.raises(RequestError):
            make()


# The request to compare


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--prompts", 0), ("--prompts", "found 0")),
        (("--prompts", 1000), ("--prompts", "found 1000")),
        (("--greedy-tokens", -1), ("--greedy-tokens", "found -1")),
        (("--text", "no.txt"), ("--text no.txt", "UTF-8 text file")),
        (("--text", "empty.txt"), ("--text empty.txt", "one prompt per line")),
        (("--text", "long.txt"), ("too long", "--max-length")),
    ],
)
def test_a_comparison_that_cannot_be_made_names_the_option(
    tiny_bundles: TinyBundles,
    sound: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Refused,
    options: tuple[str | int, ...],
    says: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n\n")
    Path("long.txt").write_text("word " * 100)
    refused(["parity", tiny_bundles.checkpoint(BASE), sound, *map(str, options)], *says)


@pytest.mark.parametrize("other", [SPECULATOR, replace(BASE, name="wide", vocab=310)], ids=lambda tiny: tiny.name)
def test_a_comparison_with_another_model_is_refused(
    tiny_bundles: TinyBundles, refused: Refused, other: TinyModel
) -> None:
    bundle = tiny_bundles.bundle(BASE, 2)
    error = refused(["parity", tiny_bundles.checkpoint(other), bundle, "--greedy-tokens", 0], "ive the checkpoint that")
    assert "num_hidden_layers" in error or "vocab_size" in error
