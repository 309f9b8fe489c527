"""Tokenizers of models that people run: a bundle's gives the ids, the text and the chats of transformers'."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from helpers.hf_folders import tensors, write
from helpers.real_tokenizers import FILES, PACKAGES, NotFetchedError, real_tokenizer
from helpers.tokenizer_checks import TEXTS, assert_equal, streamed
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.text_files import check_text_files
from shortstack.graphs.errors import RequestError
from shortstack.runtime.text.tokenizer import Tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"

USER = {"role": "user", "content": "What is the weather in Paris?\n  And in Köln? 🌦️"}
SYSTEM = {"role": "system", "content": "You are brief. <b>&amp;</b>"}
ANSWER = {"role": "assistant", "content": "Rain."}
THOUGHT = {"role": "assistant", "content": '<think>\nRain in "Paris"?\n</think>\n\nRain.'}
REASONED = {"role": "assistant", "content": "Rain.", "reasoning_content": "Clouds gather."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "days": [1, 2]}}},
        {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}},
    ],
}
RESULTS = [{"role": "tool", "content": '{"sky": "rain & <wind>"}'}, {"role": "tool", "content": "sun"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city, in °C; 'now' or \"soon\"",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": [USER],
    "a system turn": [SYSTEM, USER],
    "several turns": [SYSTEM, USER, ANSWER, USER, ANSWER, USER],
    "an answer at the end": [USER, ANSWER],
}
QWEN3_CHATS = {
    **CHATS,
    "a thought before": [USER, THOUGHT, USER],
    "a thought at the end": [USER, THOUGHT],
    "reasoning apart": [SYSTEM, USER, REASONED, USER, REASONED],
    "a call of a tool": [USER, CALL],
    "results of tools": [SYSTEM, USER, CALL, *RESULTS],
    "an answer to results": [SYSTEM, USER, CALL, *RESULTS, REASONED, USER],
}


class Pair:
    """The tokenizer that export writes for a folder, and transformers' for the same folder."""

    def __init__(self, name: str, folder: Path) -> None:
        try:
            source = real_tokenizer(name)
        except NotFetchedError as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(str(error))
        checkpoint, out = write(folder / "checkpoint", tensors(), model_type=PACKAGES[name].model_type), folder / "out"
        for file in FILES:
            (checkpoint / file).write_bytes((source / file).read_bytes())
        files = open_checkpoint(str(checkpoint)).files()
        check_text_files(name, files)
        out.mkdir()
        for file, content in files.items():
            (out / file).write_bytes(content)
        self.ours = Tokenizer.load(out)
        self.theirs: Any = AutoTokenizer.from_pretrained(checkpoint)

    def assert_same_chat(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        tools = variables.pop("tools", None)
        for opens in (True, False):
            given = {"add_generation_prompt": opens, "tools": tools}
            wanted = self.theirs.apply_chat_template(messages, tokenize=False, **given, **variables)
            assert self.ours.render_chat(messages, **given, variables=variables) == wanted
            ids = self.ours.encode_chat(messages, **given, variables=variables)
            assert ids == self.theirs(wanted, add_special_tokens=False)["input_ids"]
        return str(wanted)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    class Made(dict[str, Pair]):
        def __missing__(self, name: str) -> Pair:
            self[name] = Pair(name, tmp_path_factory.mktemp(name))
            return self[name]

    return Made()


@pytest.mark.parametrize("name", PACKAGES)
def test_ids_text_and_streamed_text_are_those_of_transformers(pairs: dict[str, Pair], name: str) -> None:
    assert assert_equal(pairs[name].ours, pairs[name].theirs) > len(TEXTS)


@pytest.mark.parametrize("name", PACKAGES)
def test_no_streamed_piece_breaks_a_character(pairs: dict[str, Pair], name: str) -> None:
    tokenizer = pairs[name].ours
    for text in TEXTS:
        assert not [piece for piece in streamed(tokenizer, tokenizer.encode(text), True) if BROKEN in piece], text


@pytest.mark.parametrize("name", PACKAGES)
def test_special_tokens_are_those_of_transformers(pairs: dict[str, Pair], name: str) -> None:
    ours, theirs = pairs[name].ours, pairs[name].theirs
    assert ours.special_ids >= set(theirs.all_special_ids)
    assert theirs.eos_token_id in ours.eos_token_ids
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("chat", QWEN3_CHATS)
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": True}, {"enable_thinking": False}, {"tools": TOOLS}])
def test_chats_of_qwen3(pairs: dict[str, Pair], chat: str, variables: dict[str, Any]) -> None:
    pairs["qwen3"].assert_same_chat(QWEN3_CHATS[chat], **variables)


def test_the_thinking_of_qwen3_is_switched_off(pairs: dict[str, Pair]) -> None:
    render = pairs["qwen3"].ours.render_chat
    assert render([USER], variables={"enable_thinking": False}).endswith("<think>\n\n</think>\n\n")
    assert render([USER], variables={"enable_thinking": True}) == render([USER])
    assert "enable_thinking" in pairs["qwen3"].ours.template_variables
    assert not pairs["gemma3"].ours.template_variables & {"enable_thinking", "messages", "bos_token", "raise_exception"}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", ["gemma3", "llama3"])
def test_chats_of_gemma3_and_llama3(pairs: dict[str, Pair], name: str, chat: str) -> None:
    pairs[name].assert_same_chat(CHATS[chat])


PARTS = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, USER, ANSWER]
PARTS += [{"role": "user", "content": [{"type": "text", "text": " one "}, {"type": "text", "text": "two"}]}]


def test_text_parts_reach_the_template_of_gemma3_that_knows_them(pairs: dict[str, Pair]) -> None:
    assert "<start_of_turn>user\nonetwo<end_of_turn>" in pairs["gemma3"].assert_same_chat(PARTS)


def test_text_parts_are_joined_for_the_template_of_qwen3_that_knows_none(pairs: dict[str, Pair]) -> None:
    assert "<|im_start|>user\n one \ntwo<|im_end|>" in pairs["qwen3"].ours.render_chat(PARTS)


@pytest.mark.parametrize("messages", [[USER, USER], [ANSWER], [USER, SYSTEM, ANSWER], [SYSTEM, ANSWER]])
def test_what_the_template_of_gemma3_refuses_is_said_in_its_words(
    pairs: dict[str, Pair], messages: list[dict[str, Any]]
) -> None:
    says = "the chat template refused the messages: Conversation roles must alternate user/assistant/user/assistant/..."
    with pytest.raises(RequestError) as refused:
        pairs["gemma3"].ours.render_chat(messages)
    assert str(refused.value).startswith(says)
    assert "\n" not in str(refused.value)
    with pytest.raises(Exception, match="Conversation roles must alternate"):
        pairs["gemma3"].theirs.apply_chat_template(messages, tokenize=False)


def test_messages_reach_the_template_as_json_says_them(pairs: dict[str, Pair]) -> None:
    again = json.loads(json.dumps(QWEN3_CHATS["results of tools"]))
    render = pairs["qwen3"].ours.render_chat
    assert render(again, tools=TOOLS) == render(QWEN3_CHATS["results of tools"], tools=TOOLS)
