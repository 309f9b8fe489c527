"""Folders of models that also read pictures: the language model is exported, whatever its tensors are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma4Config, Gemma4ForConditionalGeneration

from helpers import tolerances
from helpers.tiny_models import write_tokenizer
from shortstack.export.arch import ARCHITECTURES, resolve
from shortstack.export.assemble import export_bundle
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.checkpoint.config import Config
from shortstack.export.spec import ExportSpec
from shortstack.graphs.errors import CheckpointError, UnsupportedError
from shortstack.runtime import load

VOCAB, LAYERS = 300, 7
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "sliding_window": 6,
    "query_pre_attn_scalar": 24,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A folder as transformers saves it, and the logits of a text."""
    tokens = {"image_token_index": 299, "boi_token_index": 298, "eoi_token_index": 297}
    config = Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, **tokens)
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    folder = tmp_path_factory.mktemp("whole") / "gemma3"
    model.save_pretrained(folder)
    write_tokenizer(folder, VOCAB)
    with torch.no_grad():
        return folder, model(input_ids=torch.tensor([ids()])).logits[0].numpy()


def ids() -> list[int]:
    return list(range(5, 35))


def copied(whole: Path, folder: Path, rename: Any = lambda name: name, **config: Any) -> Path:
    folder.mkdir()
    write_tokenizer(folder, VOCAB)
    tensors = load_file(whole / "model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    fields = json.loads((whole / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder


def test_the_language_model_of_gemma_4_computes_what_the_whole_one_does(tmp_path: Path) -> None:
    text = {
        **{name: value for name, value in TEXT.items() if name not in ("query_pre_attn_scalar", "num_hidden_layers")},
        "num_hidden_layers": 6,
        "global_head_dim": 48,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "final_logit_softcapping": 3.0,
    }
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16}
    kinds = ("image_token_id", "boi_token_id", "eoi_token_id", "video_token_id", "audio_token_id")
    tokens = {kind: VOCAB - 1 - number for number, kind in enumerate(kinds)}
    config = Gemma4Config(text_config=text, vision_config={**vision, **heads}, audio_config=None, **tokens)
    torch.manual_seed(0)
    model = Gemma4ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "whole")
    write_tokenizer(tmp_path / "whole", VOCAB)
    export_bundle(ExportSpec(str(tmp_path / "whole"), tmp_path / "bundle", (2,)))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids()])).logits[0].numpy()
    found = load(tmp_path / "bundle").activations(ids()).heads[6]
    np.testing.assert_allclose(found, logits, rtol=0, atol=tolerances.TINY.max_abs)


RENAMED = {
    "as saved": lambda name: name,
    "a prefix in front": lambda name: name.replace("language_model.model.", "model.language_model."),
    "the language model alone": lambda name: name.replace("language_model.model.", "model."),
}


@pytest.mark.parametrize("names", RENAMED)
def test_the_language_model_computes_what_the_whole_one_does(
    whole: tuple[Path, np.ndarray], tmp_path: Path, names: str
) -> None:
    folder, logits = whole
    export_bundle(ExportSpec(str(copied(folder, tmp_path / "copy", RENAMED[names])), tmp_path / "bundle", (2,)))
    model = load(tmp_path / "bundle")
    assert model.bundle.manifest.spec.model_type == "gemma3_text"
    found = model.activations(ids()).heads[LAYERS]
    np.testing.assert_allclose(found, logits, rtol=0, atol=tolerances.TINY.max_abs)


def test_fields_that_the_text_config_lacks_have_the_defaults_of_transformers(whole: tuple[Path, np.ndarray]) -> None:
    from transformers import Gemma3TextConfig

    few = {"hidden_size": 640, "num_hidden_layers": 18}
    theirs = Gemma3TextConfig(**few)
    config = open_checkpoint(str(whole[0])).config
    spec = ARCHITECTURES["gemma3"].read_spec(Config({"text_config": few}, config.file))
    attention = spec.layers[0].attention
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (8, 4, 256)
    assert (spec.vocab_size, spec.layers[0].mlp.width) == (theirs.vocab_size, theirs.intermediate_size)
    assert spec.tie_word_embeddings is theirs.tie_word_embeddings is True


def test_a_folder_without_the_config_of_its_text_is_refused(whole: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="text_config is missing"):
        resolve(open_checkpoint(str(copied(whole[0], tmp_path / "copy", text_config=None))))


def test_a_folder_with_the_text_of_another_family_is_refused(whole: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder = copied(whole[0], tmp_path / "copy", text_config={**TEXT, "model_type": "llama"})
    with pytest.raises(UnsupportedError, match=r"text_config\.model_type: found 'llama', expected gemma3_text"):
        resolve(open_checkpoint(str(folder)))
