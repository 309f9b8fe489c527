"""A request that is not valid gives one line with the option and a remedy, and exit code 2."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.bad_input import MAX_LENGTH, Refused
from helpers.tiny_models import BASE, SPECULATOR, TinyBundles, TinyModel
from shortstack.graphs.errors import (
    RequestError,
)
from shortstack.runtime import DraftPolicy, Model, SamplingParams

DRAFTING = ("--strategy", "self-speculative")
SAMPLING = ("--temperature", 1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("Hello", *DRAFTING, "--exit-layer", 2), ("exit_layer", "found 2", "[1, 3]", "--exit-layer 2")),
        (("Hello", *DRAFTING, "-e", 0), ("exit_layer", "found 0", "[1, 3]")),
        (("Hello", "--provider", "abacus"), ("provider 'abacus'", "CPUExecutionProvider", "hoose one")),
        (("", "--raw"), ("the prompt is empty", "ive at least one token")),
        (("",), ("the prompt is empty",)),
        ((" \n",), ("the prompt is empty",)),
        (("word " * 100, "--raw"), ("too long", f"fewer than {MAX_LENGTH}", "--max-length")),
        (("Hello", "-n", 0), ("max_new_tokens", "found 0", "1 or more")),
        (("Hello", *DRAFTING, "-k", 0), ("max_draft_tokens", "found 0", "1..15")),
        (("Hello", *DRAFTING, "-k", 16), ("max_draft_tokens", "found 16", "1..15")),
        (("Hello", *DRAFTING, "--confidence", 1.5), ("confidence", "1.5", "0..1")),
        (("Hello", *DRAFTING, "--confidence", "nan"), ("confidence", "nan", "0..1")),
        (("Hello", "--temperature", -1), ("temperature", "-1", "0 (greedy)")),
        (("Hello", "--temperature", "nan"), ("temperature", "nan", "0 (greedy)")),
        (("Hello", "--temperature", "inf"), ("temperature", "inf", "0 (greedy)")),
        (("Hello", *SAMPLING, "--top-p", 1.1), ("top_p", "1.1", "from 0 to 1")),
        (("Hello", *SAMPLING, "--top-k", -1), ("top_k", "-1", "0 (off) or more")),
        (("Hello", *SAMPLING, "--min-p", -0.1), ("min_p", "-0.1", "from 0 to 1")),
        (("Hello", "--repetition-penalty", 0), ("repetition_penalty", "0", "1 is off")),
        (("Hello", *SAMPLING, "--seed", -1), ("seed", "-1", "0 or more")),
        (("Hello", *SAMPLING, "--top-p", 2, "--min-p", 2), ("top_p", "min_p")),
        (("Hello", "--threads", 0), ("threads", "found 0", "expected 1")),
        (("Hello", "--stop", ""), ("stop string", "at least one character")),
        (("Hello", "--stop-id", -1), ("stop_token_ids", "-1", "a sequence of token ids")),
        (("Hello", "--stop-id", 300), ("stop_token_ids", "found 300", "0..299")),
        (("Hello", "--raw", "--system", "x"), ("--system", "--raw")),
        (("Hello", "-e", 1), ("--exit-layer would have no effect", "--strategy self-speculative")),
        (("Hello", "--top-p", 0.9), ("--top-p would have no effect", "--temperature")),
        (("Hello", "--compare", "--strategy", "plain"), ("--compare", "rop --strategy")),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_by_option(
    sound: Path, refused: Refused, options: tuple[str | int | float, ...], says: tuple[str, ...]
) -> None:
    refused(["generate", sound, *map(str, options)], *says)


def test_an_uncut_bundle_has_no_exit_that_drafts(tiny_bundles: TinyBundles, refused: Refused) -> None:
    whole = tiny_bundles.bundle(BASE)
    refused(["generate", whole, "Hi", *DRAFTING, "--draft", "exit"], "has none", "--exit-layer E")
    refused(["generate", whole, "Hi", *DRAFTING, "-e", 1], "this bundle has none", "--exit-layer 1")


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ([], {}, "empty"),
        ("", {}, "empty"),
        ([3, -1], {}, r"outside the vocabulary: found -1, expected 0\.\.299"),
        ([3, 300], {}, r"outside the vocabulary: found 300, expected 0\.\.299"),
        ([3] * MAX_LENGTH, {}, "too long"),
        ([{"role": "user"}, 3], {}, "mix"),
        (["Hello"], {}, "token id"),
        ([1.5], {}, "token id"),
        ("Hello", {"strategy": "psychic"}, "strategy: found 'psychic'"),
        ("Hello", {"exit_layer": 2}, "exit_layer"),
        ("Hello", {"max_new_tokens": -1}, "max_new_tokens"),
        ("Hello", {"stop": ["", "x"]}, "stop"),
        ("Hello", {"stop": "x"}, "stop"),
        ("Hello", {"stop_token_ids": [300]}, r"stop_token_ids: .* found 300, expected 0\.\.299"),
        ("Hello", {"stop_token_ids": 5}, "stop_token_ids: found 5, expected a sequence of token ids"),
        ("Hello", {"stop_token_ids": "</s>"}, "stop_token_ids: found '</s>', .* Give texts as `stop`"),
        ("Hello", {"stop_token_ids": [True]}, "stop_token_ids"),
    ],
)
def test_the_python_api_refuses_the_same_and_stays_usable(
    model: Model, prompt: Any, options: dict[str, Any], says: str
) -> None:
    before = model.generate([5, 6, 7], max_new_tokens=4).tokens
    with pytest.raises(RequestError, match=says):
        model.generate(prompt, **options)
    assert model.generate([5, 6, 7], max_new_tokens=4).tokens == before


def test_options_are_checked_when_they_are_created() -> None:
    for make in (
        lambda: DraftPolicy(0),
        lambda: DraftPolicy(4, confidence=-0.5),
        lambda: SamplingParams(temperature=-1.0),
        lambda: SamplingParams(top_p=float("nan")),
    ):
        with pytest.raises(RequestError):
            make()


# Parity options that are not valid


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--prompts", 0), ("--prompts", "found 0")),
        (("--prompts", 1000), ("--prompts", "found 1000")),
        (("--greedy-tokens", -1), ("--greedy-tokens", "found -1")),
        (("--text", "no.txt"), ("--text no.txt", "UTF-8 text file")),
        (("--text", "empty.txt"), ("--text empty.txt", "one prompt per line")),
        (("--text", "long.txt"), ("too long", "--max-length")),
    ],
)
def test_a_parity_check_that_cannot_run_is_refused_by_option(
    tiny_bundles: TinyBundles,
    sound: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Refused,
    options: tuple[str | int, ...],
    says: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n\n")
    Path("long.txt").write_text("word " * 100)
    refused(["parity", tiny_bundles.checkpoint(BASE), sound, *map(str, options)], *says)


@pytest.mark.parametrize("other", [SPECULATOR, replace(BASE, name="wide", vocab=310)], ids=lambda tiny: tiny.name)
def test_a_parity_check_against_another_model_is_refused(
    tiny_bundles: TinyBundles, refused: Refused, other: TinyModel
) -> None:
    bundle = tiny_bundles.bundle(BASE, 2)
    error = refused(["parity", tiny_bundles.checkpoint(other), bundle, "--greedy-tokens", 0], "ive the checkpoint that")
    assert "the length of layers is 4 in the bundle and 6" in error or "vocab_size" in error
