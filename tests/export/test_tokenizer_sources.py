"""Special tokens, added tokens and templates may stand in many files: a bundle says what transformers says."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import AutoTokenizer

from helpers.bad_input import Refused, edit_json
from helpers.tiny_models import BASE, END, TURN_END, TinyBundles
from shortstack.export.assemble import export_bundle
from shortstack.export.checkpoint import resolved_tokenizer
from shortstack.export.spec import ExportSpec
from shortstack.runtime.text.tokenizer import Tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{{ image_token }}{{ pad_token }}"
)
TEXTS = (
    *resolved_tokenizer.PROBES,
    f"one{END}two {END} three",
    f"<|turn|> here<|turn|>{TURN_END}there",
    "<s> begins",
    "<image> <image>",
)
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello <|turn|>"}]


@pytest.fixture
def checkpoint(tiny_bundles: TinyBundles, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundles.checkpoint(BASE), tmp_path / "checkpoint"))


def token(text: str, special: bool = True) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": special}
    return {"content": text, **flags}


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def only_in_the_map(folder: Path) -> None:
    write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE})
    write(folder / "special_tokens_map.json", {"bos_token": TURN_END, "eos_token": END, "pad_token": token(END)})


def only_in_the_decoder(folder: Path) -> None:
    added = {"290": token("<|turn|>"), "291": token("<word>", special=False)}
    fields = {"added_tokens_decoder": added, "chat_template": TEMPLATE, "bos_token": "<|turn|>"}
    edit_json(folder / "tokenizer_config.json", **fields)


def only_in_added_tokens(folder: Path) -> None:
    write(folder / "added_tokens.json", {"<|turn|>": 290, "<word>": 291})
    edit_json(folder / "tokenizer_config.json", chat_template=TEMPLATE)


def extra_special_tokens(folder: Path) -> None:
    edit_json(
        folder / "tokenizer_config.json",
        extra_special_tokens={"image_token": "<image>"},
        added_tokens_decoder={"290": token("<image>")},
        chat_template=TEMPLATE,
    )


def tokens_as_objects(folder: Path) -> None:
    objects = {
        name: {"__type": "AddedToken", **token(text)} for name, text in (("bos_token", TURN_END), ("eos_token", END))
    }
    edit_json(folder / "tokenizer_config.json", chat_template=TEMPLATE, **objects)


def template_in_its_own_json(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["chat_template"]
    write(folder / "tokenizer_config.json", config)
    write(folder / "chat_template.json", {"chat_template": TEMPLATE})


def merges_and_vocab_alone(folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    write(folder / "vocab.json", data["model"]["vocab"])
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in data["model"]["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").unlink()
    specials = {"eos_token": END, "bos_token": END, "unk_token": END}
    write(folder / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "chat_template": TEMPLATE, **specials})


SOURCES: dict[str, Callable[[Path], None]] = {
    function.__name__.replace("_", " "): function
    for function in (
        only_in_the_map,
        only_in_the_decoder,
        only_in_added_tokens,
        extra_special_tokens,
        tokens_as_objects,
        template_in_its_own_json,
        merges_and_vocab_alone,
    )
}


@pytest.mark.parametrize("source", SOURCES)
def test_the_bundle_tokenizes_and_renders_as_transformers(
    checkpoint: Path, tmp_path: Path, source: str, caplog: pytest.LogCaptureFixture
) -> None:
    SOURCES[source](checkpoint)
    theirs = AutoTokenizer.from_pretrained(checkpoint)
    export_bundle(ExportSpec(str(checkpoint), tmp_path / "out", (1,)))
    assert not [message for message in caplog.messages if "differs from transformers" in message]
    ours = Tokenizer.load(tmp_path / "out")
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"], text
    if theirs.chat_template:
        wanted = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
        assert ours.render_chat(CHAT) == wanted
    assert (theirs.eos_token_id in ours.eos_token_ids) == (theirs.eos_token_id is not None)


def test_a_sound_tokenizer_file_stays_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    bundle = export_bundle(ExportSpec(str(checkpoint), tmp_path / "out", (1,)))
    assert (bundle.folder / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()


def test_dropout_is_switched_off_and_said(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = checkpoint / "tokenizer.json"
    before = Tokenizer.load(checkpoint).encode("the quick in and on the other")
    data = json.loads(path.read_text(encoding="utf-8"))
    data["model"]["dropout"] = 0.5
    write(path, data)
    assert [Tokenizer.load(checkpoint).encode("the quick in and on the other") for _ in range(20)] == [before] * 20
    export_bundle(ExportSpec(str(checkpoint), tmp_path / "out", (1,)))
    assert any("BPE dropout" in message for message in caplog.messages)
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["dropout"] is None


def test_without_transformers_the_files_are_taken_as_they_are(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    bundle = export_bundle(ExportSpec(str(checkpoint), tmp_path / "out", (1,)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (bundle.folder / name).read_bytes() == (checkpoint / name).read_bytes()


def test_a_difference_from_transformers_is_said(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(resolved_tokenizer, "_is_same", lambda *_: True)
    edit_json(checkpoint / "tokenizer_config.json", added_tokens_decoder={"290": token("quick")})
    export_bundle(ExportSpec(str(checkpoint), tmp_path / "out", (1,)))
    said = "the bundle's tokenizer differs from transformers': 'The quick"
    assert any(said in message for message in caplog.messages)


def test_a_tokenizer_that_ends_the_process_is_refused(
    checkpoint: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolved_tokenizer, "_LOAD", "import os; os.abort()")
    resolved_tokenizer._check_survives.cache_clear()
    try:
        refused(["export", checkpoint, tmp_path / "out", "-e", 1], "makes the tokenizers library end the process")
    finally:
        resolved_tokenizer._check_survives.cache_clear()


def test_a_panic_of_the_library_is_one_line(
    checkpoint: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicException(BaseException):  # as pyo3's, which is no Exception
        pass

    def panic(text: str) -> Backend:
        raise PanicException("index out of bounds")

    assert Backend(models.BPE()).get_vocab_size() == 0
    monkeypatch.setattr("tokenizers.Tokenizer.from_str", staticmethod(panic), raising=False)
    monkeypatch.setattr("shortstack.runtime.text.tokenizer.tokenizers.Tokenizer", FakeTokenizer(panic))
    monkeypatch.setattr("shortstack.export.assemble.Tokenizer", FakeTokenizer(panic), raising=False)
    monkeypatch.setattr("shortstack.export.checkpoint.resolved_tokenizer.Tokenizer", FakeTokenizer(panic))
    refused(["export", checkpoint, tmp_path / "out", "-e", 1], "index out of bounds")


class FakeTokenizer:
    def __init__(self, from_str: Callable[[str], Backend]) -> None:
        self.from_str = from_str


def test_code_of_a_checkpoint_is_never_run(checkpoint: Path, tmp_path: Path) -> None:
    boom = tmp_path / "boom"
    (checkpoint / "tokenization_evil.py").write_text(f"open({str(boom)!r}, 'w')\nclass Evil: pass\n", encoding="utf-8")
    edit_json(
        checkpoint / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]},
        tokenizer_class="Evil",
    )
    export_bundle(ExportSpec(str(checkpoint), tmp_path / "out", (1,)))
    assert not boom.exists()
    assert Tokenizer.load(tmp_path / "out").encode("the") == Tokenizer.load(checkpoint).encode("the")
