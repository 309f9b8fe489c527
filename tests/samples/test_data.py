"""The slice of commands in samples/data: small, whole, and its two files hold different commands."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

MAX_BYTES = 250_000
ROWS = {"snips_parse_train.jsonl": 1050, "snips_parse_dev.jsonl": 175}
INTENTS = 7


def read(repository: Path, name: str) -> list[dict[str, str]]:
    lines = (repository / "samples" / "data" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_slice_is_small_and_its_intents_are_equally_frequent(repository: Path) -> None:
    folder = repository / "samples" / "data"
    assert sum((folder / name).stat().st_size for name in ROWS) <= MAX_BYTES
    for name, rows in ROWS.items():
        counts = Counter(row["intent"] for row in read(repository, name))
        assert set(counts.values()) == {rows // INTENTS}
        assert len(counts) == INTENTS


def test_a_parse_holds_its_intent_and_words_of_its_utterance(repository: Path) -> None:
    for row in (row for name in ROWS for row in read(repository, name)):
        assert row.keys() == {"utterance", "parse", "intent"}
        assert row["parse"].startswith(f"[IN:{row['intent']}")
        assert row["parse"].count("[") == row["parse"].count("]")
        for slot in row["parse"].split(" [SL:")[1:]:
            assert slot.partition(" ")[2].rstrip("]") in row["utterance"]


def test_no_command_that_is_measured_on_is_trained_on(repository: Path) -> None:
    train, dev = ({row["utterance"].casefold() for row in read(repository, name)} for name in ROWS)
    assert (len(train), len(dev)) == tuple(ROWS.values())
    assert not train & dev
