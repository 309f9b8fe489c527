"""SmolLM2-135M-Instruct quantized by the presets that have a name: still exact among themselves, and how good."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from shortstack.graphs.texts.prompts import prompts
from shortstack.quant.assemble import quantize_bundle
from shortstack.quant.presets import find_preset
from shortstack.quant.quality import Quality
from shortstack.quant.quality_report import make_report
from shortstack.quant.spec import QuantizeSpec, ReportSpec
from shortstack.runtime import DraftPolicy, Model, load
from shortstack.runtime.commands.row_check import check_rows

PROMPTS, TOKENS = 30, 64
# (exit, drafted tokens, bonus): one for each prompt in turn.
FORMS = [(exit_layer, k, bonus) for k in (1, 2, 4) for exit_layer in (4, 8, 15) for bonus in (False, True)]


@dataclass
class Quantized:
    model: Model
    quality: Quality
    total_bytes: int


@pytest.fixture(scope="module", params=["int4", "int8"])
def quantized(
    request: pytest.FixtureRequest, smollm2_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Quantized:
    out = tmp_path_factory.mktemp("quantized") / request.param
    bundle = quantize_bundle(QuantizeSpec(smollm2_bundle, out, find_preset(request.param), calibration_tokens=4096))
    quality = make_report(ReportSpec(smollm2_bundle, out, heldout_tokens=4096, prompts=2, continuation_tokens=16))
    return Quantized(load(out), quality, sum(entry.bytes for entry in bundle.manifest.files.values()))


def test_self_speculation_equals_plain_decoding_token_for_token(quantized: Quantized) -> None:
    model = quantized.model
    for index, text in enumerate(prompts(PROMPTS)):
        chat = [{"role": "user", "content": text}]
        plain = model.generate(chat, max_new_tokens=TOKENS, ignore_eos=True)
        exit_layer, k, bonus = FORMS[index % len(FORMS)]
        drafted = model.generate(
            chat,
            max_new_tokens=TOKENS,
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


def test_the_named_presets_keep_what_they_promise(quantized: Quantized) -> None:
    quality = quantized.quality
    loss = quality.result.perplexity / quality.source.perplexity - 1
    print(f"{quality.preset}: perplexity {loss:+.2%}, KL {quality.kl:.4f}, {quantized.total_bytes / 1e6:.1f} MB")
    assert quality.is_exact
    if quality.preset == "int4":
        assert quantized.total_bytes <= 100e6
        assert loss <= 0.03
    else:
        assert abs(loss) <= 0.003
