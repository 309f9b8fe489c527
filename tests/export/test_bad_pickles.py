"""Hostile and damaged files of torch.save: each is refused in one line, and no code in them is run."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.bad_input import Refused, left_behind
from helpers.pickles import Claim, Code, Storage, state_of, write_claims, write_pickled_shards

State = dict[str, torch.Tensor]


@pytest.fixture
def state(checkpoint: Path) -> State:
    """The tensors of the checkpoint, which has none itself any more."""
    return state_of(checkpoint)


@pytest.fixture
def refuses(checkpoint: Path, tmp_path: Path, refused: Refused) -> Callable[..., str]:
    def refuses(*says: str, options: tuple[str, ...] = ("--allow-pickle",)) -> str:
        before = left_behind(tmp_path)
        error = refused(["export", checkpoint, tmp_path / "out", *options], *says)
        assert left_behind(tmp_path) == before
        return error

    return refuses


def test_the_code_of_the_tests_would_run_elsewhere(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Code(tmp_path / "ran")))
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize("place", ["value", "beside", "instead", "in a wrapper", "raw pickle"])
def test_code_in_a_pickle_is_not_run(
    checkpoint: Path, state: State, tmp_path: Path, refuses: Callable[..., str], place: str
) -> None:
    trap, file = Code(tmp_path / "ran"), checkpoint / "pytorch_model.bin"
    if place == "raw pickle":
        file.write_bytes(pickle.dumps({**state, "x": trap}))
        refuses(file.name, "is not a complete torch.save file")
    else:
        contents: dict[str, object] = {
            "value": {**state, "x": trap},
            "beside": {"model": state, "args": trap},
            "instead": trap,
            "in a wrapper": {"state_dict": {**state, "x": {"y": [trap]}}},
        }
        torch.save(contents[place], file)
        refuses(file.name, f"holds {os.mkdir.__module__}.mkdir", "may run code", "torch.save(model.state_dict(), FILE)")
    assert not trap.path.exists()


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_code_is_found_in_every_protocol(
    checkpoint: Path, state: State, tmp_path: Path, refuses: Callable[..., str], protocol: int
) -> None:
    trap = Code(tmp_path / "ran")
    torch.save({"x": trap}, checkpoint / "pytorch_model.bin", pickle_protocol=protocol)
    refuses("may run code")
    assert not trap.path.exists()


@pytest.mark.parametrize(
    "value", [bytearray(8), {1, 2}, torch.zeros(3).to_sparse(), complex(1, 2), torch.zeros(2, device="meta")], ids=str
)
def test_what_builds_something_else_than_a_tensor_is_refused(
    checkpoint: Path, state: State, refuses: Callable[..., str], value: object
) -> None:
    """Torch's own unpickler would build these; some take as much memory as they like."""
    torch.save({**state, "x": value}, checkpoint / "pytorch_model.bin")
    refuses("pytorch_model.bin holds ", "may run code", "expected tensors in a dict")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"a": 1}, "entry 'a': found int, expected a tensor for every name"),
        ({"a": None}, "entry 'a': found NoneType"),
        ({"model": {"a": {"b": torch.zeros(1)}}}, ", model: entry 'a': found dict"),
        ({"a": [torch.zeros(1)]}, "entry 'a': found list"),
        ({3: torch.zeros(1)}, "entry 3: found a name of type int"),
        ({"model": {"a": torch.zeros(1)}, "state_dict": {"a": torch.zeros(1)}}, "several state dicts"),
        ({}, "holds no state dict: found an empty dict"),
        ({"model": {}}, ", model holds no state dict: found an empty dict"),
        ([torch.zeros(1)], "holds no state dict: found list"),
        (torch.zeros(1), "holds no state dict: found Tensor"),
        ("text", "holds no state dict: found str"),
        ({"x" * 1000: 1}, "more characters"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_dict_that_holds_something_else_than_tensors_is_refused(
    checkpoint: Path, state: State, refuses: Callable[..., str], content: Any, says: str
) -> None:
    torch.save(content, checkpoint / "pytorch_model.bin")
    refuses("pytorch_model.bin", says)


NORM = "model.norm.weight"
SHORT = bytes(64 * 4)
CLAIMS: dict[str, tuple[dict[str, Any], str]] = {
    "a shape larger than the storage": ({"shape": (640,)}, "not a complete torch.save file"),
    "a shape that no memory holds": ({"shape": (1 << 20, 1 << 30)}, "not a complete torch.save file"),
    "a storage larger than the file": ({"shape": (1 << 34,), "numbers": 1 << 34}, "not a complete torch.save file"),
    "a storage of a negative size": ({"shape": (64,), "numbers": -64}, "not a complete torch.save file"),
    "an offset behind the end": ({"shape": (64,), "offset": 8}, "not a complete torch.save file"),
    "a negative offset": ({"shape": (64,), "offset": -8}, "not a complete torch.save file"),
    "negative strides": ({"shape": (64,), "strides": (-1,), "offset": 63}, "not a complete torch.save file"),
    "an expanded number": (
        {"shape": (1 << 20, 1 << 20), "strides": (0, 0)},
        f"tensor {NORM} claims more than is stored",
    ),
    "an expanded row": ({"shape": (1 << 20, 64), "strides": (0, 1)}, "found [1048576, 64] with strides [0, 1]"),
    "overlapping rows": ({"shape": (60, 5), "strides": (1, 1)}, "1200 bytes, expected at most the 256 bytes"),
    "a size that overflows": ({"shape": (1 << 40, 1 << 40), "strides": (0, 0)}, "not a complete torch.save file"),
}


@pytest.mark.parametrize("case", CLAIMS)
def test_a_tensor_that_claims_more_than_is_stored_is_refused(
    checkpoint: Path, state: State, refuses: Callable[..., str], case: str
) -> None:
    claim, says = CLAIMS[case]
    storage = Storage("0", claim.get("numbers", 64))
    strides, offset = claim.get("strides"), claim.get("offset", 0)
    tensor = Claim(storage, claim["shape"], strides or (1,) * len(claim["shape"]), offset)
    write_claims(checkpoint / "pytorch_model.bin", {NORM: tensor}, {"0": SHORT})
    refuses("pytorch_model.bin", says)


def test_a_storage_that_reaches_into_the_next_one_gives_no_other_file_away(
    checkpoint: Path, state: State, refuses: Callable[..., str]
) -> None:
    """The mapped bytes end where the file ends, whatever a storage claims to hold."""
    tensors = {f"t{number}": Claim(Storage(str(number), 4096), (4096,)) for number in range(16)}
    write_claims(checkpoint / "pytorch_model.bin", tensors, {str(number): SHORT for number in range(16)})
    refuses("pytorch_model.bin")


def test_tensors_that_share_their_bytes_may_not_take_more_than_the_file(
    checkpoint: Path, state: State, refuses: Callable[..., str]
) -> None:
    whole = torch.zeros(1000)
    torch.save({f"x{number}": whole for number in range(100)}, checkpoint / "pytorch_model.bin")
    refuses("its 100 tensors share their bytes", "found 400000 bytes")


def test_a_compressed_archive_is_refused_before_it_is_unpacked(
    checkpoint: Path, state: State, refuses: Callable[..., str]
) -> None:
    with zipfile.ZipFile(checkpoint / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50 << 20))
    refuses("claims more than it holds", "found 52428800 bytes in", "not compressed")


def test_an_archive_without_a_pickle_or_with_two_is_refused(
    checkpoint: Path, state: State, refuses: Callable[..., str]
) -> None:
    for names in ((), ("archive/data.pkl", "other/data.pkl")):
        with zipfile.ZipFile(checkpoint / "pytorch_model.bin", "w") as archive:
            for name in names:
                archive.writestr(name, pickle.dumps({}))
        refuses(f"found {len(names)} records data.pkl")


@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_named(checkpoint: Path, state: State, refuses: Callable[..., str], share: float) -> None:
    file = checkpoint / "pytorch_model.bin"
    torch.save(state, file)
    os.truncate(file, int(file.stat().st_size * share))
    refuses("pytorch_model.bin is not a complete torch.save file", "ownload it again")


@pytest.mark.parametrize("seed", range(20))
def test_a_file_with_damaged_bytes_is_refused_or_read(
    checkpoint: Path, state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    """Damage in the numbers themselves cannot be seen; elsewhere it is one line."""
    from shortstack.__main__ import run

    file = checkpoint / "pytorch_model.bin"
    torch.save(state, file)
    content = bytearray(file.read_bytes())
    for place in torch.randint(0, len(content) if seed % 2 else 6000, (3,)).tolist():
        content[place] ^= 1 << (place % 8)
    file.write_bytes(content)
    code = run(["export", str(checkpoint), str(tmp_path / "out"), "--allow-pickle"])
    error = capsys.readouterr().err
    assert code in (0, 2), error
    if code:
        assert re.search(r"^error: .*\n\Z", error, re.MULTILINE), error
        assert "Traceback" not in error


def test_a_file_in_the_format_before_zip_archives_is_named(
    checkpoint: Path, state: State, refuses: Callable[..., str]
) -> None:
    torch.save(state, checkpoint / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    refuses("expected a zip archive, as torch 1.6 and later write", "save it as safetensors")


def test_shards_of_which_half_are_there_are_counted(
    checkpoint: Path, state: State, refuses: Callable[..., str]
) -> None:
    for file in write_pickled_shards(checkpoint, state, 4)[::2]:
        file.unlink()
    refuses("lacks 2 of 4 files that pytorch_model.bin.index.json names", "Finish the download")


def test_shards_without_an_index_are_not_guessed(checkpoint: Path, state: State, refuses: Callable[..., str]) -> None:
    write_pickled_shards(checkpoint, state, 2)
    (checkpoint / "pytorch_model.bin.index.json").unlink()
    refuses("holds 2 pickles", "and no pytorch_model.bin.index.json that says which belong together")


def test_a_shard_that_lacks_what_the_index_says_is_named(
    checkpoint: Path, state: State, refuses: Callable[..., str]
) -> None:
    first, second = write_pickled_shards(checkpoint, state, 2)
    second.write_bytes(first.read_bytes())
    refuses(f"{second.name} lacks", "its index and shards are of different versions")


@pytest.mark.parametrize("shard", ["../a.bin", "/etc/passwd", "sub/a.bin", ".."])
def test_a_shard_name_that_leaves_the_folder_is_refused(
    checkpoint: Path, state: State, refuses: Callable[..., str], shard: str
) -> None:
    write_pickled_shards(checkpoint, state, 2)
    index = checkpoint / "pytorch_model.bin.index.json"
    data = json.loads(index.read_text(encoding="utf-8"))
    data["weight_map"][NORM] = shard
    index.write_text(json.dumps(data), encoding="utf-8")
    refuses("weight_map", "expected a plain file name in the same folder")


@pytest.mark.parametrize("named", [False, True], ids=["in the folder", "by its name"])
def test_a_link_out_of_the_folder_is_followed_only_if_asked_for(
    checkpoint: Path, state: State, tmp_path: Path, refused: Refused, named: bool
) -> None:
    from shortstack.__main__ import run

    torch.save(state, tmp_path / "elsewhere.bin")
    (checkpoint / "pytorch_model.bin").symlink_to(tmp_path / "elsewhere.bin")
    source = checkpoint / "pytorch_model.bin" if named else checkpoint
    refused(["export", source, tmp_path / "out", "--allow-pickle"], "is a link that leads out of the folder")
    assert run(["export", str(source), str(tmp_path / "out"), "--allow-pickle", "--follow-links"]) == 0


def test_tensors_of_integers_are_refused_by_name(checkpoint: Path, state: State, refuses: Callable[..., str]) -> None:
    state[NORM] = torch.ones(64, dtype=torch.int32)
    torch.save(state, checkpoint / "pytorch_model.bin")
    refuses(f"tensor {NORM}", "found type I32")


def test_a_file_beside_no_config_is_refused(checkpoint: Path, state: State, refuses: Callable[..., str]) -> None:
    torch.save(state, checkpoint / "pytorch_model.bin")
    (checkpoint / "config.json").unlink()
    refuses("has no config.json")
