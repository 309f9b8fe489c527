"""`--template-variable`: what the chat template reads besides the messages, on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers.bad_input import MAX_LENGTH, Refused, edit_json
from helpers.tiny_models import BASE, CHAT_TEMPLATE, TinyBundles
from shortstack.__main__ import run
from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec
from shortstack.runtime import Model, load
from shortstack.runtime.calibration.prompts import read_prompts

TEMPLATE = CHAT_TEMPLATE + "{% if thinks is defined and thinks is false %}no{% endif %}{{ note | tojson }}"
CHAT = [{"role": "user", "content": "the one"}]


@pytest.fixture(scope="module")
def folder(tiny_bundles: TinyBundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose template reads `thinks` and `note`."""
    home = tmp_path_factory.mktemp("variables")
    checkpoint = Path(shutil.copytree(tiny_bundles.checkpoint(BASE), home / "checkpoint"))
    edit_json(checkpoint / "tokenizer_config.json", chat_template=TEMPLATE)
    return export_bundle(ExportSpec(str(checkpoint), home / "out", (1,), max_length=MAX_LENGTH)).folder


@pytest.fixture(scope="module")
def speaker(folder: Path) -> Model:
    return load(folder)


@pytest.mark.parametrize(
    ("given", "variables"),
    [
        (["note=1"], {"note": 1}),
        (["thinks=false", "note=null"], {"thinks": False, "note": None}),
        (['note={"a": [1, "b"]}'], {"note": {"a": [1, "b"]}}),
        (['note="true"'], {"note": "true"}),
        (["note=a text = this"], {"note": "a text = this"}),
        (["note="], {"note": ""}),
    ],
)
def test_values_are_json_or_text(
    folder: Path, speaker: Model, given: list[str], variables: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    options = [word for each in given for word in ("--template-variable", each)]
    assert run(["generate", str(folder), "the one", "-n", "4", "--json", *options]) == 0
    wanted = speaker.generate(CHAT, max_new_tokens=4, template_variables=variables)
    assert json.loads(capsys.readouterr().out)["tokens"] == list(wanted.tokens)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["thinks"], "--template-variable: found 'thinks', expected NAME=VALUE"),
        (["a b=1"], "expected NAME=VALUE"),
        (["thinks=False"], "--template-variable thinks: found False, expected JSON, false"),
        (["note={1"], "--template-variable note is not valid JSON"),
        (["note=1", "note=2"], "--template-variable note is given twice"),
        (
            ["note=1", "thinking=1"],
            "--template-variable thinking would have no effect: the chat template does not read it",
        ),
        (["messages=1"], "--template-variable messages would have no effect"),
    ],
)
def test_what_would_not_reach_the_template_is_refused(
    folder: Path, given: list[str], says: str, refused: Refused
) -> None:
    refused(["generate", folder, "Hi", *(word for each in given for word in ("--template-variable", each))], says)


def test_it_needs_a_chat_template(folder: Path, tmp_path: Path, tiny_bundles: TinyBundles, refused: Refused) -> None:
    refused(["generate", folder, "Hi", "--raw", "--template-variable", "note=1"], "which --raw leaves out")
    checkpoint = Path(shutil.copytree(tiny_bundles.checkpoint(BASE), tmp_path / "checkpoint"))
    edit_json(checkpoint / "tokenizer_config.json", chat_template=None)
    plain = export_bundle(ExportSpec(str(checkpoint), tmp_path / "out", (1,), max_length=MAX_LENGTH)).folder
    refused(
        ["generate", plain, "Hi", "--template-variable", "note=1"], "needs a chat template, and this bundle has none"
    )


def test_prompts_to_calibrate_on_are_rendered_with_them(folder: Path, speaker: Model, tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "the one"}\n' + json.dumps({"messages": CHAT}) + "\n", encoding="utf-8")
    variables = {"thinks": False, "note": 2}
    prompts = read_prompts(data, speaker.tokenizer, MAX_LENGTH, template_variables=variables)
    assert prompts.ids == (tuple(speaker.tokenizer.encode_chat(CHAT, variables=variables)),) * 2


def test_calibrate_refuses_what_the_template_does_not_read(folder: Path, tmp_path: Path, refused: Refused) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "the one"}\n', encoding="utf-8")
    refused(["calibrate", folder, "--data", data, "--template-variable", "thinking=1"], "would have no effect")
