"""GGUF files with odd metadata: numbers that no model has, huge contexts, arrays in arrays."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import gguf
import pytest

from helpers.gguf_files import VOCAB, Edit, byte_level, weights, write
from shortstack.__main__ import run
from shortstack.export.arch import resolve
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.checkpoint.gguf_header import read_header
from shortstack.export.spec import DEFAULT_LONGEST
from shortstack.graphs.errors import CheckpointError


@pytest.mark.parametrize(
    ("field", "edit", "says"),
    [
        ("head_count", lambda w: w.add_bool("llama.attention.head_count", True), "found True, expected an integer"),
        ("eps", lambda w: w.add_layer_norm_rms_eps(float("nan")), "found nan, expected a finite number"),
        ("context_length", lambda w: w.add_uint64("llama.context_length", 1 << 40), "expected at most 2147483647"),
        ("eps", lambda w: w.add_layer_norm_rms_eps(1e-5) or w.add_rope_freq_base(float("inf")), "found inf, expected"),
        ("eps", lambda w: w.add_layer_norm_rms_eps(1e-5) or w.add_rope_scaling_factor(-2.0), "found -2.0, expected"),
        ("block_count", lambda w: w.add_block_count(1_000_000), "found 1000000, expected at most 4096"),
    ],
)
def test_a_number_that_no_model_has_is_named(tmp_path: Path, field: str, edit: Edit, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        resolve(open_checkpoint(str(write(tmp_path / "m.gguf", weights(), edit=edit, skip=(field,)))))


def test_a_huge_context_makes_no_huge_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_context_length(10**9)
        byte_level(writer)

    file = write(tmp_path / "m.gguf", weights(), edit=edit, skip=("context_length",))
    assert run(["export", str(file), str(tmp_path / "out"), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["max_length"] == DEFAULT_LONGEST
    assert f"the model's context is 1000000000 tokens, the bundle's {DEFAULT_LONGEST}" in printed.err
    assert (tmp_path / "out" / "weights.data").stat().st_size < 10**8


def test_arrays_in_arrays_are_read(tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_array("shortstack.pairs", [[1, 2], [3, 4]])

    file = write(tmp_path / "m.gguf", weights(), edit=edit)
    assert read_header(file).metadata["shortstack.pairs"] == [[1, 2], [3, 4]]
    assert resolve(open_checkpoint(str(file)))[1].vocab_size == VOCAB


@pytest.mark.parametrize("levels", [9, 100_000])
def test_arrays_that_are_nested_without_end_are_refused(tmp_path: Path, levels: int) -> None:
    file = write(tmp_path / "m.gguf", weights(), edit=lambda w: w.add_array("x.y", [[1]]))
    content = file.read_bytes()
    place = content.index(b"x.y") + 3  # the value: type, type of items, count, ...
    array = struct.pack("<IQ", 9, 1)
    file.write_bytes(content[: place + 4] + array * levels + content[place + 4 + len(array) :])
    with pytest.raises(CheckpointError, match="arrays are nested more than 8 deep"):
        open_checkpoint(str(file))
