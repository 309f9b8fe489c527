"""The tokens that end a generation are those of llama.cpp: by the file's fields and by their texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer

from helpers.gguf_files import weights, write
from shortstack.export.checkpoint import open_checkpoint
from shortstack.graphs.errors import CheckpointError


def files_of(tmp_path: Path, tokens: Sequence[str], types: Sequence[int] = (), **ids: int) -> dict[str, bytes]:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(list(tokens))
        writer.add_token_types(list(types) or [3] * len(tokens))
        for field, index in ids.items():
            writer.add_uint32(f"tokenizer.ggml.{field}_token_id", index)

    return open_checkpoint(str(write(tmp_path / "m.gguf", weights(), edit=edit))).files()


def ends_of(tmp_path: Path, tokens: Sequence[str], **ids: int) -> Any:
    return json.loads(files_of(tmp_path, tokens, **ids)["generation_config.json"]).get("eos_token_id")


@pytest.mark.parametrize(
    "text",
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "<|eom_id|>",
        "<|endoftext|>",
        "<EOT>",
        "<eos>",
        "<|fim_pad|>",
        "<|file_sep|>",
    ],
)
def test_a_chat_turn_ends_at_a_token_that_no_field_names(tmp_path: Path, text: str) -> None:
    assert ends_of(tmp_path, ["a", "<end>", text], eos=1) == [1, 2]


def test_the_end_of_sequence_comes_first_and_no_id_comes_twice(tmp_path: Path) -> None:
    tokens = ["</s>", "<|eot_id|>", "<|im_end|>", "x", "y"]
    assert ends_of(tmp_path, tokens, eos=2, eot=3, eom=2) == [2, 3, 1, 0]


def test_an_infilling_mark_counts_by_its_text_only_where_no_field_names_it(tmp_path: Path) -> None:
    assert ends_of(tmp_path, ["</s>", "<|fim_pad|>", "x"], eos=0, fim_pad=2) == [0, 2]


def test_a_field_beyond_the_vocabulary_is_ignored(tmp_path: Path) -> None:
    assert ends_of(tmp_path, ["</s>", "x"], eos=0, eot=77) == 0


def test_marks_inside_an_answer_do_not_end_it(tmp_path: Path) -> None:
    assert ends_of(tmp_path, ["<|return|>", "<|call|>", "<|end|>"], eos=0) == [0, 1]
    assert ends_of(tmp_path, ["<eos>", "</s>", "<|tool_response>"], eos=0) == [0, 2]


def test_an_end_token_of_the_wrong_type_is_special_all_the_same(tmp_path: Path) -> None:
    files = files_of(tmp_path, ["a", "</s>", "<|im_end|>"], [1, 3, 1], eos=1)
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert tokenizer.encode("a<|im_end|>").ids == [0, 2]
    assert tokenizer.decode([0, 2]) == "a"


def test_repeated_tokens_are_explained(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        files_of(tmp_path, ["</s>", "x", "y", "x", "y"], eos=0)
    said = str(caught.value)
    assert "tokenizer.ggml.tokens: found 'x' as token 1 and as token 3 (2 repeats in all)" in said
    assert "expected each text once" in said
    assert "Export from the model's safetensors" in said


def test_tokens_without_a_text_are_not_repeats_of_each_other(tmp_path: Path) -> None:
    files = files_of(tmp_path, ["</s>", "", "", "x"], [3, 1, 1, 1], eos=0)
    assert Tokenizer.from_str(files["tokenizer.json"].decode()).get_vocab_size() == 4


def test_an_entry_of_another_type_is_named(tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_array("tokenizer.ggml.tokens", [1, 2])

    checkpoint = write(tmp_path / "m.gguf", weights(), edit=edit)
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.tokens, entry 0: found 1, expected a list of texts"):
        open_checkpoint(str(checkpoint)).files()
