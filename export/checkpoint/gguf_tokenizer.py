"""Builds ``tokenizer.json`` and ``tokenizer_config.json`` from the metadata of a GGUF file.

transformers has such a conversion too. But as of 5.23 it splits the digits of SmolLM2 like GPT-2's, ignores the
``ignore_merges`` of Llama 3, and is private. So the few lines that it takes are here, and they need only the
``tokenizers`` library. Three kinds of vocabulary are known: ``gpt2`` (byte-level BPE), ``llama`` (SentencePiece BPE
with byte fallback) and ``gemma4`` (the same with merges, and no space before the text).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from shortstack.export.checkpoint.config import Config, not_one_of
from shortstack.export.checkpoint.gguf_end_tokens import end_token_ids
from shortstack.export.checkpoint.gguf_pretokenizers import SPLITS, Split
from shortstack.graphs import names
from shortstack.graphs.errors import CheckpointError, UnsupportedError

T = TypeVar("T", str, int, float)

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # values of tokenizer.ggml.token_type
_SPACE = "\u2581"  # how SentencePiece spells a space
_KIND_NAMES: Mapping[type, str] = {str: "texts", int: "integers", float: "numbers"}
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # as llama.cpp has them where a file names none
_SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The lists under ``tokenizer.ggml.*``, after they were checked.

    Attributes:
        tokens: The text of each token id.
        types: The type of each token id.
        scores: SentencePiece scores by id; empty if the file has none.
        merges: Pairs of token texts, best first; empty if the file has none.
    """

    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[tuple[str, str]]

    def ids(self) -> dict[str, int]:
        """Return token ids by text."""
        return {token: index for index, token in enumerate(self.tokens)}


def tokenizer_files(metadata: Config) -> dict[str, bytes]:
    """Return ``tokenizer.json`` and ``tokenizer_config.json``; an empty dict if the GGUF file holds no tokenizer.

    Raises:
        CheckpointError: A field is missing, has the wrong type, or contradicts another one.
        UnsupportedError: The kind of vocabulary, or its way of splitting text, is not known.
    """
    kind = metadata.read(str, "tokenizer.ggml.model", None)
    if kind in (None, "none", "no_vocab"):
        return {}
    vocabulary = read_vocabulary(metadata)
    defaults: Mapping[str, int] = {}
    if kind == "gpt2":
        split = _read_split(metadata)
        tokenizer = byte_level_tokenizer(vocabulary, split)
        add_bos_default, special = split.add_bos, {_CONTROL}
    elif kind in ("llama", "gemma4"):
        vocabulary = with_spaces_as_pieces(vocabulary)
        defaults = {
            field: index
            for field, index in (_SENTENCEPIECE_IDS if kind == "llama" else {}).items()
            if index < len(vocabulary.types) and vocabulary.types[index] in (_UNKNOWN, _CONTROL)
        }
        is_llama = kind == "llama"
        if not is_llama and not vocabulary.merges:
            raise CheckpointError(
                f"{metadata.where('tokenizer.ggml.merges')} is missing", expected="the merges of a gemma4 vocabulary"
            )
        add_space_prefix = metadata.read(bool, "tokenizer.ggml.add_space_prefix", is_llama)
        unknown = _token(metadata, vocabulary, "unknown", 0 if is_llama else None)
        tokenizer = sentencepiece_tokenizer(vocabulary, unknown, add_space_prefix=add_space_prefix)
        add_bos_default, special = True, {_UNKNOWN, _CONTROL}
    else:
        raise not_one_of(metadata.where("tokenizer.ggml.model"), str(kind), ("gpt2", "llama", "gemma4"))

    ends = {vocabulary.tokens[index] for index in end_token_ids(metadata, vocabulary.tokens)}
    # llama.cpp takes what ends a generation for a control token, whatever its type says.
    typed = [
        (token, _CONTROL if token in ends else kind)
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
    ]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in typed if k in special])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in typed if k == _USER_DEFINED])

    config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for key, field in _SPECIAL_TOKENS.items():
        config[key] = _token(metadata, vocabulary, field, defaults.get(field))
    adds_bos = metadata.read(bool, "tokenizer.ggml.add_bos_token", add_bos_default)
    config["add_bos_token"] = adds_bos or kind == "gemma4"  # llama.cpp adds it whatever such a file says
    config["add_eos_token"] = metadata.read(bool, "tokenizer.ggml.add_eos_token", False)
    _add_template(tokenizer, metadata, config)
    template = metadata.read(str, "tokenizer.chat_template", None)
    if template is not None:
        config["chat_template"] = template
    return {
        names.TOKENIZER_FILE: tokenizer.to_str().encode(),
        names.TOKENIZER_CONFIG_FILE: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(),
    }


def read_vocabulary(metadata: Config) -> Vocabulary:
    """Read and check the lists of ``tokenizer.ggml.*``.

    Raises:
        CheckpointError: A list is missing, has the wrong length or type, repeats a token, or merges into no token.
    """
    tokens = token_texts(metadata)
    if not tokens:
        raise CheckpointError(f"{metadata.where('tokenizer.ggml.tokens')} is missing or empty")
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        first, twice = next((index, token) for index, token in enumerate(tokens) if ids[token] != index)
        raise CheckpointError(
            metadata.where("tokenizer.ggml.tokens"),
            found=f"{twice!r} as token {first} and as token {ids[twice]} ({len(tokens) - len(ids)} repeats in all)",
            expected="each text once, since ids are looked up by text (llama.cpp refuses such a file too)",
            remedy="export from the model's safetensors, or convert them again with a current llama.cpp",
        )
    types = _read_list(metadata, "tokenizer.ggml.token_type", int) or [_NORMAL] * len(tokens)
    scores = _read_list(metadata, "tokenizer.ggml.scores", float)
    for key, length in (("token_type", len(types)), ("scores", len(scores) or len(tokens))):
        if length != len(tokens):
            raise CheckpointError(
                metadata.where(f"tokenizer.ggml.{key}"),
                found=f"{length} entries",
                expected=f"one per token, {len(tokens)}",
            )
    merges: list[tuple[str, str]] = []
    for merge in _read_list(metadata, "tokenizer.ggml.merges", str):
        left, _, right = merge.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise CheckpointError(
                metadata.where("tokenizer.ggml.merges"),
                found=repr(merge),
                expected="two tokens that form a token when joined",
            )
        merges.append((left, right))
    return Vocabulary(tokens, types, scores, merges)


def token_texts(metadata: Config) -> list[str]:
    """Return the text of each token id; an empty list if the file holds no tokenizer.

    A token without a text gets the one that llama.cpp gives it.

    Raises:
        CheckpointError: The list holds something other than texts.
    """
    tokens = _read_list(metadata, "tokenizer.ggml.tokens", str)
    return [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]


def byte_level_tokenizer(vocabulary: Vocabulary, split: Split) -> Tokenizer:
    """Build a byte-level BPE tokenizer, such as those of GPT-2, SmolLM2 and Llama 3."""
    model = models.BPE(vocab=vocabulary.ids(), merges=vocabulary.merges, ignore_merges=split.ignore_merges)
    tokenizer = Tokenizer(model)
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = split.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_tokenizer(vocabulary: Vocabulary, unknown: str | None, *, add_space_prefix: bool) -> Tokenizer:
    """Build a SentencePiece BPE tokenizer in the form of Llama 2's own ``tokenizer.json``."""
    merges = vocabulary.merges or merges_from_scores(vocabulary)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary.ids(), merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    to_pieces: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    to_text: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_space_prefix:
        to_pieces.insert(0, normalizers.Prepend(_SPACE))
        to_text.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(to_pieces)
    tokenizer.decoder = decoders.Sequence(to_text)
    return tokenizer


def with_spaces_as_pieces(vocabulary: Vocabulary) -> Vocabulary:
    """Spell the spaces of user-defined tokens as SentencePiece does.

    llama.cpp's converter stores them as they are read. Where a vocabulary has both spellings, both stay.
    """
    present = set(vocabulary.tokens)
    tokens = [
        piece if kind == _USER_DEFINED and (piece := token.replace(" ", _SPACE)) not in present else token
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
    ]
    return replace(vocabulary, tokens=tokens)


def merges_from_scores(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Recover the merges of a SentencePiece vocabulary: all pairs that form a token, best score first.

    User-defined tokens come before all others, and those of longer parts before shorter ones: SentencePiece reads the
    longest of them whole, and their scores in a file mean nothing. So it stands in Gemma's own tokenizer.json.
    """
    ids = vocabulary.ids()
    scores: Sequence[float] = vocabulary.scores or [-float(index) for index in range(len(ids))]
    ranked: list[tuple[tuple[float, float], int, int, str, str]] = []
    for token, kind, score in zip(vocabulary.tokens, vocabulary.types, scores, strict=True):
        if kind not in (_NORMAL, _USER_DEFINED):
            continue  # control and byte tokens never come from merging text
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                rank = (-float(len(left)), -float(len(right))) if kind == _USER_DEFINED else (1.0, -score)
                ranked.append((rank, ids[left], ids[right], left, right))
    ranked.sort(key=lambda entry: entry[:3])
    return [(left, right) for *_, left, right in ranked]


def _read_split(metadata: Config) -> Split:
    name = metadata.read(str, "tokenizer.ggml.pre", None)
    where = metadata.where("tokenizer.ggml.pre")
    if name is None:
        raise UnsupportedError(
            f"{where} is missing, so how text is split before merging is unknown",
            remedy="convert the model again with a current llama.cpp",
        )
    if name not in SPLITS:
        raise not_one_of(where, name, SPLITS, remedy="export from the model's safetensors instead")
    return SPLITS[name]


def _read_list(metadata: Config, key: str, kind: type[T]) -> list[T]:
    """Read a list of ``kind``; an absent field gives an empty list."""
    value = metadata.data.get(key, [])
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        expected = f"a list of {_KIND_NAMES[kind]}"
        if isinstance(value, list):
            index = next(index for index, item in enumerate(value) if type(item) is not kind)
            raise CheckpointError(f"{metadata.where(key)}, entry {index}", found=repr(value[index]), expected=expected)
        raise metadata.wrong(key, expected)
    return value


def _token(metadata: Config, vocabulary: Vocabulary, field: str, default: int | None) -> str | None:
    key = f"tokenizer.ggml.{field}_token_id"
    index = metadata.read(int, key, default)
    if index is None:
        return None
    if not 0 <= index < len(vocabulary.tokens):
        raise metadata.wrong(key, f"a token id below {len(vocabulary.tokens)}")
    return vocabulary.tokens[index]


def _add_template(tokenizer: Tokenizer, metadata: Config, config: dict[str, object]) -> None:
    """Make the tokenizer add the beginning and end tokens that ``config`` asks for."""
    before: list[str] = []
    after: list[str] = []
    for tokens, side in ((before, "bos"), (after, "eos")):
        if config[f"add_{side}_token"] is True:
            token = config[f"{side}_token"]
            if not isinstance(token, str):
                raise CheckpointError(
                    f"{metadata.where(f'tokenizer.ggml.{side}_token_id')} is missing, but that token is to be added"
                )
            tokens.append(token)
    if not before and not after:
        return
    ids = {token: tokenizer.token_to_id(token) for token in (*before, *after)}
    second = [f"{token}:1" for token in before], [f"{token}:1" for token in after]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *second[0], "$B:1", *second[1]],
        special_tokens=list(ids.items()),
    )
