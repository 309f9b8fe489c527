"""Streaming text equals decoding everything at once, and never shows half a character."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from shortstack.runtime.text.stream_decoder import StreamDecoder
from shortstack.runtime.text.tokenizer import Tokenizer

TEXTS = ["the cat sat on the mat", "Grüße 👋 from the café 🎉🎉 naïve ☃", "漢字 👩‍👩‍👧 и кириллица"]
BROKEN = "\N{REPLACEMENT CHARACTER}"
many = settings(deadline=None, max_examples=300)
id_lists = st.lists(st.integers(0, 2**32), max_size=24)


def load(backend: tokenizers.Tokenizer, folder: Path) -> Tokenizer:
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """All 256 bytes, merges, special tokens, and added tokens with text inside and outside the byte alphabet."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=310, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_tokens([AddedToken("<tool call>"), AddedToken("漢"), AddedToken("é"), AddedToken("<tool>")])
    return load(backend, tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Like T5's: text tokens with a visible space, of which the first is dropped."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>"], show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return load(backend, tmp_path_factory.mktemp("metaspace"))


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Like Llama 2's: text tokens, a token for each byte, one leading space stripped."""
    tokens = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁cat", "s", "▁é", BROKEN]
    backend = tokenizers.Tokenizer(
        models.BPE({token: index for index, token in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.add_special_tokens(["<unk>", "<s>"])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return load(backend, tmp_path_factory.mktemp("byte_fallback"))


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(token_id) for token_id in ids), decoder.flush()]


def bytes_to_ids(data: bytes) -> list[int]:
    return [2 + byte for byte in data]  # in the byte_fallback vocabulary


@many
@given(id_lists)
def test_byte_level_pieces_joined_equal_the_whole_decode(byte_level: Tokenizer, numbers: list[int]) -> None:
    ids = [number % (byte_level.vocab_size + 3) for number in numbers]  # three ids beyond the vocabulary
    assert "".join(streamed(byte_level, ids)) == byte_level.decode(ids)


@many
@given(st.binary(max_size=16) | st.text(max_size=6).map(str.encode))
def test_any_bytes_with_one_token_each_decode_as_a_whole(byte_level: Tokenizer, data: bytes) -> None:
    id_of = {byte_level.token_bytes(token_id): token_id for token_id in range(2, byte_level.vocab_size)}
    ids = [id_of[bytes([byte])] for byte in data]
    pieces = streamed(byte_level, ids)
    assert "".join(pieces) == byte_level.decode(ids) == data.decode("utf-8", "replace")


@many
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters=f"é{BROKEN}"), max_size=12))
def test_valid_text_is_streamed_without_a_broken_character(byte_level: Tokenizer, text: str) -> None:
    # except for the added token "é", which the library itself reads as the byte 0xE9
    pieces = streamed(byte_level, byte_level.encode(text, add_special_tokens=False))
    assert "".join(pieces) == text
    assert not any(BROKEN in piece for piece in pieces)


@many
@given(id_lists)
def test_every_prefix_of_the_stream_is_a_prefix_of_the_whole_text(byte_level: Tokenizer, numbers: list[int]) -> None:
    ids = [number % byte_level.vocab_size for number in numbers]
    whole, shown = byte_level.decode(ids), ""
    for piece in streamed(byte_level, ids):
        shown += piece
        assert whole.startswith(shown)


@many
@given(id_lists)
def test_metaspace_pieces_joined_equal_the_whole_decode(metaspace: Tokenizer, numbers: list[int]) -> None:
    ids = [number % metaspace.vocab_size for number in numbers]
    assert "".join(streamed(metaspace, ids)) == metaspace.decode(ids)


@many
@given(st.lists(st.integers(258, 263) | st.integers(0, 1) | st.integers(2, 129), max_size=16))
def test_byte_fallback_pieces_joined_equal_the_whole_decode_where_bytes_are_characters(
    byte_fallback: Tokenizer, ids: list[int]
) -> None:
    assert "".join(streamed(byte_fallback, ids)) == byte_fallback.decode(ids)


@many
@given(st.lists(st.integers(258, 263).map(lambda i: [i]) | st.text(max_size=3).map(str.encode).map(bytes_to_ids)))
def test_byte_fallback_streams_characters_made_of_bytes_as_a_whole(
    byte_fallback: Tokenizer, groups: list[list[int]]
) -> None:
    ids = [token_id for group in groups for token_id in group]
    assert "".join(streamed(byte_fallback, ids)) == byte_fallback.decode(ids)


@many
@given(id_lists)
def test_byte_fallback_shows_no_more_broken_characters_than_the_whole_decode(
    byte_fallback: Tokenizer, numbers: list[int]
) -> None:
    ids = [number % byte_fallback.vocab_size for number in numbers]
    assert "".join(streamed(byte_fallback, ids)).count(BROKEN) <= byte_fallback.decode(ids).count(BROKEN)


def test_an_emoji_comes_out_with_its_last_byte(byte_fallback: Tokenizer) -> None:
    assert streamed(byte_fallback, bytes_to_ids("👋".encode())) == ["", "", "", "👋", ""]


def test_an_invalid_byte_is_shown_at_once_and_an_incomplete_character_when_it_breaks_off(
    byte_fallback: Tokenizer,
) -> None:
    the = 259
    assert streamed(byte_fallback, [*bytes_to_ids(b"\xff"), the]) == [BROKEN, " the", ""]
    assert streamed(byte_fallback, [*bytes_to_ids(b"\xe2\x82"), the]) == ["", "", f"{BROKEN} the", ""]
    assert streamed(byte_fallback, bytes_to_ids(b"\xe2\x82")) == ["", "", BROKEN]


def test_the_first_space_is_dropped_and_later_ones_stay(byte_fallback: Tokenizer, metaspace: Tokenizer) -> None:
    the, cat, s = 259, 260, 261
    assert streamed(byte_fallback, [the, cat, s, the]) == ["the", " cat", "s", " the", ""]
    ids = metaspace.encode("the cat sat")
    assert "".join(streamed(metaspace, ids)) == "the cat sat"


def test_special_tokens_add_no_text_unless_asked_for(byte_fallback: Tokenizer) -> None:
    the, cat, begin = 259, 260, 1
    assert streamed(byte_fallback, [begin, the, begin, cat]) == ["", "the", "", " cat", ""]
    decoder = StreamDecoder(byte_fallback, skip_special_tokens=False)
    assert decoder.push(begin) == "<s>"
    assert decoder.push(the) == byte_fallback.decode([begin, the], skip_special_tokens=False).removeprefix("<s>")


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "byte_fallback"])
def test_the_work_for_a_token_does_not_grow_with_the_text(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    lengths: list[int] = []
    decode = tokenizer.decode

    def counted(ids: list[int], *, skip_special_tokens: bool = True) -> str:
        lengths.append(len(ids))
        return decode(ids, skip_special_tokens=skip_special_tokens)

    monkeypatch.setattr(tokenizer, "decode", counted)
    streamed(tokenizer, [index % tokenizer.vocab_size for index in range(1000)])
    assert max(lengths, default=0) <= 8
    assert len(lengths) <= 4 * 1000
