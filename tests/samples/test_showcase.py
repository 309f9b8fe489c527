"""Plain early exit is exact in its caches, and the showcase counts what happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from helpers.tiny_models import SPECULATOR, TinyBundles
from shortstack.runtime import Model, load
from shortstack.runtime.teach import teach
from shortstack.samples.showcase import answers
from shortstack.samples.showcase.early_exit import early_exit

PROMPT = [5, 90, 33, 7, 120]
TOKENS = 40


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


def test_above_one_nothing_exits(model: Model) -> None:
    plain = model.generate(PROMPT, max_new_tokens=TOKENS, ignore_eos=True).tokens
    found = early_exit(model.exclusive_stack(3), PROMPT, 1.1, (), TOKENS)
    assert found.tokens == plain
    assert found.exited == 0


@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_every_token_is_what_its_head_says_of_the_text_so_far(model: Model, threshold: float) -> None:
    stack = model.exclusive_stack(3)
    found = early_exit(stack, PROMPT, threshold, (), TOKENS)
    assert len(found.tokens) == TOKENS
    assert 0 < found.exited < TOKENS
    heads = teach(model, [*PROMPT, *found.tokens]).heads
    by_exit = heads[3][len(PROMPT) - 1 : -1].argmax(-1)
    by_all = heads[SPECULATOR.layers][len(PROMPT) - 1 : -1].argmax(-1)
    assert all(token in (low, high) for token, low, high in zip(found.tokens, by_exit, by_all, strict=True))
    differ = [token == low for token, low, high in zip(found.tokens, by_exit, by_all, strict=True) if low != high]
    assert any(differ)  # some left early although the whole model would have said something else
    if threshold:
        assert not all(differ)


def test_it_stops_at_the_end_of_a_text(model: Model) -> None:
    whole = early_exit(model.exclusive_stack(3), PROMPT, 0.1, (), TOKENS).tokens
    end = whole[TOKENS // 2]
    stopped = early_exit(model.exclusive_stack(3), PROMPT, 0.1, (end,), TOKENS).tokens
    assert stopped == whole[: whole.index(end) + 1]


def test_answers_are_counted(bundle: Path, data: Path) -> None:
    line = [str(bundle), "--data", str(data), "--prompt", "{say}\\n", "--answer", "{said}", "--draft", "2"]
    line += ["--threshold", "1.5", "--max-new-tokens", "8", "--json"]
    result = CliRunner().invoke(answers.main, line, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    ways = {way["name"]: way for way in json.loads(result.stdout)["ways"]}
    assert list(ways) == ["plain", "draft 2", "adaptive, at most 2", "exit at p >= 1.5"]
    for way in ways.values():
        assert (way["right"], way["same"]) == (2, 3)
        assert way["tokens"] == ways["plain"]["tokens"]
    assert ways["draft 2"]["drafted"] > 0
    assert ways["exit at p >= 1.5"]["drafted"] == 0
    assert ways["plain"]["speed_up"] == 1.0


def test_a_bundle_without_exits_is_refused(tiny_bundles: TinyBundles, data: Path) -> None:
    line = [str(tiny_bundles.bundle(SPECULATOR)), "--data", str(data), "--prompt", "{say}", "--answer", "{said}"]
    result = CliRunner().invoke(answers.main, line)
    assert result.exit_code == 2
    assert "--exit-layer" in result.stderr


def test_rows_that_do_not_fit_are_refused(bundle: Path, data: Path) -> None:
    result = CliRunner().invoke(answers.main, [str(bundle), "--data", str(data), "--prompt", "{nothing}"])
    assert result.exit_code == 2
    assert "--prompt" in result.stderr
