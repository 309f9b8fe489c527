"""The model's own answers: what a row is, and that a run which was stopped ends with the file of one that was not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from helpers.progress_lines import without_progress
from helpers.quantized import QuantizedBundles, preset
from helpers.tiny_models import SPECULATOR, TURN_END, TinyBundles
from shortstack.graphs.errors import RequestError, ShortstackError
from shortstack.graphs.precision import BlockFormat
from shortstack.runtime import Model, load
from shortstack.samples.recipes import self_data_rows
from shortstack.samples.recipes.self_data import Summary, open_model, self_data, write_rows
from shortstack.samples.recipes.self_data_file import RowFile, read_prompts
from shortstack.samples.recipes.self_data_rows import Writer, empty_user_turn

# Few enough tokens that a random model ends a turn now and then, and no bytes, so that what it writes is text.
ASKS = replace(SPECULATOR, name="asks-2", vocab=131)
PROMPTS = ("Why is the sky blue?", "Name three rivers.", "Count to four.")
OPTIONS: dict[str, Any] = {"prompts": PROMPTS, "self_prompted": 3, "max_new_tokens": 12}
SETTINGS = {"seed": 0}


@pytest.fixture(scope="module")
def bundle(tiny_bundles: TinyBundles) -> Path:
    return tiny_bundles.bundle(ASKS, 3)


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return load(bundle)


@pytest.fixture(scope="module")
def whole(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run with OPTIONS that nothing stops writes, its settings beside it; not to be changed."""
    out = tmp_path_factory.mktemp("whole") / "rows.jsonl"
    write_rows(model, out, **OPTIONS)
    return out


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_an_answer_is_the_greedy_one_in_the_chat_template(model: Model, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    summary = write_rows(model, out, PROMPTS, max_new_tokens=12)
    rows = rows_of(out)
    assert (summary.rows, summary.made, summary.skipped) == (3, 3, 0)
    assert summary.answer_tokens == summary.decoded_tokens == sum(len(row["o"]) for row in rows)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        plain = model.generate([{"role": "user", "content": prompt}], max_new_tokens=12, strategy="plain")
        assert row == {"p": model.encode([{"role": "user", "content": prompt}]), "o": list(plain.tokens), "k": "prompt"}


def test_without_an_exit_the_answers_are_the_same(tiny_bundles: TinyBundles, whole: Path, tmp_path: Path) -> None:
    write_rows(load(tiny_bundles.bundle(ASKS)), tmp_path / "plain.jsonl", **OPTIONS)
    assert whole.read_bytes() == (tmp_path / "plain.jsonl").read_bytes()


def test_several_rows_at_once_are_the_same_rows(
    tiny_bundles: TinyBundles, quantized: QuantizedBundles, tmp_path: Path
) -> None:
    bundle = quantized(tiny_bundles.bundle(ASKS, 2), preset(BlockFormat(8), "int8"))
    for slots in (1, 3):
        with load(bundle, slots=slots) as model:
            write_rows(model, tmp_path / f"{slots}.jsonl", **OPTIONS)
    assert (tmp_path / "3.jsonl").read_bytes() == (tmp_path / "1.jsonl").read_bytes()


def test_the_model_asks_itself_a_turn_that_ends(model: Model) -> None:
    tokenizer = model.tokenizer
    writer = Writer(model, max_new_tokens=12, max_prompt_tokens=200)
    head, end = empty_user_turn(tokenizer)
    assert tokenizer.decode(head, skip_special_tokens=False) == "<|im_start|>user\n"
    assert tokenizer.decode([end], skip_special_tokens=False) == TURN_END
    rows = [writer.ask_and_answer(index) for index in range(4)]
    assert len({row.prompt for row in rows}) == 4
    for row in rows:
        text = tokenizer.decode(row.prompt, skip_special_tokens=False)
        question = text.removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n<|im_start|>assistant\n")
        assert question.strip() == question != ""
        assert row.prompt == tuple(model.encode([{"role": "user", "content": question}]))
        assert row.answer == model.generate(row.prompt, max_new_tokens=12).tokens
        assert row.tokens > len(row.answer)


def test_a_question_depends_on_its_seed_and_number_only(model: Model) -> None:
    def questions(seed: int, *indices: int) -> list[tuple[int, ...]]:
        writer = Writer(model, max_new_tokens=1, max_prompt_tokens=200, seed=seed)
        return [writer.ask_and_answer(index).prompt for index in indices]

    assert questions(0, 0, 1, 2) == questions(0, 2, 0, 1)[1:] + questions(0, 2)
    assert questions(0, 0) != questions(1, 0)


@pytest.mark.parametrize(
    ("turn", "is_kept"),
    [
        ("hi there<|im_end|>", True),
        ("<|im_end|>", False),
        (" \n<|im_end|>", False),
        ("hi there", False),
        ("hi<|im_start|>there<|im_end|>", False),
        ("hi<|end|>", False),
        ("a" * 500 + "<|im_end|>", False),
    ],
)
def test_turns_that_no_user_would_write_are_thrown_away(model: Model, turn: str, is_kept: bool) -> None:
    writer = Writer(model, max_new_tokens=1, max_prompt_tokens=200)
    _, end = empty_user_turn(model.tokenizer)
    prompt = writer._prompt_of(model.tokenizer.encode(turn), end)
    assert (prompt is not None) == is_kept


def test_a_model_that_writes_no_question_ends_with_an_error(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_data_rows, "MAX_QUESTION_TOKENS", 1)
    monkeypatch.setattr(self_data_rows, "MAX_ATTEMPTS", 3)
    with pytest.raises(RequestError, match=r"asks itself nothing: 3 sampled user turns.*Give --prompts FILE"):
        Writer(model, max_new_tokens=1, max_prompt_tokens=200).ask_and_answer(0)


@pytest.mark.parametrize("template", ["{{ messages[0]['content'] }}", "x{{ messages|length }}y"])
def test_a_template_without_a_place_for_the_user_is_refused(
    model: Model, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    from jinja2 import Template

    monkeypatch.setattr(model.tokenizer, "_compiled_template", Template(template))
    with pytest.raises(RequestError, match="does not set a user's words between two marks"):
        empty_user_turn(model.tokenizer)


# --- going on ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "tear"), [(0, 0), (0, 25), (1, 0), (2, 1), (3, 0), (4, 25), (6, 0), (6, 1)])
def test_a_stopped_run_continues_to_the_same_file(
    model: Model, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, tear: int
) -> None:
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len(lines) == 6

    out = tmp_path / "stopped.jsonl"
    monkeypatch.setattr(RowFile, "append", stopping_after(rows, RowFile.append))
    if rows < len(lines):
        with pytest.raises(KeyboardInterrupt):
            write_rows(model, out, **OPTIONS)
    else:
        write_rows(model, out, **OPTIONS)
    monkeypatch.undo()
    assert out.read_bytes() == b"".join(lines[:rows])
    torn = lines[min(rows, 5)][:-tear] if tear else b""  # a row without its end, or with nothing but its end missing
    with out.open("ab") as stream:
        stream.write(torn)

    summary = write_rows(load(model.bundle.folder), out, **OPTIONS)
    assert out.read_bytes() == whole.read_bytes()
    assert (summary.rows, summary.made) == (6, 6 - rows)


def stopping_after(rows: int, append: Callable[..., None]) -> Callable[..., None]:
    def stopping(self: RowFile, row: dict[str, Any]) -> None:
        if self.rows == rows:
            raise KeyboardInterrupt
        append(self, row)

    return stopping


def test_a_killed_process_loses_one_row_at_most(bundle: Path, model: Model, tmp_path: Path) -> None:
    out = tmp_path / "killed.jsonl"
    options = ["--self-prompted", "60", "--max-new-tokens", "200"]
    command = [sys.executable, "-P", "-m", "shortstack.samples.recipes.self_data", str(bundle), str(out), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while (not out.exists() or out.read_bytes().count(b"\n") < 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    before = out.read_bytes().splitlines(keepends=True)
    complete = [line for line in before if line.endswith(b"\n")]
    assert 2 <= len(complete) < 60
    wanted = len(complete) + 2
    summary = write_rows(model, out, self_prompted=wanted, max_new_tokens=200)
    assert (summary.rows, summary.made) == (wanted, 2)
    assert out.read_bytes().startswith(b"".join(complete))
    assert all(row["k"] == "self" for row in rows_of(out))


def test_more_questions_may_be_asked_for_later(model: Model, whole: Path, tmp_path: Path) -> None:
    write_rows(model, tmp_path / "grown.jsonl", PROMPTS, 1, max_new_tokens=12)
    write_rows(model, tmp_path / "grown.jsonl", **OPTIONS)
    assert (tmp_path / "grown.jsonl").read_bytes() == whole.read_bytes()
    again = write_rows(model, tmp_path / "grown.jsonl", **OPTIONS)
    assert (again.rows, again.made) == (6, 0)
    assert "nothing left to do" in again.line()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"max_new_tokens": 13}, "max_new_tokens was 12 and is 13"),
        ({"max_prompt_tokens": 99}, "max_prompt_tokens was 1024 and is 99"),
        ({"seed": 5}, "seed was 0 and is 5"),
        ({"prompts": PROMPTS[:2]}, "prompts_sha256 was"),
        ({"prompts": PROMPTS[::-1], "seed": 3}, r"prompts_sha256 was .*; seed was 0 and is 3"),
    ],
)
def test_settings_that_differ_are_refused_and_named(
    model: Model, whole: Path, tmp_path: Path, changed: dict[str, Any], says: str
) -> None:
    out = Path(shutil.copytree(whole.parent, tmp_path / "begun")) / whole.name
    before = out.read_bytes()
    with pytest.raises(RequestError, match=rf"begun with other settings: .*{says}.*begin again with --overwrite"):
        write_rows(model, out, **(OPTIONS | changed))
    assert out.read_bytes() == before
    assert write_rows(model, out, **(OPTIONS | changed), overwrite=True).made > 0


def test_another_model_is_another_setting(tiny_bundles: TinyBundles, model: Model, tmp_path: Path) -> None:
    write_rows(model, tmp_path / "rows.jsonl", PROMPTS, max_new_tokens=3)
    other = load(tiny_bundles.bundle(ASKS, dtype="float16"))
    with pytest.raises(RequestError, match="model_sha256 was"):
        write_rows(other, tmp_path / "rows.jsonl", PROMPTS, max_new_tokens=3)


def test_a_file_that_was_made_elsewhere_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text("somebody's text without an end")
    with pytest.raises(RequestError, match=r"has no rows\.jsonl\.settings\.json next to it, so it was not made here"):
        RowFile(out, SETTINGS)
    assert out.read_text() == "somebody's text without an end"


@pytest.mark.parametrize("damage", ["{\n", "7\n", '{"p": [1]}\n', "\n", "[" * 200_000 + "\n"])
def test_a_damaged_row_is_named(tmp_path: Path, damage: str) -> None:
    out = tmp_path / "rows.jsonl"
    with RowFile(out, SETTINGS) as file:
        file.append({"p": [1], "o": [2], "k": "self"})
    with out.open("a") as stream:
        stream.write(damage)
    with pytest.raises(RequestError, match=r"rows\.jsonl, line 2 is damaged"):
        RowFile(out, SETTINGS)


@pytest.mark.parametrize("damage", ["", "{\n", "7", "[" * 200_000])
def test_damaged_settings_are_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / "rows.jsonl.settings.json").write_text(damage)
    with pytest.raises(RequestError, match=r"settings\.json is damaged"):
        RowFile(tmp_path / "rows.jsonl", SETTINGS)


# --- prompts and the command ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "field", "expected"),
    [
        ("one\n\n  two \n", None, ["one", "two"]),
        ('{"question": "q1"}\n\n{"prompt": "p2", "question": "q2"}\n', None, ["q1", "p2"]),
        ('{"turns": ["t1", "t2"]}', None, ["t1"]),
        ('{"turns": ["t1"]}', "turns[0]", ["t1"]),
        ('{"utterance": "u", "parse": "[x]"}', None, ["u"]),
        ('{"utterance": "u", "parse": "[x]"}', "parse", ["[x]"]),
    ],
)
def test_prompts_are_lines_or_fields(tmp_path: Path, text: str, field: str | None, expected: list[str]) -> None:
    file = tmp_path / "prompts"
    file.write_text(text, encoding="utf-8")
    assert read_prompts(file, field) == expected


@pytest.mark.parametrize(
    ("content", "field", "says"),
    [
        (b"", None, "holds no prompt. Write one prompt per line"),
        (b"\xff\xfe", None, "cannot be read"),
        (b"plain", "prompt", "is plain text"),
        (b'{"prompt": "a"}\n{"prompt": ', None, "line 2 is not JSON"),
        (b'{"prompt": "a"}\n{"x": 1}', None, "line 2 holds no prompt: expected text in prompt or question or turns"),
        (b'{"prompt": "a"}', "question", "line 1 holds no prompt: expected text in question"),
        (b'{"prompt": []}', None, "line 1 holds no prompt"),
        (b'{"prompt": "a"}\n[1]', None, "line 2 holds no prompt"),
        (b'{"prompt": " "}', None, "line 1 holds no prompt"),
    ],
)
def test_prompts_that_cannot_be_read_are_named(tmp_path: Path, content: bytes, field: str | None, says: str) -> None:
    file = tmp_path / "prompts"
    file.write_bytes(content)
    with pytest.raises(RequestError) as raised:
        read_prompts(file, field)
    assert says in str(raised.value)


def test_prompts_that_are_too_long_are_counted(model: Model, tmp_path: Path) -> None:
    prompts = ["hi", "a" * 400, "b" * 2000]
    summary = write_rows(model, tmp_path / "rows.jsonl", prompts, max_new_tokens=2, max_prompt_tokens=50)
    assert (summary.rows, summary.skipped) == (1, 2)
    assert "too long: 2" in summary.line()
    with pytest.raises(RequestError, match="all 2 are too long"):
        write_rows(model, tmp_path / "none.jsonl", prompts[1:], max_prompt_tokens=50)
    assert not (tmp_path / "none.jsonl").exists()


def test_a_checkpoint_is_exported_first(tiny_bundles: TinyBundles, whole: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"question": prompt}) for prompt in PROMPTS))
    checkpoint = tiny_bundles.checkpoint(ASKS)
    out = tmp_path / "rows.jsonl"
    arguments = [str(checkpoint), str(out), "--prompts", str(prompts), "--self-prompted", "3", "-n", "12", "--json"]
    done = CliRunner().invoke(self_data, arguments, catch_exceptions=False)
    summary = json.loads(done.stdout)
    assert set(summary) == {*Summary.__dataclass_fields__, "tokens_per_s"}
    assert (summary["rows"], summary["made"], summary["out"]) == (6, 6, str(out))
    assert without_progress(done.stderr) == ""
    assert out.read_bytes() == whole.read_bytes()


def test_the_bundle_of_a_checkpoint_goes_away(tiny_bundles: TinyBundles) -> None:
    with open_model(str(tiny_bundles.checkpoint(ASKS)), exit_layer=3) as opened:
        folder = opened.bundle.folder
        assert opened.exit_layers == (3,)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "there is no prompt to answer. Give --prompts FILE or --self-prompted N"),
        (["--prompts", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--self-prompted", "1", "-n", "0"], "--max-new-tokens: found 0, expected 1 or more"),
        (["--self-prompted", "1", "--seed", "-1"], "--seed: found -1, expected 0 or more"),
        (["--self-prompted", "1", "-e", "2"], "exit_layer is not an exit of this bundle"),
        (["--self-prompted", "1", "--adapter", "x"], "--adapter merges into a checkpoint"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(bundle: Path, tmp_path: Path, arguments: list[str], says: str) -> None:
    done = CliRunner().invoke(self_data, [str(bundle), str(tmp_path / "rows.jsonl"), *arguments])
    assert isinstance(done.exception, ShortstackError)
    assert says in str(done.exception)
