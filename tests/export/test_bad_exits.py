"""An untrusted folder of exits: one line names what does not fit, and nothing is written."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers import exit_nodes
from helpers.bad_input import Refused
from helpers.tiny_models import BASE, TinyBundles
from shortstack.export.trained_exits import EXIT_WEIGHTS_FILE, EXITS_FILE, read_exits, write_exits
from shortstack.export.twin.exits import ExitNode, load_exits, save_exits
from shortstack.graphs import names
from shortstack.graphs.errors import CheckpointError, RequestError
from shortstack.graphs.plan import ExitSpec

EXITS = (
    ExitSpec(1, 40, branch="linear", sees_token=True),
    ExitSpec(3, branch="mlp", norm="own", head="low_rank", head_rank=8, has_gate=True),
)
IDS = names.exit_weight(1, "head.ids")
MATRIX = names.exit_weight(1, "linear.weight")


@pytest.fixture
def folder(tiny_bundles: TinyBundles, tmp_path: Path) -> Path:
    """Exits for BASE, to damage."""
    exit_nodes.write_random_exits(tiny_bundles.checkpoint(BASE), tmp_path / "exits", *EXITS)
    return tmp_path / "exits"


@pytest.fixture
def refuses(tiny_bundles: TinyBundles, folder: Path, refused: Refused, tmp_path: Path) -> Callable[..., None]:
    """Check that an export with the folder is refused with these words and leaves nothing behind."""

    def refuses(*says: str, options: tuple[str, ...] = ()) -> None:
        out = tmp_path / "out"
        refused(["export", tiny_bundles.checkpoint(BASE), out, "--exits", folder, *options], *says)
        assert not out.exists()

    return refuses


def edit_exit(folder: Path, index: int = 0, **fields: Any) -> None:
    data = json.loads((folder / EXITS_FILE).read_text(encoding="utf-8"))
    data["exits"][index] |= fields
    (folder / EXITS_FILE).write_text(json.dumps(data), encoding="utf-8")


def edit(folder: Path, **fields: Any) -> None:
    data = json.loads((folder / EXITS_FILE).read_text(encoding="utf-8"))
    (folder / EXITS_FILE).write_text(json.dumps(data | fields), encoding="utf-8")


def edit_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(folder / EXIT_WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / EXIT_WEIGHTS_FILE)


@pytest.mark.parametrize("file", [EXITS_FILE, EXIT_WEIGHTS_FILE])
def test_a_missing_file_is_named(folder: Path, refuses: Callable[..., None], file: str) -> None:
    (folder / file).unlink()
    refuses(f"has no {file}")


@pytest.mark.parametrize("file", [EXITS_FILE, EXIT_WEIGHTS_FILE])
def test_a_link_out_of_the_folder_is_not_followed(
    folder: Path, refuses: Callable[..., None], tmp_path: Path, file: str
) -> None:
    os.rename(folder / file, tmp_path / file)
    (folder / file).symlink_to(tmp_path / file)
    refuses(file, "leads out of the folder")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\udcff", " " * (1 << 21)])
def test_exits_json_that_is_not_valid_is_named(folder: Path, refuses: Callable[..., None], text: str) -> None:
    (folder / EXITS_FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    refuses(EXITS_FILE)


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.0, [1]])
def test_an_unknown_format_version_is_named(folder: Path, refuses: Callable[..., None], version: object) -> None:
    edit(folder, format_version=version)
    refuses("format_version", repr(version), "expected 1")


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size", "num_hidden_layers"])
def test_exits_of_another_model_are_refused(folder: Path, refuses: Callable[..., None], field: str) -> None:
    edit(folder, **{field: 7})
    refuses("is for another model", f"{field} = 7", "trained for this checkpoint")


def test_unknown_fields_are_refused(folder: Path, refuses: Callable[..., None]) -> None:
    edit(folder, surprise=1)
    refuses("unknown fields: surprise")


@pytest.mark.parametrize("exits", [None, {}, [], [1], [[]], [{}], [{"exit_layer": 1}]])
def test_an_exits_field_that_is_not_valid_is_refused(folder: Path, refuses: Callable[..., None], exits: object) -> None:
    edit(folder, exits=exits)
    refuses(EXITS_FILE, "exit")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"exit_layer": 0}, "exit_layer"),
        ({"exit_layer": 4}, "expected 1..3"),
        ({"exit_layer": 3}, "each once, ascending"),
        ({"exit_layer": True}, "exit_layer is True"),
        ({"exit_layer": "1"}, "exit_layer is '1'"),
        ({"exit_layer": 1.0}, "exit_layer is 1.0"),
        ({"exit_layer": 10**30}, "expected 1..3"),
        ({"draft_vocab": 1}, "expected null or 2..300"),
        ({"draft_vocab": 301}, "expected null or 2..300"),
        ({"branch": "tree"}, "none or linear or mlp or block"),
        ({"branch": None}, "branch is None"),
        ({"norm": "layer"}, "final or own or none"),
        ({"head": "tail"}, "shared or own or low_rank"),
        ({"head_rank": 4}, "head_rank"),
        ({"head": "low_rank"}, "head_rank"),
        ({"linear_mlp": -1}, "linear_mlp"),
        ({"branch": "mlp"}, "only a linear branch has sees_token"),
        ({"sees_state": 1}, "sees_state is 1"),
        ({"has_gate": "yes"}, "has_gate is 'yes'"),
        ({"colour": "red"}, "an exit has the fields"),
    ],
)
def test_a_field_out_of_range_is_named(
    folder: Path, refuses: Callable[..., None], fields: dict[str, Any], says: str
) -> None:
    edit_exit(folder, **fields)
    refuses(EXITS_FILE, says)


@pytest.mark.parametrize("fields", [{"linear_mlp": 10**9}, {"linear_mlp": 5}, {"sees_state": True}])
def test_missing_weights_for_the_kind_of_exit_are_named(
    folder: Path, refuses: Callable[..., None], fields: dict[str, Any]
) -> None:
    edit_exit(folder, **fields)
    refuses(EXIT_WEIGHTS_FILE, "exits.1.linear")


def test_a_file_that_is_not_safetensors_is_named(folder: Path, refuses: Callable[..., None]) -> None:
    path = folder / EXIT_WEIGHTS_FILE
    content = path.read_bytes()
    for damaged in (b"", content[:-1], b"\xff" * 64, struct.pack("<Q", 1 << 60) + content[8:], content[:8] + b"{" * 99):
        path.write_bytes(damaged)
        refuses(EXIT_WEIGHTS_FILE, "not a complete safetensors file")


def test_all_wrong_tensors_are_named_at_once(folder: Path, refuses: Callable[..., None]) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors[names.exit_weight(3, "gate.bias")]
        tensors["exits.2.norm.weight"] = np.ones(BASE.hidden, np.float32)
        tensors[MATRIX] = np.ascontiguousarray(tensors[MATRIX].T)
        tensors[names.exit_weight(3, "norm.weight")][5] = np.nan
        tensors[names.exit_weight(3, "head.up.weight")] = np.ones((BASE.vocab, 8), np.int32)

    edit_tensors(folder, change)
    refuses(
        "exits.3.gate.bias is missing",
        "exits.2.norm.weight belongs to no exit",
        f"{MATRIX} is [128, 64], not [64, 128]",
        "exits.3.norm.weight has values that are not finite",
        "exits.3.head.up.weight has the type I32",
    )


@pytest.mark.parametrize(
    "ids",
    [
        np.arange(40)[::-1],
        np.r_[0, np.arange(39)],
        np.arange(-1, 39),
        np.arange(261, 301),
        np.arange(40, dtype=np.int32),
        np.arange(40, dtype=np.float32),
        np.r_[np.arange(39), np.int64(2**62)],
    ],
)
def test_ids_must_be_ascending_token_ids(folder: Path, refuses: Callable[..., None], ids: np.ndarray) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({IDS: np.ascontiguousarray(ids)}))
    refuses(IDS)


@pytest.mark.parametrize("depth", [1, 3])
def test_exit_layer_must_not_repeat_a_depth_of_the_folder(
    folder: Path, refuses: Callable[..., None], depth: int
) -> None:
    refuses(f"--exit-layer {depth}", "is also the depth of an exit", options=("-e", str(depth)))


def test_trained_heads_are_not_trimmed(folder: Path, refuses: Callable[..., None]) -> None:
    refuses("--draft-vocab", "no exit has a whole one", options=("--draft-vocab", "50"))


def test_a_draft_vocabulary_without_exits_is_refused(checkpoint: Path, refused: Refused, tmp_path: Path) -> None:
    refused(["export", checkpoint, tmp_path / "out", "--draft-vocab", "50"], "there is no exit", "--exit-layer E")
    assert not (tmp_path / "out").exists()


def test_a_value_out_of_float16_range_is_not_written_and_the_old_folder_stays(
    tiny_bundles: TinyBundles, folder: Path
) -> None:
    twin, nodes = exit_nodes.write_random_exits(tiny_bundles.checkpoint(BASE), folder, *EXITS)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    nodes[0].linear.weight.data[0, 0] = 1e6
    with pytest.raises(CheckpointError, match="not finite"):
        save_exits(folder, twin.spec, nodes)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_written_exits_are_read_back(tiny_bundles: TinyBundles, tmp_path: Path, dtype: str) -> None:
    twin, _ = exit_nodes.write_random_exits(tiny_bundles.checkpoint(BASE), tmp_path / "a", *EXITS)
    block = ExitSpec(2, 17, branch="block", norm="own", head="own")
    nodes = [exit_nodes.random_exit(twin.spec, e) for e in (*EXITS, block)]
    save_exits(tmp_path / "b", twin.spec, nodes, dtype=dtype)
    exits, tensors = read_exits(tmp_path / "b", twin.spec)
    assert exits == (EXITS[0], block, EXITS[1])
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [EXITS_FILE, EXIT_WEIGHTS_FILE]
    by_depth: dict[int, ExitNode] = {node.exit_spec.exit_layer: node for node in nodes}
    for node in load_exits(tmp_path / "b", twin.spec):
        depth = node.exit_spec.exit_layer
        for part, value in node.state_dict().items():
            wanted = by_depth[depth].state_dict()[part].numpy()
            stored = tensors[names.exit_weight(depth, part)]
            assert stored.dtype == (np.int64 if part == "head.ids" else np.float32)
            np.testing.assert_array_equal(value.numpy(), stored)
            np.testing.assert_allclose(stored, wanted, rtol=1e-3 if dtype == "float16" else 0, atol=1e-6)


def test_exits_without_weights_need_no_weights_file(tiny_bundles: TinyBundles, folder: Path, tmp_path: Path) -> None:
    twin, _ = exit_nodes.write_random_exits(tiny_bundles.checkpoint(BASE), folder, *EXITS)
    write_exits(tmp_path / "plain", twin.spec, (ExitSpec(2),), {})
    (tmp_path / "plain" / EXIT_WEIGHTS_FILE).unlink()
    assert read_exits(tmp_path / "plain", twin.spec) == ((ExitSpec(2),), {})


@pytest.mark.parametrize(
    "fields",
    [
        {"branch": "tree"},
        {"head": "low_rank"},
        {"head": "low_rank", "head_rank": -1},
        {"head_rank": 1},
        {"branch": "mlp", "linear_mlp": 1},
        {"sees_state": True},
        {"linear_mlp": -1, "branch": "linear"},
    ],
)
def test_an_impossible_exit_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="exit after 3 layers"):
        ExitSpec(3, **fields)


def test_an_exit_survives_json() -> None:
    for exit_spec in EXITS:
        assert ExitSpec.from_json(asdict(exit_spec)) == exit_spec
