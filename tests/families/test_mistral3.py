"""Folders of Mistral 3, which also read pictures: their text is a Mistral or a Ministral 3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from helpers import tolerances
from helpers.tiny_models import write_tokenizer
from shortstack.export.arch import resolve
from shortstack.export.assemble import export_bundle
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.parity.reference import Reference
from shortstack.export.spec import ExportSpec
from shortstack.export.twin.folder import load_twin, save_twin
from shortstack.graphs.errors import UnsupportedError
from shortstack.runtime import load

VOCAB, LAYERS = 300, 3
IDS = list(range(5, 45))
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
GROWS = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 6,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.4,
}
TEXTS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "ministral3": {"rope_parameters": GROWS},
}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}


def saved(folder: Path, text: str, *, is_tied: bool) -> np.ndarray:
    """Write a whole folder as transformers does; return the logits of a text."""
    config = Mistral3Config(
        text_config={**SIZES, **TEXTS[text], "model_type": text},
        vision_config={**VISION, "image_size": 28, "patch_size": 14},
        tie_word_embeddings=is_tied,
        image_token_index=VOCAB - 1,
    )
    torch.manual_seed(0)
    model = Mistral3ForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    write_tokenizer(folder, VOCAB)
    with torch.no_grad():
        return np.asarray(model(input_ids=torch.tensor([IDS])).logits[0])


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_the_language_model_computes_what_the_whole_one_does(tmp_path: Path, text: str, is_tied: bool) -> None:
    logits = saved(tmp_path / "whole", text, is_tied=is_tied)
    export_bundle(ExportSpec(str(tmp_path / "whole"), tmp_path / "bundle", (2,)))
    model = load(tmp_path / "bundle")
    spec = model.bundle.manifest.spec
    assert (spec.model_type, spec.tie_word_embeddings) == (text, is_tied)
    np.testing.assert_allclose(model.activations(IDS).heads[LAYERS], logits, rtol=0, atol=tolerances.TINY.max_abs)


def test_a_trained_text_is_saved_as_the_family_that_it_is(tmp_path: Path) -> None:
    logits = saved(tmp_path / "whole", "ministral3", is_tied=False)
    save_twin(load_twin(str(tmp_path / "whole")), tmp_path / "text", {})
    assert json.loads((tmp_path / "text" / "config.json").read_text())["model_type"] == "ministral3"
    found = Reference(str(tmp_path / "text")).run_text(IDS, (LAYERS,)).heads[LAYERS]
    np.testing.assert_allclose(found, logits, rtol=0, atol=tolerances.TINY.max_abs)


def test_another_text_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "mistral", is_tied=False)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["model_type"] = "mistral4"
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    says = r"text_config\.model_type: found 'mistral4', expected one of ministral3, mistral"
    with pytest.raises(UnsupportedError, match=says):
        resolve(open_checkpoint(str(tmp_path)))
