"""Files that may be hostile: what is read, and what is refused before it is read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shortstack.graphs.errors import BundleError, CheckpointError, RequestError
from shortstack.graphs.read_file import (
    MAX_DEPTH,
    MAX_TEXT_BYTES,
    parse_json_object,
    read_file,
    read_text,
)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BundleError, match="found a pipe or a device, expected a regular file"):
        read_file(tmp_path / "pipe", BundleError)


def test_a_file_that_never_ends_is_refused_behind_a_link_too(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/zero")
    with pytest.raises(BundleError, match="a pipe or a device"):
        read_file(tmp_path / "link", BundleError)
    with pytest.raises(RequestError, match="--data is too large"):
        read_text(tmp_path / "link", RequestError, called="--data")


def test_the_size_is_known_before_a_file_is_read(tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(MAX_TEXT_BYTES * 1000)
    with pytest.raises(CheckpointError, match=f"{MAX_TEXT_BYTES * 1000} bytes, expected at most {MAX_TEXT_BYTES}"):
        read_file(tmp_path / "huge", CheckpointError)


@pytest.mark.parametrize("name", ["gone", ".", "null\0byte"])
def test_what_cannot_be_opened_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read|a folder"):
        read_file(f"{tmp_path}/{name}", CheckpointError)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_text(f"{tmp_path}/{name}", CheckpointError)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_json_is_read_in_every_encoding_that_it_may_have(encoding: str) -> None:
    assert parse_json_object('{"ä": "大"}'.encode(encoding), "a.json", CheckpointError) == {"ä": "大"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a":' * 100_000, "a.json is nested too deeply"),
        ("[" * 100_000, "a.json is nested too deeply"),
        ('{"a": "\\ud800"}', "a.json holds half of a character"),
        ('{"\\uDBFF": 1}', "a.json holds half of a character"),
        ('{"a": ' + "9" * 5000 + "}", "a.json is not valid JSON"),
        ("{'a': 1}", "a.json is not valid JSON"),
        ("[1]", "found a JSON list, expected a JSON object"),
        ("", "a.json is not valid JSON"),
    ],
)
def test_json_that_cannot_be_used_is_refused_in_one_line(text: str, says: str) -> None:
    for content in (text, text.encode()):
        with pytest.raises(CheckpointError, match=says) as caught:
            parse_json_object(content, "a.json", CheckpointError, "download it again")
        assert "\n" not in str(caught.value)


def test_a_whole_character_in_two_halves_is_read() -> None:
    assert parse_json_object('{"a": "\\ud83d\\ude42"}', "a.json", CheckpointError) == {"a": "🙂"}


def test_a_pipe_may_give_a_text(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b"\xef\xbb\xbfsome text")
    os.close(write_end)
    assert read_text(f"/dev/fd/{read_end}", RequestError) == "some text"
    os.close(read_end)


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a": ', "}")])
def test_json_is_read_down_to_a_bound_that_its_writer_survives_too(opening: str, closing: str) -> None:
    def nested(levels: int) -> str:
        return '{"a": ' + opening * (levels - 1) + "1" + closing * (levels - 1) + "}"

    assert "a" in parse_json_object(nested(MAX_DEPTH), "a.json", CheckpointError)
    for levels in (MAX_DEPTH + 1, 900):
        with pytest.raises(CheckpointError, match=r"a\.json is nested too deeply"):
            parse_json_object(nested(levels), "a.json", CheckpointError)
