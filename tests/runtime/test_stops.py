"""Where a text ends, on real graphs: stop strings with special tokens and stop ids, compared with transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.tiny_models import TinyBundles, TinyModel
from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec
from shortstack.runtime import Model, load
from shortstack.runtime.commands.generate import generate

TINY = TinyModel("stops", vocab=259)  # one token per byte, so any of them can be renamed
PROMPT = [40, 77, 120, 9, 200] * 3
TOKENS = 24
MARK = "<|mark|>"
STRATEGIES: list[dict[str, Any]] = [
    {},
    {"exit_layer": 1},
    {"exits": "top_prob >= 0"},
]


@pytest.fixture(scope="module")
def made(tiny_bundles: TinyBundles, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint whose fourth greedy token is the special token MARK, and its bundle."""
    checkpoint = tiny_bundles.checkpoint(TINY)
    with load(tiny_bundles.bundle(TINY, 1)) as model:
        said = model.generate(PROMPT, max_new_tokens=TOKENS, ignore_eos=True).tokens
    mark = said[3]
    assert mark not in said[:3]
    assert mark > 2
    folder = tmp_path_factory.mktemp("stops")
    shutil.copytree(checkpoint, folder / "checkpoint")
    file = folder / "checkpoint" / "tokenizer.json"
    data = json.loads(file.read_text("utf-8"))
    vocab = data["model"]["vocab"]
    name = next(token for token, token_id in vocab.items() if token_id == mark)
    vocab[MARK] = vocab.pop(name)
    data["added_tokens"].append({**data["added_tokens"][0], "id": mark, "content": MARK})
    file.write_text(json.dumps(data), encoding="utf-8")
    export_bundle(ExportSpec(str(folder / "checkpoint"), folder / "bundle", (1,)))
    return folder / "checkpoint", folder / "bundle"


@pytest.fixture(scope="module")
def marked(made: tuple[Path, Path]) -> Model:
    return load(made[1])


def transformers_tokens(checkpoint: Path, **options: Any) -> int:
    """How many tokens transformers generates from PROMPT."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = torch.tensor([PROMPT])
    mask = torch.ones_like(ids)
    said = model.generate(
        ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, tokenizer=tokenizer, pad_token_id=0, **options
    )
    return said.shape[1] - len(PROMPT)


def test_a_stop_string_that_is_a_special_token_ends_the_text_where_transformers_ends_it(
    made: tuple[Path, Path], marked: Model
) -> None:
    expected = transformers_tokens(made[0], stop_strings=[MARK])
    assert expected == 4
    for options in STRATEGIES[:2]:
        result = marked.generate(PROMPT, max_new_tokens=TOKENS, stop=[MARK], **options)
        assert (len(result.tokens), result.finish_reason) == (expected, "stop")


@pytest.mark.parametrize("length", [1, 3])
def test_a_stop_string_across_a_special_token_and_text_ends_every_strategy_at_the_same_token(
    marked: Model, length: int
) -> None:
    whole = marked.generate(PROMPT, max_new_tokens=TOKENS).tokens
    stop = marked.tokenizer.decode(whole[2 : 4 + length], skip_special_tokens=False)
    assert MARK in stop
    for options in STRATEGIES[:2]:
        result = marked.generate(PROMPT, max_new_tokens=TOKENS, stop=[stop], **options)
        assert result.tokens == whole[: 4 + length]
        assert (result.finish_reason, MARK in result.text) == ("stop", False)


@pytest.mark.parametrize("options", STRATEGIES, ids=["plain", "self-speculative", "early-exit"])
def test_every_strategy_ends_at_the_first_stop_of_its_own_tokens(marked: Model, options: dict[str, Any]) -> None:
    whole = marked.generate(PROMPT, max_new_tokens=TOKENS, ignore_eos=True, **options).tokens
    stop_id = next(token for token in whole[4:] if token not in whole[:4])
    end = whole.index(stop_id) + 1
    result = marked.generate(PROMPT, max_new_tokens=TOKENS, ignore_eos=True, stop_token_ids=[stop_id], **options)
    assert (result.tokens, result.finish_reason) == (whole[:end], "stop")
    assert result.text == marked.tokenizer.decode(whole[: end - 1])


def test_a_stop_id_ends_the_text_where_transformers_ends_it(made: tuple[Path, Path], marked: Model) -> None:
    whole = marked.generate(PROMPT, max_new_tokens=TOKENS).tokens
    expected = transformers_tokens(made[0], eos_token_id=[0, whole[3]])
    assert len(marked.generate(PROMPT, max_new_tokens=TOKENS, stop_token_ids=[whole[3]]).tokens) == expected == 4


def test_the_command_line_takes_stop_strings_of_special_tokens_and_stop_ids(made: tuple[Path, Path]) -> None:
    command = [str(made[1]), "Hello", "--raw", "--json", "-n", "16"]
    whole = json.loads(CliRunner().invoke(generate, command).stdout)["tokens"]
    stop_id = next(token for token in whole[3:] if token not in whole[:3])
    told = json.loads(CliRunner().invoke(generate, [*command, "--stop-id", str(stop_id)]).stdout)
    assert (told["tokens"], told["finish_reason"]) == (whole[: whole.index(stop_id) + 1], "stop")
