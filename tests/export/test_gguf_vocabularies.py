"""Vocabularies of models that people run, as llama.cpp's converter stores them: the ids are those of tokenizer.json."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from helpers.real_tokenizers import NotFetchedError, real_tokenizer
from helpers.tokenizer_checks import TEXTS
from shortstack.export.checkpoint.config import Config
from shortstack.export.checkpoint.gguf_pretokenizers import SPLITS
from shortstack.export.checkpoint.gguf_tokenizer import tokenizer_files
from shortstack.graphs.errors import CheckpointError, UnsupportedError
from shortstack.runtime.text.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
PRE = {"qwen3": "qwen2", "llama3": "llama-bpe", "gptoss": "gpt-4o"}
MORE_TEXTS = (
    *TEXTS,
    "x = {\n        'a':     1,\n\t\t'b': [ ],\n}\n\n\n\nprint(  x  )" + " " * 40 + "." + "\n" * 35 + ".",
    "DON'T Don'T WE'LL we'll I'VE ÀÉ'S",
    "ab12cd345ef6789gh01234567890",
)


def stored(name: str, kind: str = "llama") -> tuple[Backend, dict[str, Any]]:
    """Return a model's own tokenizer, and what convert_hf_to_gguf.py makes of it.

    Args:
        name: The model.
        kind: What a vocabulary that is not byte-level becomes: ``llama`` or ``gemma4``.
    """
    try:
        folder = real_tokenizer(name)
    except NotFetchedError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    own = Backend.from_file(str(folder / "tokenizer.json"))
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = own.get_added_tokens_decoder()
    text_of = {index: token for token, index in own.get_vocab().items()}
    tokens, types = [], []
    for index in range(max(text_of) + 1):
        token, type_of = text_of.get(index, f"[PAD{index}]"), NORMAL if index in text_of else UNUSED
        if index in added:
            type_of = CONTROL if added[index].special else USER_DEFINED
            if type_of == USER_DEFINED and kind == "llama":
                token = token.replace("\u2581", " ")  # as the converter does
        elif token.startswith("<0x") and len(token) == 6:
            type_of = BYTE
        tokens.append(token)
        types.append(type_of)
    data: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if name in PRE:
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        data |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": PRE[name],
            "tokenizer.ggml.merges": merges,
        }
    elif kind == "gemma4":
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        data |= {
            "tokenizer.ggml.model": "gemma4",
            "tokenizer.ggml.scores": [-1000.0] * len(tokens),
            "tokenizer.ggml.merges": [" ".join(pair) for pair in pairs],
            "tokenizer.ggml.add_space_prefix": False,
        }
    else:
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        ranks = {"".join(pair): -float(rank) for rank, pair in reversed(list(enumerate(pairs)))}
        data |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": [
                ranks.get(token, -1e9) if own_type == NORMAL else -1000.0
                for token, own_type in zip(tokens, types, strict=True)
            ],
            "tokenizer.ggml.add_space_prefix": name == "llama2",
        }
    for field in ("bos", "eos"):
        token = config[f"{field}_token"]
        index = None if token is None else own.token_to_id(token)
        if index is not None:
            data[f"tokenizer.ggml.{field}_token_id"] = index
    data["tokenizer.ggml.add_bos_token"] = own.encode("a").ids[:1] == [data.get("tokenizer.ggml.bos_token_id")]
    return own, data


def loaded(data: dict[str, Any], folder: Path) -> Tokenizer:
    for name, content in tokenizer_files(Config(data, "x.gguf")).items():
        (folder / name).write_bytes(content)
    return Tokenizer.load(folder)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("qwen3", ""), ("llama3", ""), ("gptoss", ""), ("llama2", "llama"), ("gemma3", "llama"), ("gemma3", "gemma4")],
)
def test_a_vocabulary_of_a_gguf_file_gives_the_ids_of_the_model(name: str, kind: str, tmp_path: Path) -> None:
    own, data = stored(name, kind)
    ours = loaded(data, tmp_path)
    special = [token.content for token in own.get_added_tokens_decoder().values()][:200]
    for text in (*MORE_TEXTS, "".join(special), " ".join(special), *(f"a{token}b {token} c" for token in special)):
        ids = own.encode(text).ids
        assert ours.encode(text) == ids, text
        whole = own.decode(ids, skip_special_tokens=False)
        assert ours.decode(ids, skip_special_tokens=False) == whole, text  # llama.cpp takes more of them for special
    assert ours.vocab_size >= own.get_vocab_size()


def sentencepiece(tokens: list[tuple[str, int]], **fields: Any) -> dict[str, Any]:
    bytes_of = [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    every = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), *bytes_of, *tokens]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [token for token, _ in every],
        "tokenizer.ggml.token_type": [kind for _, kind in every],
        "tokenizer.ggml.scores": [-1000.0 if kind == USER_DEFINED else -float(i) for i, (_, kind) in enumerate(every)],
        **{f"tokenizer.ggml.{key}": value for key, value in fields.items()},
    }


PIECES = [("\u2581", NORMAL), ("a", NORMAL), ("\u2581a", NORMAL)]


def test_user_defined_spaces_are_read_whole_and_before_all_merges(tmp_path: Path) -> None:
    spaces = [("  ", USER_DEFINED), ("    ", USER_DEFINED)]
    ours = loaded(sentencepiece([*PIECES, *spaces], add_space_prefix=False, add_bos_token=False), tmp_path)
    assert ours.encode("  a") == [262, 260]
    assert ours.encode("     a") == [263, 261]
    assert ours.decode([263, 261]) == "     a"


def test_a_vocabulary_with_both_spellings_of_spaces_keeps_both(tmp_path: Path) -> None:
    both = [("\u2581\u2581", NORMAL), ("  ", USER_DEFINED)]
    ours = loaded(sentencepiece([*PIECES, *both], add_space_prefix=False, add_bos_token=False), tmp_path)
    assert ours.encode("a  a") == [260, 263, 260]


@pytest.mark.parametrize(
    ("fields", "ids", "text"),
    [
        ({}, [1, 261], "a"),
        ({"add_space_prefix": False}, [1, 260], "a"),
        ({"add_bos_token": False}, [261], "a"),
        ({"add_eos_token": True}, [1, 261, 2], "a"),
        ({"add_bos_token": True, "bos_token_id": 2}, [2, 261], "a"),
    ],
)
def test_options_of_sentencepiece_vocabularies(
    fields: dict[str, Any], ids: list[int], text: str, tmp_path: Path
) -> None:
    ours = loaded(sentencepiece(PIECES, **fields), tmp_path)
    assert ours.encode(text) == ids
    assert ours.decode(ids) == text


def test_bytes_stand_for_what_no_piece_spells(tmp_path: Path) -> None:
    ours = loaded(sentencepiece(PIECES, add_bos_token=False), tmp_path)
    assert ours.encode("aé\n") == [261, 3 + 0xC3, 3 + 0xA9, 3 + 0x0A]
    assert ours.decode(ours.encode("aé\n🙂")) == "aé\n🙂"


def test_a_gemma4_vocabulary_starts_with_its_first_token_and_needs_merges(tmp_path: Path) -> None:
    data = sentencepiece(PIECES, bos_token_id=1, add_bos_token=False, merges=["\u2581 a"])
    data["tokenizer.ggml.model"] = "gemma4"
    ours = loaded(data, tmp_path)
    assert ours.encode(" aa") == [1, 261, 260]
    assert ours.decode([261, 260]) == " aa"
    del data["tokenizer.ggml.merges"]
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.merges is missing: expected the merges of a gemma4"):
        tokenizer_files(Config(data, "x.gguf"))


TEXT = "I'm X'S  1234\tab\n\n \u00e9=(x)"
SPLIT_TEXT = {
    "gpt-2": "I|'m| X|'|S| | 1234|\t|ab|\n\n| \u00e9|=(|x|)",
    "smollm": "I|'m| X|'|S|  |1|2|3|4|\t|ab|\n\n| \u00e9|=(|x|)",
    "command-r": "I|'m| X|'|S|  |1|2|3|4|\t|ab|\n\n| \u00e9|=(|x|)",
    "llama-bpe": "I|'m| X|'S| | |123|4|\tab|\n\n| \u00e9|=(|x|)",
    "qwen2": "I|'m| X|'S| | |1|2|3|4|\tab|\n\n| \u00e9|=(|x|)",
    "tekken": "I|'m| X|'S| | |1|2|3|4|\tab|\n\n| \u00e9|=(|x|)",
    "gpt-4o": "I'm| X'S| | |123|4|\tab|\n\n| \u00e9|=(|x|)",
    "deepseek-coder": "I|'|m| X|'|S|  |1|2|3|4|\tab|\n|\n| \u00e9|=|(|x|)",
    "deepseek-v3": "I|'m| X|'S|  |123|4|\tab|\n\n| \u00e9|=(|x|)",
    "default": "I|'|m| X|'|S| | |123|4|\t|ab|\n\n| \u00e9|=(|x|)",
}


@pytest.mark.parametrize("name", SPLIT_TEXT)
def test_text_is_split_as_the_name_says(name: str) -> None:
    spans = [span for _, span in SPLITS[name].pre_tokenizer().pre_tokenize_str(TEXT)]
    assert "|".join(TEXT[start:end] for start, end in spans) == SPLIT_TEXT[name]


@pytest.mark.parametrize(
    "name", ["llama-bpe", "llama3", "falcon3", "tekken", "gpt-4o", "qwen2", "qwen35", "lfm2", "dbrx"]
)
def test_splits_are_spelled_as_in_transformers(name: str) -> None:
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    assert SPLITS[name].regexes == (mapping.GGUF_PRE_TOKENIZER_SPLITS[name],)


@pytest.mark.parametrize("name", SPLITS)
def test_every_known_split_keeps_the_text(name: str) -> None:
    splitter = SPLITS[name].pre_tokenizer()
    for text in MORE_TEXTS:
        ends = [end for _, end in (span for _, span in splitter.pre_tokenize_str(text))]
        assert ends == sorted(ends)
        assert (ends or [0])[-1] == len(text), text


@pytest.mark.parametrize("name", ["", "qwen9", "gpt-3"])
def test_an_unknown_split_is_refused_by_name(name: str) -> None:
    data = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.pre": name}
    with pytest.raises(UnsupportedError, match=f"tokenizer.ggml.pre.*found '{name}'"):
        tokenizer_files(Config(data, "x.gguf"))
