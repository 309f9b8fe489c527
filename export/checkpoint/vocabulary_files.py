"""Vocabulary files from which transformers can make a ``tokenizer.json``, checked before anything else reads them.

==================  ====================================================  =================================
file                content                                               read by transformers with
==================  ====================================================  =================================
tokenizer.model     a SentencePiece model, or a tiktoken file (Llama 3)   sentencepiece, protobuf; tiktoken
spiece.model        a SentencePiece model                                 sentencepiece, protobuf
tiktoken.model      a tiktoken file: a token in base64 and its rank       tiktoken
tekken.json         Mistral's vocabulary and split, in JSON               nothing more
==================  ====================================================  =================================

A SentencePiece model is a protobuf message. transformers takes a damaged one for a tiktoken file, and a long token
costs its converters time that grows with the square of the length. So here is a reader of the few fields that say
whether a file is whole. No file of these is a pickle, and nothing in them is run.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec

from shortstack.graphs import names
from shortstack.graphs.errors import CheckpointError, DependencyError
from shortstack.graphs.read_file import parse_json_object
from shortstack.missing import install_command

SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model")
TIKTOKEN_FILE = "tiktoken.model"
TEKKEN_FILE = "tekken.json"
BINARY_FILES = (*SENTENCEPIECE_FILES, TIKTOKEN_FILE)

MAX_TOKEN_BYTES = 4096
"""Of one token. The longest of released models are 128 spaces."""

MAX_TOKENS = 1 << 21
"""Of one vocabulary. transformers fills gaps between ids, so one huge id would fill the memory."""

_NORMAL = 1  # a piece that text is cut into; others are control tokens, bytes and placeholders that get other names
_MOST_RENAMED = 0.01  # of the normal pieces: fine-tuning gives a few unused ones a meaning
_TIKTOKEN_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d{1,9})")
_NEEDED = {
    "a SentencePiece model": {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"},
    "a tiktoken file": {"tiktoken": "tiktoken"},
}
_REMEDY = "download the file again"

Pieces = list[tuple[str, int]]


def check_vocabulary_files(found: Mapping[str, bytes]) -> None:
    """Check those files of a checkpoint that this module's table names.

    Args:
        found: The files, content by name.

    Raises:
        CheckpointError: A file is damaged, or contradicts another one.
        DependencyError: What transformers reads it with is not installed, and there is no tokenizer.json.
    """
    is_complete = names.TOKENIZER_FILE in found
    present = [name for name in (*BINARY_FILES, TEKKEN_FILE) if name in found]
    if len(present) > 1 and not is_complete:
        raise CheckpointError(
            f"{' and '.join(present)} are two vocabularies, and there is no {names.TOKENIZER_FILE}",
            remedy="remove those that are not this model's",
        )
    for name in present:
        if name == TEKKEN_FILE:
            if not is_complete:
                _check_tekken(found[name])
            continue
        is_sentencepiece = name != TIKTOKEN_FILE and found[name][:1] == b"\n"
        if is_complete:
            if is_sentencepiece:
                _check_agreement(found[name], found[names.TOKENIZER_FILE], name)
        elif is_sentencepiece:
            read_pieces(found[name], name)
            _check_installed(name, "a SentencePiece model")
        else:
            _check_tiktoken(found[name], name)
            _check_added_ids(found)
            _check_installed(name, "a tiktoken file")


def read_pieces(content: bytes, name: str) -> Pieces:
    """Return the pieces of a SentencePiece model by id, each with its type (1: normal).

    The layout is that of sentencepiece_model.proto: field 1 is a piece (1: text, 2: score, 3: type), field 2 says how
    the model was trained, field 3 how text is normalized.

    Args:
        content: The file.
        name: Its name, for messages.

    Raises:
        CheckpointError: It is cut off, or otherwise no such file.
    """
    pieces: Pieces = []
    others = set()
    try:
        for field, value in _fields(content):
            if field != 1:
                others.add(field)
                continue
            piece = dict(_fields(_bytes(value)))
            text, kind = _bytes(piece.get(1, b"")), piece.get(3, _NORMAL)
            if len(text) > MAX_TOKEN_BYTES or not isinstance(kind, int):
                raise ValueError
            pieces.append((text.decode(), kind))
    except ValueError:  # UnicodeDecodeError included
        raise CheckpointError(
            f"{name} is damaged", found=f"{len(pieces)} sound pieces", expected="a SentencePiece model", remedy=_REMEDY
        ) from None
    if not pieces or not {2, 3} <= others:
        raise CheckpointError(
            f"{name} is cut off",
            found=f"{len(pieces)} pieces and no description of the training behind them",
            expected="a whole SentencePiece model",
            remedy=_REMEDY,
        )
    return pieces


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value of each field of a protobuf message; ValueError if it is not one."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire_type = key & 7
        if wire_type == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if wire_type == 2:
            length, at = _varint(message, at)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise ValueError
        if at + length > len(message):
            raise ValueError
        yield key >> 3, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError
    return value


def _check_agreement(content: bytes, tokenizer: bytes, name: str) -> None:
    """Raise where a SentencePiece model is of another model than tokenizer.json is; a damaged one is never used."""
    try:
        pieces = read_pieces(content, name)
    except CheckpointError:
        return
    model = parse_json_object(tokenizer, names.TOKENIZER_FILE, CheckpointError).get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        text_of = {index: text for text, index in vocab.items() if isinstance(index, int)}
    elif isinstance(vocab, list):
        text_of = {index: entry[0] for index, entry in enumerate(vocab) if isinstance(entry, list) and entry}
    else:
        return  # damaged, for its reader to say
    normal = [(index, text) for index, (text, kind) in enumerate(pieces) if kind == _NORMAL]
    differing = [(index, text) for index, text in normal if text_of.get(index) != text]
    if len(differing) > _MOST_RENAMED * len(normal):
        index, text = differing[0]
        raise CheckpointError(
            f"{name} and {names.TOKENIZER_FILE} are of two models: {len(differing)} of {len(normal)} pieces differ",
            found=f"token {index} as {text!r} and as {text_of.get(index)!r}",
            remedy="remove the file that is not this model's",
        )


def _check_tiktoken(content: bytes, name: str) -> None:
    ranks: set[int] = set()
    for number, line in enumerate(content.splitlines(), 1):
        if not line:
            continue
        match = _TIKTOKEN_LINE.fullmatch(line)
        token = _decoded(match[1]) if match else None
        rank = int(match[2]) if match else 0
        if token is None or rank in ranks or rank >= MAX_TOKENS:
            what = "is neither a SentencePiece model nor a tiktoken file" if number == 1 else "is damaged"
            raise CheckpointError(
                f"{name} {what}",
                found=f"line {number}: {line[:60].decode(errors='backslashreplace')!r}",
                expected="a token in base64 and a rank of its own",
                remedy=_REMEDY,
            )
        ranks.add(rank)
    if not ranks:
        raise CheckpointError(f"{name} is empty", remedy=_REMEDY)


def _check_added_ids(found: Mapping[str, bytes]) -> None:
    name = names.TOKENIZER_CONFIG_FILE
    added = parse_json_object(found.get(name, b"{}"), name, CheckpointError).get("added_tokens_decoder")
    for index in added if isinstance(added, dict) else ():
        if not index.isdecimal() or len(index) > 9 or int(index) >= MAX_TOKENS:
            expected = f"ids below {MAX_TOKENS}"
            raise CheckpointError(f"{name}, added_tokens_decoder", found=repr(index), expected=expected, remedy=_REMEDY)


def _check_tekken(content: bytes) -> None:
    data = parse_json_object(content, TEKKEN_FILE, CheckpointError, _REMEDY)
    config, vocab = data.get("config"), data.get("vocab")
    if not isinstance(config, dict) or not isinstance(config.get("pattern"), str) or not isinstance(vocab, list):
        raise CheckpointError(
            f"{TEKKEN_FILE} is damaged", expected="config.pattern, and a list `vocab`", remedy=_REMEDY
        )
    for key in ("default_num_special_tokens", "default_vocab_size"):
        if (value := config.get(key)) is not None and (type(value) is not int or not 0 <= value <= MAX_TOKENS):
            expected = f"null, or a number up to {MAX_TOKENS}"
            raise CheckpointError(f"{TEKKEN_FILE}, config.{key}", found=repr(value), expected=expected, remedy=_REMEDY)
    for index, entry in enumerate(vocab):
        text = entry.get("token_bytes") if isinstance(entry, dict) else None
        if not isinstance(text, str) or _decoded(text.encode()) is None:
            raise CheckpointError(
                f"{TEKKEN_FILE}, entry {index} of vocab", found=repr(entry), expected="token_bytes", remedy=_REMEDY
            )


def _decoded(text: bytes) -> bytes | None:
    """Return the bytes of a token that is written in base64; None if it is not one, or is too long."""
    if len(text) > MAX_TOKEN_BYTES * 4 // 3:
        return None
    try:
        return base64.b64decode(text, validate=True) or None
    except (binascii.Error, ValueError):
        return None


def _check_installed(name: str, kind: str) -> None:
    missing = [package for package, module in _NEEDED[kind].items() if not _is_installed(module)]
    if missing:
        needs = " and ".join(f"'{package}'" for package in missing)
        is_plural = len(missing) > 1
        raise DependencyError(
            f"{name} is {kind}, which needs {needs} to become {names.TOKENIZER_FILE}, and "
            f"{'they are' if is_plural else 'it is'} not installed. "
            f"Run: {install_command(('export',))}, or: pip install {' '.join(missing)}"
        )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # its parent is not there, or it was set to None
        return False
