"""Arguments of the public Python API of a type or form that it does not take: each is refused by name, in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.tiny_models import BASE
from shortstack import (
    DraftPolicy,
    ExitEarly,
    ExitPolicy,
    Placement,
    Request,
    SamplingParams,
    Speculate,
    parse_criterion,
)
from shortstack.graphs.errors import RequestError
from shortstack.runtime import Model, load

CHAT = {"role": "user", "content": "Hi"}
RULE = parse_criterion("top_prob >= 0.9")


def refused(call: Callable[[], object], *says: str) -> None:
    with pytest.raises(RequestError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400, message
    for words in says:
        assert words in message, message


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (None, ("the prompt: found None", "text, a list of token ids, or a list of chat messages")),
        (3, ("the prompt: found 3",)),
        (b"Hello", ("the prompt is bytes", 'prompt.decode("utf-8")')),
        (bytearray(b"Hello"), ("the prompt is bytes",)),
        (memoryview(b"Hello"), ("the prompt is bytes",)),
        (CHAT, ("the prompt is one mapping", "'role': 'user'", "ut the message in a list")),
        ({1, 2}, ("the prompt: found {1, 2}", "A set is none of these")),
        (iter([1, 2]), ("a list of token ids",)),
        ([[1, 2]], ("index 0: found [1, 2]", "one dimension")),
        ([5, True], ("index 1: found True",)),
        ([5, 6.0], ("index 1: found 6.0",)),
        ([5, None], ("index 1: found None",)),
        (["Hello"], ("index 0: found 'Hello'", "text as one string")),
        ([b"Hello"], ("index 0: found b'Hello'",)),
        ([5, CHAT], ("mixes chat messages and token ids",)),
        ([5, -1], ("outside the vocabulary: found -1",)),
        ([2**70], ("outside the vocabulary",)),
        (np.array([5.0, 6.0]), ("index 0: found 5.0", "whole numbers")),
        (np.array([[5, 6]]), ("found [5, 6]", "one dimension")),
        (np.array(5), ("the prompt: found array(5)",)),
        (np.array([True]), ("found True",)),
        (np.array(["Hi"]), ("found 'Hi'",)),
        (np.array([], np.int64), ("the prompt is empty",)),
        (Path("prompt.txt"), ("the prompt: found", "prompt.txt")),
        ("x" * 100_000 + "\ud800", ("not UTF-8",)),
    ],
)
def test_a_prompt_that_is_no_text_ids_or_messages(model: Model, prompt: Any, says: tuple[str, ...]) -> None:
    for call in (model.encode, model.generate, model.stream):
        refused(lambda call=call: call(prompt), *says)  # type: ignore[misc]


@pytest.mark.parametrize("kind", [list, tuple, range, np.int32, np.int64, np.uint8, "int64 items"])
def test_token_ids_may_come_in_any_list_or_array_of_whole_numbers(model: Model, kind: Any) -> None:
    expected = model.generate([5, 6, 7], max_new_tokens=4).tokens
    if kind is range:
        prompt: Any = range(5, 8)
    elif kind == "int64 items":
        prompt = [np.int64(5), np.int64(6), np.int64(7)]
    elif kind in (list, tuple):
        prompt = kind([5, 6, 7])
    else:
        prompt = np.array([5, 6, 7], kind)
    assert model.encode(prompt) == [5, 6, 7]
    assert model.generate(prompt, max_new_tokens=np.int64(4)).tokens == expected


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": "8"}, ("max_new_tokens: found '8'", "a whole number")),
        ({"max_new_tokens": 8.0}, ("max_new_tokens: found 8.0",)),
        ({"max_new_tokens": True}, ("max_new_tokens: found True",)),
        ({"temperature": "hot"}, ("temperature", "'hot'")),
        ({"temperature": True}, ("temperature", "True")),
        ({"temperature": 1.0, "top_k": 2.0}, ("top_k", "2.0")),
        ({"temperature": 1.0, "seed": 1.5}, ("seed", "1.5")),
        ({"seed": 7}, ("seed would have no effect", "temperature above 0")),
        ({"top_k": 5, "top_p": 0.9, "min_p": 0.1}, ("top_k, top_p, min_p would have no effect",)),
        ({"sampling": SamplingParams(seed=7)}, ("seed would have no effect",)),
        ({"sampling": {"temperature": 1.0}}, ("sampling: found {'temperature': 1.0}", "SamplingParams")),
        ({"strategy": 3}, ("strategy: found 3", "'early-exit'")),
        ({"sampling": np.zeros((30, 30))}, ("sampling: found array([[0.",)),
        ({"strategy": ["plain"]}, ("strategy: found ['plain']",)),
        ({"strategy": np.array(["plain", "plain"])}, ("strategy",)),
        ({"strategy": Speculate}, ("strategy", "Speculate()")),
        ({"exit_layer": "1"}, ("exit_layer: found '1'", "a number of layers")),
        ({"exit_layer": True}, ("exit_layer: found True",)),
        ({"draft": 4}, ("draft: found 4", "DraftPolicy")),
        ({"exits": 0.9}, ("exit criterion: found 0.9", "parse_criterion(")),
        ({"exits": b"always"}, ("exit criterion: found b'always'",)),
        ({"stop": None}, ("stop strings: found None", "a list of strings")),
        ({"stop": "x"}, ("stop strings: found 'x'",)),
        ({"stop": 5}, ("stop strings: found 5",)),
        ({"stop": [5]}, ("stop strings: found [5]",)),
        ({"stop": {"x": "y"}}, ("stop strings",)),
        ({"ignore_eos": "no"}, ("ignore_eos: found 'no'", "True or False")),
        ({"reuse_cache": 1}, ("reuse_cache: found 1", "True or False")),
        ({"tools": {"name": "f"}}, ("tools", "a list of JSON schemas")),
        ({"tools": ["f"]}, ("tools", "a list of JSON schemas")),
        ({"template_variables": ["x"]}, ("template_variables", "Mapping or None")),
        ({"max_tokens": 8}, ("unknown option max_tokens", "max_new_tokens")),
    ],
)
def test_an_option_of_a_generation(model: Model, options: dict[str, Any], says: tuple[str, ...]) -> None:
    before = model.generate([5, 6, 7], max_new_tokens=4).tokens
    refused(lambda: model.generate([5, 6, 7], **options), *says)
    assert model.generate([5, 6, 7], max_new_tokens=4).tokens == before


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ExitPolicy("top_prob >= 0.5"), ("exit criterion", "parse_criterion('top_prob >= 0.9')")),
        (lambda: ExitPolicy(None), ("exit criterion: found None",)),
        (lambda: ExitPolicy(RULE, exit_layers=8), ("exit_layers: found 8", "(4, 8)")),
        (lambda: ExitPolicy(RULE, exit_layers="48"), ("exit_layers: found '48'",)),
        (lambda: ExitPolicy(RULE, exit_layers=(4.0,)), ("exit_layers: found (4.0,)",)),
        (lambda: ExitPolicy(RULE, exit_layers=()), ("exit_layers is empty",)),
        (lambda: ExitPolicy(RULE, verify=["exact"]), ("verify: found ['exact']", "rollback")),
        (lambda: ExitPolicy(RULE, verify=True), ("verify: found True",)),
        (lambda: ExitPolicy(RULE, kv_policy=None), ("kv_policy: found None", "pipeline")),
        (lambda: ExitPolicy(RULE, verify="rollback", rollback_below="5%"), ("rollback_below", "'5%'")),
        (lambda: ExitPolicy(RULE, max_pending=2.5), ("max_pending: found 2.5",)),
        (lambda: ExitPolicy(RULE, max_pending=True), ("max_pending: found True",)),
        (lambda: ExitPolicy(RULE, prefill_exit=1), ("prefill_exit: found 1", "True or False")),
        (lambda: parse_criterion(0.9), ("exit criterion: found 0.9", "text such as")),
        (lambda: parse_criterion(None), ("exit criterion: found None",)),
        (lambda: DraftPolicy("4"), ("max_draft_tokens: found '4'", "1..15")),
        (lambda: DraftPolicy(4.0), ("max_draft_tokens: found 4.0",)),
        (lambda: DraftPolicy(True), ("max_draft_tokens: found True",)),
        (lambda: DraftPolicy(confidence="0.5"), ("confidence: found '0.5'", "0..1")),
        (lambda: DraftPolicy(confidence=float("nan")), ("confidence: found nan",)),
        (lambda: DraftPolicy(is_adaptive="yes"), ("is_adaptive: found 'yes'",)),
        (lambda: SamplingParams(temperature=None), ("temperature", "None")),
        (lambda: Speculate("8"), ("exit_layer: found '8'",)),
        (lambda: Speculate(source="lookup"), ("source: found 'lookup'", "DraftSource")),
        (lambda: ExitEarly(RULE), ("policy", "ExitPolicy")),
        (lambda: Placement(3), ("providers: found 3", '["cuda", "cpu"]')),
        (lambda: Placement((3,)), ("providers: found (3,)",)),
        (lambda: Placement(threads="2"), ("threads: found '2'",)),
        (lambda: Placement(threads=0), ("threads: found 0",)),
        (lambda: Request(None), ("the prompt: found None",)),
        (lambda: Request("Hi", 3), ("strategy: found 3", "Plain or Speculate or ExitEarly")),
    ],
)
def test_a_value_of_the_public_types(make: Callable[[], object], says: tuple[str, ...]) -> None:
    refused(make, *says)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"threads": "2"}, ("threads: found '2'", "1..1024")),
        ({"threads": 2.0}, ("threads: found 2.0",)),
        ({"threads": True}, ("threads: found True",)),
        ({"providers": 3}, ("providers: found 3", "a list of names")),
        ({"providers": ["cpu", 3]}, ("providers: found ['cpu', 3]",)),
        ({"providers": b"cpu"}, ("providers: found b'cpu'",)),
        ({"upper": "cpu"}, ("upper: found 'cpu'", "Placement(...)")),
        ({"prefill_passes": [9]}, ("passes over a prompt: found [9]",)),
        ({"prefill_passes": np.array([1, 2])}, ("passes over a prompt",)),
        ({"prefill_passes": 2.0}, ("passes over a prompt: found 2.0",)),
        ({"verify_hashes": "yes"}, ("verify_hashes: found 'yes'",)),
    ],
)
def test_an_option_of_load(sound: Path, options: dict[str, Any], says: tuple[str, ...]) -> None:
    refused(lambda: load(sound, **options), *says)


@pytest.mark.parametrize("path", [None, 3, b"bundle", ["bundle"]])
def test_a_path_that_is_none(path: Any) -> None:
    refused(lambda: load(path), "path of a bundle", "text or a pathlib.Path")


def test_other_methods_of_a_model(model: Model) -> None:
    refused(lambda: model.start("Hi"), "request: found 'Hi'", "Request(...)")  # type: ignore[arg-type]
    refused(lambda: model.activations("Hi"), "tokens of a text: found 'Hi'", "encode(...)")  # type: ignore[arg-type]
    refused(lambda: model.activations([5, 10**6]), "outside the vocabulary")
    refused(lambda: model.activations([5] * 1000), "tokens of a text: found 1000")
    refused(lambda: model.activations([5, 6], np.zeros((1, BASE.hidden))), "states: found (1, ", f"[2, {BASE.hidden}]")
    for layers in ("1", 2, [1, 2], 1.0, True, [[1]]):
        refused(lambda layers=layers: model.exclusive_stack(layers), "exit_layers", "[1, 3]")  # type: ignore[misc]
    refused(lambda: Model("bundle"), "bundle: found 'bundle'", "load() takes a path")  # type: ignore[arg-type]
