"""The benchmark by category compares every way to draft with plain decoding, and says where they differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from shortstack.graphs.errors import RequestError
from shortstack.runtime.decode.step import Stats
from shortstack.runtime.model import load
from shortstack.samples.bench import categories
from shortstack.samples.bench.artifacts import Artifacts
from shortstack.samples.bench.categories import Way, geometric_mean, main, measure, read_questions

QUESTIONS = [
    {"category": "math", "turns": ["One and one?", "Sure?"]},
    {"category": "summary", "prompt": "One two three four one two three four one two"},
    {"category": "math", "prompt": "Three and four?"},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    return path


def test_questions_are_first_turns_or_prompts_and_may_be_thinned_out(data: Path) -> None:
    assert [tuple(each) for each in read_questions(data, None, 10)] == [
        ("math", "e and one?"),
        ("summary", "ur one two"),
        ("math", " and four?"),
    ]
    assert [each.text for each in read_questions(data, 2, 100)] == [QUESTIONS[0]["turns"][0], QUESTIONS[1]["prompt"]]
    data.write_text('{"turns": []}', encoding="utf-8")
    with pytest.raises(RequestError, match="line 1 asks nothing"):
        read_questions(data, None, 10)


def test_every_way_decodes_every_question_as_plain_decoding_does(models: Artifacts, data: Path) -> None:
    with load(models.folder / "exit-3", threads=1) as model:
        said: list[str] = []
        found = measure(model, read_questions(data, None, 100), ["exit", "lookup", "auto"], 12, said.append)
    assert len(said) == 3
    assert list(found) == ["plain", "exit", "lookup", "auto"]
    for ways in found.values():
        assert {category: len(way.speeds) for category, way in ways.items()} == {"math": 2, "summary": 1}
        assert {way.tokens for way in ways.values()} == {22, 11}
        assert not any(way.differing for way in ways.values())
    assert found["plain"]["math"].speeds == [1.0, 1.0]


def test_acceptance_is_reported_by_place_among_the_rounds_that_reached_it() -> None:
    way = Way()
    way.add(8, 2.0, Stats(drafted=5, accepted=3, rounds=2, drafted_at=[2, 2, 1], accepted_at=[2, 1, 0]))
    way.add(4, 1.0, Stats(drafted=1, accepted=0, rounds=1, drafted_at=[1], accepted_at=[0]))
    row = way.to_json()
    assert row["accepted_of_reached"] == [0.6667, 0.5, 0.0]
    assert (row["tokens_per_s"], row["acceptance"], row["tokens_per_round"]) == (4.0, 0.5, 2.0)


def test_the_mean_over_categories_is_geometric_and_of_medians() -> None:
    assert geometric_mean({"a": Way([1.0, 2.0, 9.0]), "b": Way([8.0]), "c": Way([])}) == pytest.approx(4.0)


def test_an_answer_that_differs_is_counted_and_ends_with_1(
    models: Artifacts, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [str(models.folder / "exit-3"), "--data", str(data), "-n", "6", "--threads", "1"]
    done = CliRunner().invoke(main, [*arguments, "--draft", "exit"])
    assert done.exit_code == 0, done.output
    assert "geometric mean over 2 categories" in done.output
    real = categories.Model.generate

    def other(self: categories.Model, prompt: list[int], **options: object) -> object:
        changed = options["strategy"] == categories.WAYS["exit"]
        return real(self, [*prompt[1:], 5] if changed else prompt, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(categories.Model, "generate", other)
    done = CliRunner().invoke(main, [*arguments, "--draft", "exit", "--json"])
    assert done.exit_code == 1
    ways = json.loads(done.stdout)["ways"]
    assert sum(row["differing"] for row in ways["exit"].values()) > 0
