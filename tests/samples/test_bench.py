"""The benchmark: its arithmetic, its table, and every part of it once on a tiny model. Nothing depends on a time."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout

import pytest

from shortstack.graphs.errors import ShortstackError
from shortstack.samples.bench.artifacts import Artifacts, stored_bytes
from shortstack.samples.bench.drafting import relative_costs
from shortstack.samples.bench.engines import Account, common_prefix, compare
from shortstack.samples.bench.figures import ratios, spread
from shortstack.samples.bench.footprint import disk_section, load_section, memory_section
from shortstack.samples.bench.pipe import WorkerProcess, bundle_worker
from shortstack.samples.bench.report import Row, Section, at_least, at_most, machine, print_report, to_json
from shortstack.samples.bench.sections import drafting_section
from shortstack.samples.bench.settings import Settings

EXIT_LAYER, DRAFT_VOCAB = 3, 64
TEXT = list(range(10, 40))


def test_a_spread_is_the_median_and_the_quartiles() -> None:
    found = spread([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found.low, found.median, found.high, found.count) == (2.0, 3.0, 4.0, 5)
    assert found.scaled(10).show(0) == "30 [20, 40]"
    assert spread([7.0]).show(1) == "7.0 [7.0, 7.0]"
    with pytest.raises(ValueError, match="no value"):
        spread([])


def test_a_slow_spell_that_hits_both_of_a_pair_leaves_the_ratio_alone() -> None:
    assert ratios([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]).show(1) == "2.0 [2.0, 2.0]"


def test_costs_are_relative_to_the_plain_step_of_the_same_round() -> None:
    costs = relative_costs(
        [1.0, 10.0, 1.0], [0.5, 5.0, 0.5], [0.25, 2.5, 0.25], {"1": [0.8, 8, 0.8], "2": [1.2, 12, 1.2]}
    )
    assert (costs.plain_s, costs.draft, costs.lower) == (1.0, 0.5, 0.25)
    assert costs.verify == {1: 0.8, 2: pytest.approx(1.2)}
    assert costs.curve[2] == pytest.approx(1.5)


def test_a_comparison_gives_the_speed_and_where_tokens_first_differ() -> None:
    ours = Account([[1, 2, 3], [1, 2, 3]], [1.0], [1.0, 2.0], [0.5, 1.0])
    theirs = Account([[1, 2, 3], [1, 9, 3]], [3.0], [2.0, 4.0], [2.0, 4.0])
    result = compare(ours, theirs)
    assert (result.speed.median, result.cpu_speed.median, result.prefill_speed.median) == (2.0, 4.0, 3.0)
    assert (result.same_tokens, result.tokens) == (1, 3)
    assert common_prefix([], [1]) == 0


def test_the_table_shows_values_goals_and_verdicts() -> None:
    rows = (at_least("speed", 1.2, "1.20", 1.0), at_most("size", 1.2, "1.20", 1.1), Row("note", "as it is"))
    assert [row.is_met for row in rows] == [True, False, None]
    facts, found = machine(), [Section("first", rows)]
    with redirect_stdout(io.StringIO()) as out:
        print_report(facts, found)
    text = out.getvalue()
    assert "yes" in text
    assert "NO" in text
    assert ">= 1" in text
    assert "as it is" in text
    assert str(facts["onnxruntime"]) in text
    data = json.loads(json.dumps(to_json(facts, found)))
    assert data["sections"][0]["rows"][1] == {
        "what": "size",
        "shown": "1.20",
        "value": 1.2,
        "goal": "<= 1.1",
        "is_met": False,
    }


def test_a_model_that_is_there_is_not_made_again(models: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("something was made"))
    assert models.bundle(None).name == "uncut"
    assert models.bundle(EXIT_LAYER).name == "exit-3"
    assert stored_bytes(models.bundle(EXIT_LAYER, DRAFT_VOCAB)) > stored_bytes(models.bundle(EXIT_LAYER))


def test_a_worker_decodes_in_chunks_what_it_decodes_at_once(models: Artifacts) -> None:
    with bundle_worker(models.bundle(EXIT_LAYER), 1) as worker:
        first = worker.ask("start", prompt=TEXT, tokens=9)
        chunks = [worker.ask("chunk", count=4) for _ in range(2)]
        at_once = worker.ask("decode", prompt=TEXT, tokens=9)
        drafted = worker.ask("decode", prompt=TEXT, tokens=9, draft=3)
        memory = worker.ask("memory")
    assert first["tokens"] + chunks[0]["tokens"] + chunks[1]["tokens"] == at_once["tokens"] == drafted["tokens"]
    assert all(0 < chunk["run_s"] < chunk["elapsed_s"] for chunk in chunks)
    assert memory["peak_bytes"] >= memory["rss_bytes"] > 0


def test_a_worker_that_fails_says_why(models: Artifacts) -> None:
    with pytest.raises(ShortstackError, match="does not exist"):
        bundle_worker(models.folder / "absent", 1)
    with pytest.raises(ShortstackError, match="ended with code 3"):
        WorkerProcess([sys.executable, "-c", "raise SystemExit(3)"])
    with bundle_worker(models.bundle(None), 1) as worker, pytest.raises(ShortstackError, match="has none"):
        worker.ask("costs", prompt=TEXT, rows=[1], repeats=1)


def test_every_part_is_measured_without_rivals(models: Artifacts, small: Settings) -> None:
    disk = disk_section(models, EXIT_LAYER, (), small)
    assert [row.what for row in disk.rows] == [
        "uncut, MB",
        "full exit head, MB",
        "full exit head / uncut",
        "exit head of 64, MB",
        "exit head of 64 / uncut",
    ]
    memory = memory_section(models, EXIT_LAYER, TEXT, (), small)
    assert len(memory.rows) == 1 + 2 * 2 * len(small.draft_vocabs)
    assert all(row.value for row in memory.rows)
    load = load_section(models, EXIT_LAYER, TEXT, (), small)
    assert [row.what for row in load.rows] == ["load, ms", "load and first token, ms"]
    assert load.rows[0].value < load.rows[1].value
    for vocab in small.draft_vocabs:
        drafting = drafting_section(models.bundle(EXIT_LAYER, vocab), vocab, [TEXT], 1, small)
        shown = {row.what: row for row in drafting.rows}
        assert shown["output equal to plain"].is_met
        assert "predicted" in shown["speed over plain, k = 3"].shown
        assert "predicted" not in shown["speed over plain, adaptive"].shown
