"""Checkpoints without a tokenizer.json: one is made of another library's vocabulary, as transformers does."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from helpers.bad_input import Refused
from helpers.tiny_models import BASE, END, TURN_END, TURN_START, TinyBundles
from helpers.tokenizer_checks import assert_equal
from helpers.vocabularies import byte_tokens, pieces_of, sentencepiece_model, tekken_file, tiktoken_file, trained
from shortstack.export.assemble import export_bundle
from shortstack.export.checkpoint import vocabulary_files
from shortstack.export.spec import ExportSpec
from shortstack.runtime.text.tokenizer import Tokenizer

WIDE = replace(BASE, name="wide", layers=2, vocab=700)
SPECIAL = (END, TURN_START, TURN_END)
USER_DEFINED = ["<start_of_turn>", "  ", "    ", "\n\n", "<tag>"]
TRAINED = {
    "as Llama's": {},
    "with tokens of spaces": {"user_defined_symbols": USER_DEFINED, "control_symbols": ["[INST]", "[/INST]"]},
    "without a space before the text": {"add_dummy_prefix": False},
    "with Unicode normalization": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "a unigram model": {"model_type": "unigram"},
    "with digits apart": {"split_digits": True},
}


@pytest.fixture(scope="module")
def tokens(tiny_bundles: TinyBundles) -> list[bytes]:
    backend = Backend.from_file(str(tiny_bundles.checkpoint(WIDE) / "tokenizer.json"))
    return byte_tokens(backend.get_vocab(), SPECIAL)


@pytest.fixture
def checkpoint(tiny_bundles: TinyBundles, tmp_path: Path) -> Path:
    """A checkpoint without a tokenizer."""
    folder = Path(shutil.copytree(tiny_bundles.checkpoint(WIDE), tmp_path / "checkpoint"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    return folder


def exported(checkpoint: Path, out: Path, caplog: pytest.LogCaptureFixture) -> Tokenizer:
    bundle = export_bundle(ExportSpec(str(checkpoint), out, (1,)))
    assert not [message for message in caplog.messages if "differs from transformers" in message]
    assert not (bundle.folder / "tokenizer.model").exists()
    return Tokenizer.load(bundle.folder)


@pytest.mark.parametrize("options", TRAINED)
def test_a_sentencepiece_model_becomes_a_tokenizer(
    checkpoint: Path, tmp_path: Path, options: str, caplog: pytest.LogCaptureFixture
) -> None:
    (checkpoint / "tokenizer.model").write_bytes(trained(**TRAINED[options]))
    ours = exported(checkpoint, tmp_path / "out", caplog)
    assert assert_equal(ours, AutoTokenizer.from_pretrained(checkpoint)) > 20
    assert ours.bos_token_id == 1
    assert 2 in ours.eos_token_ids


@pytest.mark.parametrize("name", ["tokenizer.model", "tiktoken.model"])
def test_a_tiktoken_file_becomes_a_tokenizer(
    checkpoint: Path, tmp_path: Path, name: str, tokens: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tiktoken")
    (checkpoint / name).write_bytes(tiktoken_file(tokens))
    fields = {"added_tokens_decoder": {str(len(tokens)): {"content": END, "special": True}}, "eos_token": END}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")
    ours = exported(checkpoint, tmp_path / "out", caplog)
    assert_equal(ours, AutoTokenizer.from_pretrained(checkpoint))
    assert len(tokens) in ours.eos_token_ids


def test_tekken_becomes_a_tokenizer(
    checkpoint: Path, tmp_path: Path, tokens: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    (checkpoint / "tekken.json").write_bytes(tekken_file(tokens, SPECIAL))
    ours = exported(checkpoint, tmp_path / "out", caplog)
    assert_equal(ours, AutoTokenizer.from_pretrained(checkpoint))
    assert ours.encode(TURN_END) == [2]


def test_a_missing_package_is_named_with_its_installation(
    checkpoint: Path, tmp_path: Path, tokens: list[bytes], refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("sentencepiece", "google.protobuf", "tiktoken"):
        monkeypatch.setitem(sys.modules, module, None)
    command: list[str | Path] = ["export", checkpoint, tmp_path / "out", "-e", 1]
    (checkpoint / "tokenizer.model").write_bytes(sentencepiece_model(pieces_of(["a", "b"])))
    needs = "tokenizer.model is a SentencePiece model, which needs 'sentencepiece' and 'protobuf'"
    refused(command, needs, "pip install sentencepiece protobuf")
    (checkpoint / "tokenizer.model").write_bytes(tiktoken_file(tokens))
    refused(command, "tokenizer.model is a tiktoken file, which needs 'tiktoken'", "pip install tiktoken")
    monkeypatch.setitem(sys.modules, "transformers", None)
    (checkpoint / "tokenizer.model").unlink()
    (checkpoint / "tekken.json").write_bytes(tekken_file(tokens, SPECIAL))
    refused(command, "tekken.json needs 'transformers' to become tokenizer.json", "pip install -e")


PIECES = sentencepiece_model(pieces_of(["a", "b", "ab"]))
DAMAGED: dict[str, tuple[str, bytes, str]] = {
    "cut within a piece": ("tokenizer.model", PIECES[:1000], "tokenizer.model is damaged: found"),
    "cut between pieces": ("tokenizer.model", sentencepiece_model(pieces_of([]), is_cut=True), "is cut off"),
    "an endless token": ("tokenizer.model", sentencepiece_model(pieces_of(["a" * 5000])), "is damaged"),
    "text that is not UTF-8": ("tokenizer.model", PIECES.replace(b"<unk>", b"<un\xff>"), "is damaged"),
    "a pointer to a large file": (
        "tokenizer.model",
        b"version 1\noid sha256:12\nsize 499723\n",
        "is neither a SentencePiece model nor a tiktoken file",
    ),
    "a pickle": ("tokenizer.model", b"\x80\x04K\x01.", "is neither"),
    "no line": ("tiktoken.model", b"\n", "tiktoken.model is empty"),
    "one rank twice": ("tiktoken.model", b"YQ== 0\nYg== 0\n", "tiktoken.model is damaged: found line 2: 'Yg== 0'"),
    "a rank that nothing has room for": ("tiktoken.model", b"YQ== 0\nYg== 900000000\n", "is damaged: found line 2"),
    "more special tokens than memory": (
        "tekken.json",
        b'{"config": {"pattern": ".", "default_num_special_tokens": 900000000000}, "vocab": []}',
        "tekken.json, config.default_num_special_tokens: found 900000000000",
    ),
    "half a line": ("tiktoken.model", b"YQ== 0\nYg=", "is damaged"),
    "no vocabulary": ("tekken.json", b'{"config": {"pattern": "."}}', "tekken.json is damaged"),
    "a token that is not base64": (
        "tekken.json",
        b'{"config": {"pattern": "."}, "vocab": [{"token_bytes": "?"}]}',
        "tekken.json, entry 0 of vocab",
    ),
    "not JSON": ("tekken.json", b'{"config": ', "tekken.json is not valid JSON"),
    "ranks with a gap": (
        "tekken.json",
        b'{"config": {"pattern": "."}, "vocab": [], "special_tokens": [{"rank": 3, "token_str": "<s>"}]}',
        "transformers makes no tokenizer.json of tekken.json: tekken.json special_tokens ranks must be contiguous",
    ),
    "no bytes in the vocabulary": (
        "tekken.json",
        b'{"config": {"pattern": "."}, "vocab": [{"token_bytes": "YQ=="}], "special_tokens": []}',
        "cannot spell 'The quick brown fox",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_vocabulary_is_refused(checkpoint: Path, tmp_path: Path, case: str, refused: Refused) -> None:
    name, content, says = DAMAGED[case]
    (checkpoint / name).write_bytes(content)
    refused(["export", checkpoint, tmp_path / "out", "-e", 1], says)


def test_an_added_token_far_beyond_the_others_is_refused(
    checkpoint: Path, tmp_path: Path, tokens: list[bytes], refused: Refused
) -> None:
    (checkpoint / "tiktoken.model").write_bytes(tiktoken_file(tokens))
    added = {"added_tokens_decoder": {"900000000000": {"content": END}}}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(added), encoding="utf-8")
    says = "tokenizer_config.json, added_tokens_decoder: found '900000000000'"
    refused(["export", checkpoint, tmp_path / "out", "-e", 1], says)


def test_two_vocabularies_are_refused(checkpoint: Path, tmp_path: Path, tokens: list[bytes], refused: Refused) -> None:
    (checkpoint / "tokenizer.model").write_bytes(PIECES)
    (checkpoint / "tekken.json").write_bytes(tekken_file(tokens, SPECIAL))
    refused(["export", checkpoint, tmp_path / "out", "-e", 1], "tokenizer.model and tekken.json are two vocabularies")


def test_pieces_of_another_model_than_the_tokenizer_are_refused(
    tiny_bundles: TinyBundles, checkpoint: Path, tmp_path: Path, refused: Refused
) -> None:
    shutil.copy(tiny_bundles.checkpoint(WIDE) / "tokenizer.json", checkpoint)
    (checkpoint / "tokenizer.model").write_bytes(PIECES)
    refused(
        ["export", checkpoint, tmp_path / "out", "-e", 1],
        "tokenizer.model and tokenizer.json are of two models: 3 of 3 pieces differ",
        "Remove the file that is not this model's",
    )


def test_pieces_that_the_tokenizer_renames_are_no_contradiction(
    tiny_bundles: TinyBundles, checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copy(tiny_bundles.checkpoint(WIDE) / "tokenizer.json", checkpoint)
    vocab = Backend.from_file(str(checkpoint / "tokenizer.json")).get_vocab()
    named = [(token, 0.0, 1) for token in sorted(vocab, key=vocab.__getitem__)]
    (checkpoint / "tokenizer.model").write_bytes(sentencepiece_model([*named[:-1], ("[UNUSED_0]", 0.0, 1)]))
    assert vocabulary_files.read_pieces((checkpoint / "tokenizer.model").read_bytes(), "x")[-1] == ("[UNUSED_0]", 1)
    export_bundle(ExportSpec(str(checkpoint), tmp_path / "out", (1,)))


def test_a_tokenizer_file_counts_before_a_damaged_vocabulary(
    tiny_bundles: TinyBundles, checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copy(tiny_bundles.checkpoint(WIDE) / "tokenizer.json", checkpoint)
    (checkpoint / "tokenizer.model").write_bytes(PIECES[:1000])
    (checkpoint / "tekken.json").write_bytes(b"{}")
    export_bundle(ExportSpec(str(checkpoint), tmp_path / "out", (1,)))


def test_damage_that_only_transformers_sees_is_called_so(checkpoint: Path, tmp_path: Path, refused: Refused) -> None:
    pytest.importorskip("tiktoken")
    content = trained(normalization_rule_name="nmt_nfkc")
    table = content.rindex(b"nmt_nfkc") + len(b"nmt_nfkc") + 4  # behind a tag and a length of three bytes
    (checkpoint / "tokenizer.model").write_bytes(content[:table] + b"\xff" * 4 + content[table + 4 :])
    command: list[str | Path] = ["export", checkpoint, tmp_path / "out", "-e", 1]
    refused(command, "transformers makes no tokenizer.json of tokenizer.model: the SentencePiece model is damaged")


def test_ids_outside_of_the_model_are_refused(
    tiny_bundles: TinyBundles, checkpoint: Path, tmp_path: Path, tokens: list[bytes], refused: Refused
) -> None:
    folder = Path(
        shutil.copytree(tiny_bundles.checkpoint(replace(WIDE, name="narrow", vocab=131)), tmp_path / "narrow")
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "tekken.json").write_bytes(tekken_file(tokens, SPECIAL))
    refused(["export", folder, tmp_path / "out", "-e", 1], "made of tekken.json is of another model", "ids below 131")
