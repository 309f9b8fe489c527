"""Vocabularies in the files of other libraries than tokenizers: SentencePiece, tiktoken and Mistral's tekken.json."""

from __future__ import annotations

import base64
import io
import json
import struct
from collections.abc import Sequence
from typing import Any

import pytest

from shortstack.runtime.text.tokenizer import _BYTE_OF_CHAR

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LINES = (
    "The quick brown fox jumps over the lazy dog, and then it naps on the old mat in the sun.",
    "Of all the things that she had seen, this one was the most unlikely: a lantern under water.",
    "def read(path):  # returns what is there",
    "    return [line for line in open(path) if line]",
    "Er war größer als sein Bruder; naïve Leute sagten, das sei schön.",
)


def trained(**options: Any) -> bytes:
    """Return a SentencePiece model, trained as Llama's was unless the options say otherwise."""
    sentencepiece = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    usual = {
        "model_type": "bpe",
        "vocab_size": 420,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
    }
    lines = iter(LINES * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=out, minloglevel=2, **{**usual, **options}
    )
    return out.getvalue()


def sentencepiece_model(pieces: Sequence[tuple[str, float, int]], *, is_cut: bool = False) -> bytes:
    """Return a SentencePiece model of these pieces (text, score, type) in the form of sentencepiece_model.proto."""

    def text(field: int, value: bytes) -> bytes:
        length, size = len(value), b""
        while length >= 0x80:
            size, length = size + bytes([length & 0x7F | 0x80]), length >> 7
        return bytes([field << 3 | 2]) + size + bytes([length]) + value

    found = b"".join(
        text(1, text(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + bytes([0x18, kind]))
        for piece, score, kind in pieces
    )
    training = b"\x18\x02" + b"\x98\x02\x01"  # model_type: BPE, byte_fallback
    return found if is_cut else found + text(2, training) + text(3, text(1, b"identity"))


def pieces_of(tokens: Sequence[str]) -> list[tuple[str, float, int]]:
    """Return control tokens, bytes, and then the tokens as pieces."""
    special = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    of_bytes = [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    return [*special, *of_bytes, *((token, -float(index), NORMAL) for index, token in enumerate(tokens))]


def byte_tokens(vocab: dict[str, int], special: Sequence[str]) -> list[bytes]:
    """Return the tokens of a byte-level vocabulary by rank, without the special ones."""
    ranked = sorted((index, token) for token, index in vocab.items() if token not in special)
    return [bytes(_BYTE_OF_CHAR[char] for char in token) for _, token in ranked]


def tiktoken_file(tokens: Sequence[bytes]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def tekken_file(tokens: Sequence[bytes], special: Sequence[str]) -> bytes:
    data = {
        "config": {
            "pattern": SPLIT,
            "num_vocab_tokens": len(tokens),
            "default_vocab_size": len(tokens) + len(special),
            "default_num_special_tokens": len(special),
            "version": "v3",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for rank, token in enumerate(tokens)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": token, "is_control": True} for rank, token in enumerate(special)
        ],
    }
    return json.dumps(data).encode()
