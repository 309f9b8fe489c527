"""SmolLM2-135M-Instruct quantized by the presets that have a name: still exact among themselves, and how good."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pytest

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
# Fewer tokens than a user's command looks at: a little worse, within the same bound. A slow test takes the defaults.
CALIBRATION_TOKENS, HELDOUT_TOKENS = 2048, 2048
# What the slow tests decode.
MANY_PROMPTS, MANY_TOKENS = 30, 64


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


def perplexity(model: Model) -> float:
    losses = []
    for row in read_rows(HELDOUT_TEXT, "--heldout", model.tokenizer, HELDOUT_TOKENS):
        logits = model.activations(row.tolist()).heads[LAYERS][:-1]
        top = logits.max(axis=1)
        norms = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        losses.append(norms - logits[np.arange(len(logits)), row[1:]])
    return float(np.exp(np.mean(losses)))


@pytest.fixture(scope="session")
def float_perplexity(model: Model) -> float:
    return perplexity(model)


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


def test_the_named_presets_keep_what_they_promise(quantized: Quantized, float_perplexity: float) -> None:
    assert_promise(quantized.name, perplexity(quantized.model) / float_perplexity - 1, quantized.total_bytes)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_report_of_the_command_shows_what_the_preset_promises(
    smollm2_bundle: Path, tmp_path: Path, name: str
) -> None:
    bundle = quantize_bundle(QuantizeSpec(smollm2_bundle, tmp_path / name, find_preset(name)))
    quality = make_report(ReportSpec(smollm2_bundle, tmp_path / name))
    assert quality.is_exact
    loss = quality.result.perplexity / quality.source.perplexity - 1
    assert_promise(name, loss, sum(entry.bytes for entry in bundle.manifest.files.values()))


def assert_promise(name: str, loss: float, total_bytes: int) -> None:
    """Loss is the change of perplexity, relative to the float bundle's."""
    print(f"{name}: perplexity {loss:+.2%}, {total_bytes / 1e6:.1f} MB")
    if name == "int4":
        assert total_bytes <= 100e6
        assert loss <= 0.03
    else:
        assert abs(loss) <= 0.003
