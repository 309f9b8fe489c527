"""`shortstack batch`: files of prompts in, files of answers out, and what happens when it stops in between."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers.quantized import QuantizedBundles, preset
from helpers.tiny_models import SPECULATOR, TinyBundles
from shortstack.__main__ import run
from shortstack.graphs.precision import BlockFormat
from shortstack.graphs.texts import PROMPTS_FILE
from shortstack.graphs.texts.prompts import prompts
from shortstack.runtime import ExitEarly, ExitPolicy, Model, Request, SamplingParams, load, parse_criterion
from shortstack.runtime.batch.answers import open_answers
from shortstack.runtime.batch.lines import read_lines

PROMPTS = [
    {"prompt": "one two"},
    {"id": "own", "text": "Once upon", "max_new_tokens": 5, "ignore_eos": True},
    {"messages": [{"role": "user", "content": "hello"}], "exits": "top_prob >= 0.3"},
    {"id": 7, "prompt": "again", "temperature": 0.8, "seed": 3},
    {"prompt": "one two three", "strategy": "self-speculative"},
]


@pytest.fixture(scope="module")
def bundle(tiny_bundles: TinyBundles, quantized: QuantizedBundles) -> Path:
    return quantized(tiny_bundles.bundle(SPECULATOR, 1, 3), preset(BlockFormat(4), "int8"))


@pytest.fixture(scope="module")
def one(bundle: Path) -> Iterator[Model]:
    with load(bundle) as model:
        yield model


def write_lines(path: Path, lines: Sequence[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def answers(path: Path) -> dict[str, Any]:
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    by_id = {entry.get("custom_id", entry["id"]): entry for entry in found}
    assert len(by_id) == len(found), "an answer was written twice"
    return by_id


def command(bundle: Path, prompts: Path, out: Path, *options: str) -> int:
    return run(["batch", str(bundle), str(prompts), "-o", str(out), "-n", "8", *options])


@pytest.mark.parametrize("slots", ["1", "3", None])
def test_every_line_gets_the_answer_of_generate(bundle: Path, one: Model, tmp_path: Path, slots: str | None) -> None:
    out = tmp_path / "out.jsonl"
    assert (
        command(bundle, write_lines(tmp_path / "in.jsonl", PROMPTS), out, *(("--slots", slots) if slots else ())) == 0
    )
    found = answers(out)
    assert found.keys() == {"1", "own", "3", "7", "5"}
    chat = one.generate([{"role": "user", "content": "one two"}], max_new_tokens=8)
    assert (found["1"]["text"], found["1"]["tokens"]) == (chat.text, list(chat.tokens))
    assert found["own"]["tokens"] == list(one.generate("Once upon", max_new_tokens=5, ignore_eos=True).tokens)
    hello = [{"role": "user", "content": "hello"}]
    assert found["3"]["tokens"] == list(one.generate(hello, max_new_tokens=8, exits="top_prob >= 0.3").tokens)
    again = [{"role": "user", "content": "again"}]
    assert found["7"]["tokens"] == list(one.generate(again, max_new_tokens=8, temperature=0.8, seed=3).tokens)


def test_a_batch_goes_on_where_it_stopped(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, out = write_lines(tmp_path / "in.jsonl", PROMPTS), tmp_path / "out.jsonl"
    assert command(bundle, prompts, out) == 0
    whole = answers(out)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:2]) + lines[2][:9])  # killed while the third answer was being written
    assert command(bundle, prompts, out) == 0
    assert answers(out) == whole
    assert "2 of 5 answers are there already" in capsys.readouterr().err
    assert command(bundle, prompts, out) == 0
    assert answers(out) == whole


def test_openai_lines_get_openai_answers(bundle: Path, one: Model, tmp_path: Path) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 6, "temperature": 0}
    early = {**body, "shortstack": {"exits": "always"}}
    lines = [
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {**body, "user": "x"}},
        {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Once", "max_tokens": 4}},
        {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": early},
    ]
    out = tmp_path / "out.jsonl"
    assert command(bundle, write_lines(tmp_path / "in.jsonl", lines), out) == 0
    found = answers(out)
    chat = one.generate([{"role": "user", "content": "hello"}], max_new_tokens=6)
    response = found["a"]["response"]
    assert (found["a"]["error"], response["status_code"]) == (None, 200)
    assert response["body"]["choices"][0]["message"] == {"role": "assistant", "content": chat.text}
    assert response["body"]["usage"]["completion_tokens"] == len(chat.tokens)
    assert found["b"]["response"]["body"]["choices"][0]["text"] == one.generate("Once", max_new_tokens=4).text
    assert found["c"]["response"]["body"]["choices"][0]["finish_reason"] in ("stop", "length")


def test_a_prompt_that_is_too_long_fails_alone_and_is_tried_again(
    bundle: Path, one: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    length = one.bundle.manifest.max_length
    prompts = write_lines(
        tmp_path / "in.jsonl", [{"id": "long", "text": "a b " * length}, {"id": "short", "text": "a"}]
    )
    out = tmp_path / "out.jsonl"
    assert command(bundle, prompts, out) == 2
    assert "1 failed" in capsys.readouterr().out
    found = answers(out)
    assert "too long" in found["long"]["error"]
    assert "text" in found["short"]
    write_lines(prompts, [{"id": "long", "text": "a b"}, {"id": "short", "text": "a"}])
    assert command(bundle, prompts, out) == 0
    assert "text" in answers(out)["long"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[1]", "line 1"),
        ("{", "line 1"),
        ('{"prompt": 3}', "prompt"),
        ('{"text": "a", "prompt": "b"}', "prompt and text"),
        ('{"text": "a", "temprature": 1}', "temprature"),
        ('{"text": "a", "note": 1}', "into metadata"),
        ('{"text": "a", "temperature": -1}', "temperature"),
        ('{"text": "a", "exit_layer": 2}', "exit_layer"),
        ('{"text": "a", "id": []}', "id"),
        ('{"custom_id": "a", "url": "/v1/embeddings", "body": {}}', "/v1/embeddings"),
        ('{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "a", "n": 2}}', "body.n"),
        ('{"text": "a", "id": "x"}\n{"text": "b", "id": "x"}', "line 2"),
        ("", "no prompt"),
    ],
)
def test_a_wrong_line_is_refused_by_name_before_any_runs(
    bundle: Path, tmp_path: Path, refused: Any, line: str, said: str
) -> None:
    (tmp_path / "in.jsonl").write_text(f"{line}\n", encoding="utf-8")
    refused(["batch", str(bundle), str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")], said)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_file_of_something_else_is_not_taken_for_answers(bundle: Path, tmp_path: Path, refused: Any) -> None:
    prompts = write_lines(tmp_path / "in.jsonl", PROMPTS)
    other = write_lines(tmp_path / "other.jsonl", [{"a": 1}])
    refused(["batch", str(bundle), str(prompts), "-o", str(other)], "is not an answer")
    refused(["batch", str(bundle), str(prompts), "-o", str(prompts)], "the file of the prompts")
    assert json.loads(other.read_text()) == {"a": 1}


def test_two_batches_never_write_one_file(bundle: Path, tmp_path: Path, refused: Any) -> None:
    prompts, out = write_lines(tmp_path / "in.jsonl", PROMPTS), tmp_path / "out.jsonl"
    with open_answers(out, overwrite=False):
        refused(["batch", str(bundle), str(prompts), "-o", str(out)], "another batch is writing")
    assert command(bundle, prompts, out) == 0


def test_answers_to_other_prompts_are_not_taken_for_these(bundle: Path, tmp_path: Path, refused: Any) -> None:
    prompts, out = write_lines(tmp_path / "in.jsonl", PROMPTS[:1]), tmp_path / "out.jsonl"
    assert command(bundle, prompts, out) == 0
    before = out.read_bytes()
    write_lines(prompts, [{"prompt": "another one"}])
    refused(["batch", str(bundle), str(prompts), "-o", str(out), "-n", "8"], "to another prompt", "--overwrite")
    assert out.read_bytes() == before
    assert command(bundle, prompts, out, "--overwrite") == 0
    assert out.read_bytes() != before


def test_what_cannot_run_leaves_the_answers_before(bundle: Path, tmp_path: Path) -> None:
    prompts, out = write_lines(tmp_path / "in.jsonl", PROMPTS), tmp_path / "out.jsonl"
    assert command(bundle, prompts, out) == 0
    before = out.read_bytes()
    write_lines(prompts, [{"prompt": 3}])
    assert command(bundle, prompts, out, "--overwrite") == 2
    assert out.read_bytes() == before


@pytest.mark.parametrize("content", ["My notes, one line", "My notes\n", '{"id": "a", "error": "x", "more": 1}\n'])
def test_a_file_of_somebody_else_stays_as_it_is(bundle: Path, tmp_path: Path, refused: Any, content: str) -> None:
    prompts, out = write_lines(tmp_path / "in.jsonl", PROMPTS), tmp_path / "notes.txt"
    out.write_text(content)
    refused(["batch", str(bundle), str(prompts), "-o", str(out)], "notes.txt")
    assert out.read_text() == content


def test_a_line_changes_one_option_of_the_command_and_keeps_the_others(bundle: Path, tmp_path: Path) -> None:
    defaults = Request(
        "any",
        ExitEarly(ExitPolicy(parse_criterion("always"), verify="exact")),
        SamplingParams(temperature=0.8, top_p=0.9, seed=1),
    )
    lines = [
        {"text": "a", "temperature": 0.5},
        {"text": "a", "seed": 3},
        {"text": "a", "temperature": 0},
        {"text": "a", "exits": "top_prob >= 0.5"},
        {"custom_id": "b", "url": "/v1/completions", "body": {"prompt": ["a"], "seed": 4}},
    ]
    with load(bundle) as model:
        found = read_lines(write_lines(tmp_path / "in.jsonl", lines), defaults, model.tokenizer)
    sampling = [line.request.sampling for line in found]
    assert sampling[0] == SamplingParams(temperature=0.5, top_p=0.9, seed=1)
    assert sampling[1] == SamplingParams(temperature=0.8, top_p=0.9, seed=3)
    assert sampling[2] == SamplingParams()
    assert sampling[4] == SamplingParams(temperature=0.8, top_p=0.9, seed=4)
    strategy = found[3].request.strategy
    assert isinstance(strategy, ExitEarly)
    assert (strategy.policy.verify, str(strategy.policy.criterion)) == ("exact", "top_prob >= 0.5")


def test_the_prompts_that_are_shipped_are_a_file_of_prompts(bundle: Path) -> None:
    with load(bundle) as model:
        found = read_lines(PROMPTS_FILE, Request("any"), model.tokenizer)
    assert len(found) == len(prompts())


def test_notes_of_the_user_change_no_request(bundle: Path, tmp_path: Path) -> None:
    lines = [{"id": "a", "text": "a"}, {"id": "b", "text": "a", "kind": "story", "metadata": {"page": 3}}]
    with load(bundle) as model:
        first, second = read_lines(write_lines(tmp_path / "in.jsonl", lines), Request("any"), model.tokenizer)
    assert first.request == second.request


@pytest.mark.parametrize("option", ["-e", "-k"])
def test_a_batch_offers_no_comparison(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert command(bundle, write_lines(tmp_path / "in.jsonl", PROMPTS), tmp_path / "out.jsonl", option, "1") == 2
    said = capsys.readouterr().err
    assert "--strategy self-speculative" in said
    assert "--compare" not in said
