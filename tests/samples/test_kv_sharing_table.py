"""The table of K,V maps: texts to recall, and the one command that makes it and continues it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from tokenizers import Tokenizer

from helpers.kv_twins import VOCAB, kv_spec, random_twin
from shortstack.graphs.errors import RequestError
from shortstack.runtime import load
from shortstack.samples.recipes.training.data import Example
from shortstack.samples.showcase import kv_sharing_runs, kv_sharing_speed, kv_sharing_table
from shortstack.samples.showcase.recall import KEYS, VALUES, completed, draw_rows

WORDS = ("red", "green", "blue", "stone", "river", "cloud")
SMALL = [
    "--held-out-rows", 6, "--recall-rows", 80, "--probe-rows", 4, "--layers", 4, "--kv-layers", 2, "--hidden", 32,
    "--heads", 2, "--kv-heads", 1, "--vocab", 300, "--context", 64, "--exit-layer", 1, "--steps", 2, "--batch-size", 4,
    "--seeds", 1, "--prompt-length", 6, "--prompt-length", 12, "--decode-tokens", 2, "--rounds", 1, "--questions", 1,
]  # fmt: skip


@pytest.fixture(autouse=True)
def quick(one_torch_thread: Callable[[], None]) -> None:
    one_torch_thread()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "words.jsonl"
    rows = [{"utterance": f"say {a} {b}", "parse": f"[{b} {a}]"} for a in WORDS for b in WORDS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def make(out: Path, data: Path, *more: object) -> None:
    arguments = [str(a) for a in (out, "--data", data, *SMALL, *more)]
    with click.Context(kv_sharing_table.main):
        kv_sharing_table.main.main(arguments, standalone_mode=False)


def test_every_question_was_answered_earlier_in_its_text() -> None:
    for row in draw_rows("recall", 50, 3):
        pairs, asked = row["prompt"].split("\n")
        said = dict(pair.split(" ") for pair in pairs.split(", "))
        assert 4 <= len(said) <= 8
        assert said[asked] == row["completion"].removeprefix(" ")
        assert said.keys() <= set(KEYS)
        assert set(said.values()) <= set(VALUES)
    for row in draw_rows("recall", 50, 3, asks_all=True):
        pairs, again = row["prompt"].removesuffix("\n"), row["completion"]
        assert sorted(pairs.split(", ")) == sorted(again.split(", "))
    for row in draw_rows("copy", 50, 3):
        assert row["prompt"] == row["completion"] + "\n"
        assert 6 <= len(set(row["completion"].split())) <= 12


def test_a_seed_fixes_the_texts() -> None:
    assert draw_rows("recall", 9, 1) == draw_rows("recall", 9, 1)
    assert not {row["prompt"] for row in draw_rows("recall", 99, 0)} & {r["prompt"] for r in draw_rows("recall", 99, 1)}


def test_completions_are_counted_by_text_and_by_token() -> None:
    twin = random_twin(kv_spec((0, 1)))

    def next_token(*ids: int) -> int:
        with torch.no_grad():
            return int(twin(torch.tensor([ids]))[0, -1].argmax())

    first = next_token(5, 6)
    second = next_token(5, 6, first)
    right, right_then_wrong = (Example((5, 6, first, last), 2) for last in (second, (second + 1) % VOCAB))
    found = completed(twin, [right, right_then_wrong])
    assert (found.texts, found.tokens) == (0.5, 0.75)


def test_one_command_makes_the_table_and_does_not_train_twice(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # onnxruntime's pool is made once per process, and other tests leave its threads as they are
    monkeypatch.setattr(kv_sharing_speed, "load", lambda folder, threads: load(folder))
    out = tmp_path / "out"
    make(out, data, "--jobs", 2)
    table = json.loads((out / "table.json").read_text(encoding="utf-8"))
    maps = table["maps"]
    assert list(maps) == ["plain", "pizza-bottom", "lasagna-bottom", "sandwich-middle", "sandwich-top"]
    for name, entry in maps.items():
        owners = len(set(entry["kv_map"]))
        assert owners == (4 if name == "plain" else 2)
        assert entry["speed"]["kv_bytes_per_token"] == 2 * owners * 16 * 4
        assert entry["quality"][0]["perplexity"] > 1
        assert entry["speed"]["prefill"].keys() == {"6", "12"}
        assert entry["speed"]["self_speculation"]["same_output"] == 1
        assert not list((out / "runs" / f"{name}-0").glob("state.pt"))
    complete = table["complete_exits"]["2"]  # pizza-bottom 0,1,1,1
    assert list(complete) == ["plain", "pizza-bottom"]
    for name, speed in complete.items():
        assert speed["kv_bytes_per_token"] == maps[name]["speed"]["kv_bytes_per_token"]
        assert speed["self_speculation"]["same_output"] == 1
        assert 0 <= speed["agreement"] <= 1
    text = (out / "table.md").read_text(encoding="utf-8")
    assert "| sandwich-top |" in text
    assert "sandwich-top `0,3,3,3`" in text
    assert text.count("| pizza-bottom `0,1,1,1` |") == 2
    assert "Cut after 2 layers, where the maps below" in text
    assert (out / "table.png").read_bytes().startswith(b"\x89PNG")
    assert Tokenizer.from_file(str(out / "start" / "tokenizer.json")).get_vocab_size() == 300

    assert (out / "runs" / "plain-0" / "progress.log").is_file()

    monkeypatch.setattr(kv_sharing_runs, "train", None)  # would fail if it were called
    make(out, data)
    with pytest.raises(RequestError, match=r"made with other settings: found steps = 2, expected steps = 3"):
        make(out, data, "--steps", 3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--exit-layer", 2], "an exit after at most 1"),
        (["--exit-layer", 4], "below the 4 layers"),
        (["--heads", 3], "do not fit"),
        (["--decode-tokens", 60], "below --context"),
        (["--held-out-rows", 30], "too small"),
        (["--kv-layers", 5], "number of K,V producers"),
    ],
)
def test_wrong_requests_are_refused_before_training(
    data: Path, tmp_path: Path, arguments: list[object], says: str
) -> None:
    with pytest.raises(RequestError, match=says):
        make(tmp_path / "out", data, *arguments)
    assert not (tmp_path / "out" / "runs").exists()
