"""SmolLM2-135M-Instruct quantized by the presets that have a name: still exact among themselves, and how good."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from shortstack.__main__ import run
from shortstack.graphs.texts import HELDOUT_TEXT
from shortstack.graphs.texts.prompts import prompts
from shortstack.quant.assemble import quantize_bundle
from shortstack.quant.presets import find_preset
from shortstack.quant.quality_report import make_report
from shortstack.quant.spec import QuantizeSpec, ReportSpec
from shortstack.quant.texts import read_rows
from shortstack.runtime import DraftPolicy, Model, load
from shortstack.runtime.commands.row_check import check_rows

NAMES = ["int4", "int8"]
LAYERS = 30
# (exit, drafted tokens, bonus): one for each prompt in turn.
FORMS = list(product((4, 8, 15), (1, 2, 4), (False, True)))
TOKENS = 24
# Fewer than the command's default: a little worse, within the same bound. A slow test takes the default.
CALIBRATION_TOKENS = 2048
# Over 2048 tokens the perplexity of int8 wanders by its whole bound.
HELDOUT_TOKENS = {"int4": 2048, "int8": 4096}
# What the slow tests decode.
MANY_PROMPTS, MANY_TOKENS = 30, 64
MANY_HELDOUT_TOKENS = 8192


@dataclass
class Quantized:
    name: str
    model: Model
    total_bytes: int


@pytest.fixture(scope="session", params=NAMES)
def quantized(request: pytest.FixtureRequest, smollm2_bundle: Path, kept: Callable[..., Path]) -> Quantized:
    name: str = request.param

    def quantize(out: Path) -> None:
        preset, tokens = find_preset(name), CALIBRATION_TOKENS
        quantize_bundle(QuantizeSpec(smollm2_bundle, out, preset, calibration_tokens=tokens, overwrite=True))

    rooms = ("graphs/", "export/", "quant/", "runtime/text/")
    out = kept(f"smollm2-{name}", rooms, (smollm2_bundle.name, CALIBRATION_TOKENS), quantize)
    model = load(out)
    return Quantized(name, model, sum(entry.bytes for entry in model.bundle.manifest.files.values()))


def losses(model: Model, tokens: int) -> np.ndarray:
    """Negative log likelihoods of the held-out text's beginning, in nats, row after row."""
    found = []
    for row in read_rows(HELDOUT_TEXT, "--heldout", model.tokenizer, tokens):
        logits = model.activations(row.tolist()).heads[LAYERS][:-1]
        top = logits.max(axis=1)
        norms = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        found.append(norms - logits[np.arange(len(logits)), row[1:]])
    return np.concatenate(found)


@pytest.fixture(scope="session")
def float_losses(model: Model) -> np.ndarray:
    return losses(model, max(HELDOUT_TOKENS.values()))


def test_self_speculation_equals_plain_decoding_token_for_token(quantized: Quantized) -> None:
    compare_drafted_with_plain(quantized.model, len(FORMS), TOKENS)


@pytest.mark.slow
def test_self_speculation_equals_plain_decoding_in_long_texts(quantized: Quantized) -> None:
    compare_drafted_with_plain(quantized.model, MANY_PROMPTS, MANY_TOKENS)


def compare_drafted_with_plain(model: Model, count: int, tokens: int) -> None:
    for index, text in enumerate(prompts(count)):
        chat = [{"role": "user", "content": text}]
        plain = model.generate(chat, max_new_tokens=tokens, ignore_eos=True)
        exit_layer, k, bonus = FORMS[index % len(FORMS)]
        drafted = model.generate(
            chat,
            max_new_tokens=tokens,
            ignore_eos=True,
            strategy="self-speculative",
            exit_layer=exit_layer,
            draft=DraftPolicy(k, has_bonus=bonus),
        )
        assert drafted.tokens == plain.tokens, f"prompt {index}, exit {exit_layer}, {k} drafted, bonus {bonus}"
        assert drafted.stats.drafted > 0


def test_rows_of_one_run_equal_rows_run_one_by_one_bit_for_bit(quantized: Quantized) -> None:
    model = quantized.model
    text = model.tokenizer.encode(" ".join(prompts(8)))
    for length in (9, 40, 300):
        assert all(check.is_exact for check in check_rows(model, text[:length]))


@pytest.mark.slow
def test_a_preset_computes_what_pytorch_computes_with_its_weights(quantized: Quantized, smollm2_gguf: Path) -> None:
    command = ["parity", str(smollm2_gguf), str(quantized.model.bundle.folder), "--prompts", "2"]
    assert run([*command, "--greedy-tokens", "8"]) == 0


def test_the_named_presets_keep_what_they_promise(quantized: Quantized, float_losses: np.ndarray) -> None:
    found = losses(quantized.model, HELDOUT_TOKENS[quantized.name])
    change = np.exp(found.mean() - float_losses[: len(found)].mean()) - 1
    assert_promise(quantized.name, float(change), quantized.total_bytes)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_report_shows_what_the_preset_promises(smollm2_bundle: Path, tmp_path: Path, name: str) -> None:
    bundle = quantize_bundle(QuantizeSpec(smollm2_bundle, tmp_path / name, find_preset(name)))
    quality = make_report(ReportSpec(smollm2_bundle, tmp_path / name, heldout_tokens=MANY_HELDOUT_TOKENS))
    assert quality.is_exact
    change = quality.result.perplexity / quality.source.perplexity - 1
    assert_promise(name, change, sum(entry.bytes for entry in bundle.manifest.files.values()))


def assert_promise(name: str, change: float, total_bytes: int) -> None:
    """The change is that of perplexity, relative to the float bundle's."""
    print(f"{name}: perplexity {change:+.2%}, {total_bytes / 1e6:.1f} MB")
    if name == "int4":
        assert total_bytes <= 100e6
        assert change <= 0.03
    else:
        assert abs(change) <= 0.003
