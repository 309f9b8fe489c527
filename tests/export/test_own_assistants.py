"""Assistants in our own format, for models of any family: their drafts equal their formula computed anew."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.assistants import edited
from helpers.drafters import Recorded
from helpers.own_assistants import LlamaAssistant
from helpers.quantized import preset
from helpers.tiny_models import TinyBundles, TinyModel
from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec
from shortstack.graphs.errors import CheckpointError, ShortstackError
from shortstack.graphs.precision import BlockFormat
from shortstack.quant.assemble import quantize_bundle
from shortstack.quant.spec import QuantizeSpec
from shortstack.runtime import DraftPolicy, Speculate, load

TARGET = TinyModel("drafted for by an assistant")
ASSISTANTS = {
    "its embedding as head": LlamaAssistant(),
    "a trimmed head, norms": LlamaAssistant(head="trimmed", has_norms=True),
    "the model's head": LlamaAssistant(head="model", kv_layers=None),
    "layers of the same keys and values": LlamaAssistant(kv_layers=(2, 2), hidden=64),
}
TOKENS = 40


def prompts() -> list[list[int]]:
    return [np.random.default_rng(seed).integers(3, 300, 1 + 9 * seed).tolist() for seed in range(4)]


@pytest.mark.parametrize("name", ASSISTANTS)
def test_an_assistant_of_a_llama_drafts_what_its_formula_says_and_changes_no_token(
    tiny_bundles: TinyBundles, tmp_path: Path, name: str
) -> None:
    checkpoint, assistant = tiny_bundles.checkpoint(TARGET), ASSISTANTS[name]
    reference = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    drafter = str(assistant.write(tmp_path / "assistant"))
    bundle = export_bundle(ExportSpec(str(checkpoint), tmp_path / "bundle", drafter=drafter))
    small = quantize_bundle(QuantizeSpec(bundle.folder, tmp_path / "small", preset(BlockFormat(4), "int8")))
    for folder, is_float in ((bundle.folder, True), (small.folder, False)):
        source = Recorded()
        with load(folder) as model:
            for number, prompt in enumerate(prompts()):
                plain = model.generate(prompt, max_new_tokens=TOKENS, ignore_eos=True)
                strategy = Speculate(draft=DraftPolicy(1 + number), source=source)
                result = model.generate(prompt, strategy=strategy, max_new_tokens=TOKENS, ignore_eos=True)
                assert result.tokens == plain.tokens
        assert len(source.rounds) > 80
        for tokens, drafts in source.rounds if is_float else ():
            assert drafts == assistant.drafts(reference, tokens, len(drafts))


def test_layers_that_the_model_has_not_are_refused(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    for number, layers in enumerate(((1, 4), (1,), (-1, 1))):
        drafter = LlamaAssistant(kv_layers=layers).write(tmp_path / str(number))
        spec = ExportSpec(str(tiny_bundles.checkpoint(TARGET)), tmp_path / "out", drafter=str(drafter))
        with pytest.raises(CheckpointError, match=r"kv_layers: found .* expected 2 layers of the model, each one of"):
            export_bundle(spec)
    assert not (tmp_path / "out").exists()


def test_another_rotation_and_a_wrong_trimmed_head_are_refused(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    assistant = LlamaAssistant(head="trimmed")

    def refused(folder: Path) -> str:
        with pytest.raises(ShortstackError) as error:
            export_bundle(ExportSpec(str(tiny_bundles.checkpoint(TARGET)), tmp_path / "out", drafter=str(folder)))
        return str(error.value)

    folder = assistant.write(tmp_path / "rotated")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_theta"] = 500.0
    (folder / "config.json").write_text(json.dumps(config))
    assert "layer 0 rotates by theta 500 over 16 of 16 columns, and layer 1 of the model by theta 10000" in refused(
        folder
    )
    folder = assistant.write(tmp_path / "beyond")
    edited(folder, d2t=assistant.tensors()["d2t"] + 300)
    assert "d2t names token id" in refused(folder)
    folder = assistant.write(tmp_path / "floats")
    edited(folder, d2t=torch.zeros(50))
    assert "whole numbers" in refused(folder)


def test_an_assistant_that_says_nothing_of_a_rotary_embedding_has_that_of_the_models_layer(tmp_path: Path) -> None:
    scaled = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
    source = str(TinyModel("scaled rope for an assistant", rope=scaled).write(tmp_path / "model"))
    folder = LlamaAssistant().write(tmp_path / "assistant")
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="layer 0 rotates by theta 10000"):
        export_bundle(ExportSpec(source, tmp_path / "out", drafter=str(folder)))
    del config["text_config"]["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config))
    bundle = export_bundle(ExportSpec(source, tmp_path / "out", drafter=str(folder)))
    drafter = bundle.manifest.plan.drafter
    assert drafter is not None
    assert [layer.attention.rope for layer in drafter.layers] == [0, 0]
    assert drafter.ropes == ()
    with load(bundle.folder) as model:
        prompt = prompts()[1]
        plain = model.generate(prompt, max_new_tokens=8, ignore_eos=True)
        assert model.generate(prompt, strategy=Speculate(), max_new_tokens=8, ignore_eos=True).tokens == plain.tokens
