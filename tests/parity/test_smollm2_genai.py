"""SmolLM2-135M-Instruct as onnxruntime-genai runs it, from the weights of its bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.genai import TOKENS, genai_tokens, need_genai, segment_tokens
from shortstack.graphs.texts.prompts import prompts
from shortstack.quant.assemble import quantize_bundle
from shortstack.quant.presets import find_preset
from shortstack.quant.spec import QuantizeSpec
from shortstack.runtime import Model, load

PROMPTS = 2


@pytest.fixture(scope="module")
def asked(model: Model) -> list[list[int]]:
    need_genai()
    return [model.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in prompts(PROMPTS)]


def before_the_end(model: Model, tokens: list[int]) -> list[int]:
    return tokens[:-1] if tokens[-1] in model.tokenizer.eos_token_ids else tokens


def plain(model: Model, prompt: list[int]) -> list[int]:
    return before_the_end(model, list(model.generate(prompt, max_new_tokens=TOKENS).tokens))


def test_genai_decodes_the_tokens_of_plain_decoding_in_float32(model: Model, asked: list[list[int]]) -> None:
    for prompt in asked:
        found = genai_tokens(model.bundle.folder, prompt)
        assert before_the_end(model, found) == plain(model, prompt)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_genai_decodes_the_tokens_of_the_quantized_graphs(
    name: str, smollm2_bundle: Path, kept: Callable[..., Path], asked: list[list[int]]
) -> None:
    def quantize(out: Path) -> None:
        preset = replace(find_preset(name), method="rtn")
        quantize_bundle(QuantizeSpec(smollm2_bundle, out, preset, calibration_tokens=1024, overwrite=True))

    folder = kept(f"smollm2-genai-{name}", ("graphs/", "export/", "quant/"), smollm2_bundle.name, quantize)
    model = load(folder)
    for prompt in asked:
        found = before_the_end(model, genai_tokens(folder, prompt))
        assert found == segment_tokens(folder, prompt)[: len(found)]
        if name == "int8":  # with 4 bits, some processors round a row that runs alone differently; ours never does
            assert found == plain(model, prompt)
