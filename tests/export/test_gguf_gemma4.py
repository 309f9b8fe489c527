"""GGUF files of Gemma 4, whose layers differ: what its metadata may not say, and how its table of tokens is read."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from helpers.assistants import Gemma4Pair
from helpers.drafters import Recorded
from helpers.gguf_cases import CASES, VOCAB
from helpers.gguf_files import Edit, Kind, listed
from helpers.gguf_written import converted, written
from shortstack.export.assemble import export_bundle
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.checkpoint.checkpoint import read_part
from shortstack.export.spec import ExportSpec
from shortstack.graphs.errors import CheckpointError
from shortstack.runtime import DraftPolicy, Speculate, load

GEMMA4 = next(case for case in CASES if case.name == "gemma4")
REFUSED: tuple[tuple[str, Edit, str], ...] = (
    (
        "too few layers with sizes",
        listed("attention.head_count_kv", [2, 1]),
        r"gemma4\.attention\.head_count_kv: found \[2, 1\], expected a positive integer, or one for each of 5 layers\.",
    ),
    (
        "layers of one type with different heads",
        listed("attention.head_count_kv", [2, 1, 1, 2, 1]),
        r"gemma4\.attention\.head_count_kv: layers of one type that differ: found \[2, 1, 1, 2, 1\], expected one",
    ),
    (
        "layers of other widths",
        listed("feed_forward_length", [96, 96, 96, 192, 96]),
        r"gemma4\.feed_forward_length: layers of other widths: found \[96, 96, 96, 192, 96\], expected one width, or",
    ),
    (
        "a last layer that slides",
        listed("attention.sliding_window_pattern", [True, False, True, False, True]),
        r"gemma4\.attention\.sliding_window_pattern: found .* expected true or false for each layer, and false for the",
    ),
    (
        "more sharing layers than layers",
        lambda w: w.add_shared_kv_layers(5),
        r"gemma4\.attention\.shared_kv_layers: found 5, expected 0\.\.4, fewer than the layers\. Convert",
    ),
    (
        "a scaled rotary embedding",
        lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR) or w.add_rope_scaling_factor(8.0),
        r"gemma4\.rope\.scaling\.type: scaled rotary embedding: found linear, expected none\. Export another",
    ),
    (
        "values of another width than keys",
        lambda w: w.add_value_length(16),
        r"gemma4\.attention\.value_length: found 16, expected the width of the keys, 32",
    ),
)


@pytest.mark.parametrize(("edit", "says"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_layers_that_no_gemma4_has_are_refused_by_their_field(tmp_path: Path, edit: Edit, says: str) -> None:
    _, file = written(GEMMA4, tmp_path, edit=edit)
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(str(file))


@pytest.mark.parametrize(
    ("factors", "found"),
    [
        ([1.0, 1.0, 8.0, 8.0] * 4, "16 numbers, 8 of them 1"),
        ([1.0] * 4 + [1e30] * 4, "8 numbers, 4 of them 1"),
        ([1e30] * 16, "16 numbers, 0 of them 1"),
        ([1.0] * 4 + [float("nan")] * 12, "16 numbers, 4 of them 1"),
    ],
    ids=["mixed", "too few", "none", "not numbers"],
)
def test_divisors_that_rotate_a_share_of_a_head_otherwise_are_refused(
    tmp_path: Path, factors: list[float], found: str
) -> None:
    extra = {"rope_freqs.weight": np.array(factors, np.float32)}
    _, file = written(GEMMA4, tmp_path, skip="rope_freqs", extra=extra)
    with pytest.raises(CheckpointError, match=rf"rope_freqs\.weight: found {found}, expected 16 numbers, 1 and behind"):
        open_checkpoint(str(file))


def test_gemma4_without_divisors_is_refused(tmp_path: Path) -> None:
    _, file = written(GEMMA4, tmp_path, skip="rope_freqs")
    with pytest.raises(CheckpointError, match=r"has no tensor rope_freqs\.weight, which says what full layers rotate"):
        open_checkpoint(str(file))


@pytest.mark.parametrize("kind", [None, "Q4_0", "Q5_1", "Q8_0", "F16", "BF16"])
def test_columns_of_a_table_are_read_without_the_others(
    tmp_path: Path, kind: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = written(GEMMA4, tmp_path, kind=None if kind is None else Kind[kind])
    checkpoint = open_checkpoint(str(file))
    name = "model.embed_tokens_per_layer.weight"
    whole = checkpoint.tensor(name)
    read: list[int] = []
    dequantize = gguf.dequantize

    def listening(blocks: np.ndarray, quantization: Kind) -> np.ndarray:
        found = dequantize(blocks, quantization)
        read.append(found.size)
        return found

    monkeypatch.setattr(gguf, "dequantize", listening)
    for start, end in ((0, 32), (128, 160), (5, 7), (31, 97), (0, 160)):
        columns = read_part(checkpoint, name, slice(None), slice(start, end))
        assert columns.flags.c_contiguous
        np.testing.assert_array_equal(columns, whole[:, start:end])
        assert read.pop() < len(whole) * (end - start + 64)
    assert not read


def test_an_assistant_drafts_for_a_file_as_for_the_folder_that_it_was_made_from(tmp_path: Path) -> None:
    model, assistant = Gemma4Pair(vocab=VOCAB).write(tmp_path)
    file, rounds = converted(model, tmp_path / "m.gguf", "gemma4"), []
    for number, source in enumerate((model, file)):
        bundle = export_bundle(ExportSpec(str(source), tmp_path / str(number), drafter=str(assistant)))
        recorded = Recorded()
        with load(bundle.folder) as loaded:
            strategy = Speculate(draft=DraftPolicy(3), source=recorded)
            loaded.generate([3, 5, 7], strategy=strategy, max_new_tokens=30, ignore_eos=True)
        rounds.append(recorded.rounds)
    assert len(rounds[0]) > 10
    assert rounds[0] == rounds[1]
