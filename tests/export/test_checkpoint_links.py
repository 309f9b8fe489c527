"""Links in checkpoints: those of the hub's cache are followed, others only if that is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.hf_folders import SHAPES, edit_index, tensors, write, write_sharded
from shortstack.export.checkpoint import open_checkpoint
from shortstack.graphs.errors import CheckpointError


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_sharded(tmp_path / "m")


@pytest.mark.parametrize("shard", ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", "x\\y", "a\0b", 3])
def test_a_shard_name_that_leaves_the_folder_is_refused(sharded: Path, shard: object) -> None:
    edit_index(sharded, "model.norm.weight", shard)
    with pytest.raises(CheckpointError, match="weight_map"):
        open_checkpoint(str(sharded))


def test_a_link_out_of_the_folder_is_refused(sharded: Path, tmp_path: Path) -> None:
    (sharded / "a.safetensors").rename(tmp_path / "elsewhere")
    (sharded / "a.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        open_checkpoint(str(sharded))


def test_a_link_out_of_the_folder_is_followed_if_asked_for(sharded: Path, tmp_path: Path) -> None:
    (sharded / "a.safetensors").rename(tmp_path / "elsewhere")
    (sharded / "a.safetensors").symlink_to(tmp_path / "elsewhere")
    opened = open_checkpoint(str(sharded), follow_links=True)
    assert opened.names() == frozenset(SHAPES)
    for name in opened.names():
        assert opened.tensor(name).shape == SHAPES[name]


@pytest.mark.parametrize("linked", ["blobs", "the cache"])
def test_the_cache_of_the_hub_may_lie_on_another_disk(tmp_path: Path, linked: str) -> None:
    home, disk = tmp_path / "cache" / "models--o--n", tmp_path / "disk"
    for folder in ("snapshots", "blobs"):
        (home / folder).mkdir(parents=True)
    target = write(home / "snapshots" / "abc", tensors())
    for number, file in enumerate(sorted(target.iterdir())):
        file.rename(home / "blobs" / f"{number:040x}")
        file.symlink_to(f"../../blobs/{number:040x}")
    moved = home.parent if linked == "the cache" else home / linked
    moved.rename(disk)
    moved.symlink_to(disk)
    assert open_checkpoint(str(target)).names() == frozenset(SHAPES)


def test_a_tokenizer_that_links_to_a_secret_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", tensors())
    (tmp_path / "secret").write_text("{}")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a link"):
        open_checkpoint(str(folder)).files()


def test_a_circular_link_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", tensors())
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(str(folder))


def test_a_snapshot_of_the_hub_may_link_to_its_blobs(tmp_path: Path) -> None:
    snapshot = write(tmp_path / "snapshot", tensors())
    target = tmp_path / "models--o--n" / "snapshots" / "abc"
    target.parent.mkdir(parents=True)
    snapshot.rename(target)
    (tmp_path / "models--o--n" / "blobs").mkdir()
    blob = (target / "model.safetensors").rename(tmp_path / "models--o--n" / "blobs" / "f00")
    (target / "model.safetensors").symlink_to(blob)
    assert open_checkpoint(str(target)).names() == frozenset(SHAPES)


def test_a_folder_that_only_looks_like_the_cache_gives_away_no_other_file(tmp_path: Path) -> None:
    """A link ``blobs`` may lead anywhere; what has no hash for a name is no blob."""
    home, elsewhere = tmp_path / "models--o--n", tmp_path / "elsewhere"
    folder = write(home / "snapshots" / "abc", tensors())
    elsewhere.mkdir()
    (elsewhere / "secret").write_text("{}", encoding="utf-8")
    (home / "blobs").symlink_to(elsewhere)
    (folder / "tokenizer.json").symlink_to("../../blobs/secret")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a link that leads out of the folder"):
        open_checkpoint(str(folder)).files()
