"""Files that the user named: links stay links, pipes and devices are written to, folders are refused."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from shortstack.graphs.errors import RequestError
from shortstack.graphs.write_file import write_whole


def write(path: Path, content: bytes = b"new") -> None:
    write_whole(path, content, RequestError, f"--report {path}")


def test_a_file_is_made_or_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write(path, b"old")
    write(path)
    assert path.read_bytes() == b"new"
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_one_and_its_target_is_written(tmp_path: Path, exists: bool) -> None:
    target, link = tmp_path / "elsewhere" / "page.html", tmp_path / "page.html"
    target.parent.mkdir()
    if exists:
        target.write_bytes(b"old")
    link.symlink_to(target)
    write(link)
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    seen: list[bytes] = []
    reader = threading.Thread(target=lambda: seen.append(pipe.read_bytes()))
    reader.start()
    write(pipe)
    reader.join(timeout=10)
    assert seen == [b"new"]
    assert pipe.is_fifo()


def test_a_device_is_written_to_and_stays(tmp_path: Path) -> None:
    link = tmp_path / "nowhere"
    link.symlink_to(os.devnull)
    write(link)
    write(Path(os.devnull))
    assert link.is_symlink()
    assert Path(os.devnull).is_char_device()


def test_an_open_file_of_this_process_is_written_to(tmp_path: Path) -> None:
    with (tmp_path / "out.html").open("wb") as file:
        write(Path(f"/dev/fd/{file.fileno()}"))
    assert (tmp_path / "out.html").read_bytes() == b"new"


@pytest.mark.parametrize("name", [".", "missing/page.html", "null\0byte", "file/page.html"])
def test_what_cannot_be_written_is_named_and_nothing_is_left(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match=r"^--report .* cannot be written \(.*\)\. Choose another file\.$"):
        write(Path(f"{tmp_path}/{name}"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
