"""The showcase counts what happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from helpers.tiny_models import SPECULATOR, TinyBundles
from shortstack.graphs.errors import RequestError
from shortstack.runtime import Model, load
from shortstack.samples.showcase import answers


@pytest.fixture(scope="module")
def bundle(tiny_bundles: TinyBundles) -> Path:
    return tiny_bundles.bundle(SPECULATOR, 3)


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return load(bundle)


@pytest.fixture(scope="module")
def data(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of which the first two have the model's own answer, the third another one."""
    file = tmp_path_factory.mktemp("answers") / "rows.jsonl"
    rows = []
    for say in ("the red stone", "a river", "some cloud"):
        text = model.generate(f"{say}\n", max_new_tokens=8).text.strip()
        rows.append({"say": say, "said": "something else" if say == "some cloud" else text})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_answers_are_counted(bundle: Path, data: Path) -> None:
    line = [str(bundle), "--data", str(data), "--prompt", "{say}\\n", "--answer", "{said}", "--draft", "2"]
    line += ["--threshold", "1.0", "--max-new-tokens", "8", "--json"]
    result = CliRunner().invoke(answers.answers, line, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    ways = {way["name"]: way for way in json.loads(result.stdout)["ways"]}
    assert list(ways) == ["plain", "draft 2", "adaptive, at most 2", "exit at p >= 1.0"]
    for way in ways.values():
        assert (way["right"], way["same"]) == (2, 3)
        assert way["tokens"] == ways["plain"]["tokens"]
    assert ways["draft 2"]["drafted"] > 0
    assert ways["exit at p >= 1.0"]["drafted"] == 0
    assert ways["plain"]["speed_up"] == 1.0


def test_a_bundle_without_exits_is_refused(tiny_bundles: TinyBundles, data: Path) -> None:
    line = [str(tiny_bundles.bundle(SPECULATOR)), "--data", str(data), "--prompt", "{say}", "--answer", "{said}"]
    result = CliRunner().invoke(answers.answers, line)
    assert isinstance(result.exception, RequestError)
    assert "--exit-layer" in str(result.exception)


def test_rows_that_do_not_fit_are_refused(bundle: Path, data: Path) -> None:
    result = CliRunner().invoke(answers.answers, [str(bundle), "--data", str(data), "--prompt", "{nothing}"])
    assert isinstance(result.exception, RequestError)
    assert "--prompt" in str(result.exception)


def test_a_known_error_is_one_line_and_exit_code_2(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["answers", str(bundle), "--data", "nowhere.jsonl"])
    with pytest.raises(SystemExit) as ended:
        answers.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: nowhere.jsonl")
    assert error.count("\n") == 1
