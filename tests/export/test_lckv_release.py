"""A small model in the form of LCKV's releases: config and tensors as whyNLP publishes them, not written by our code.

The fields are those of https://huggingface.co/whynlp/tinyllama-lckv-w10-100b and of the repository's ``configs/``, with
fewer and narrower layers. The code there deletes ``k_proj`` and ``v_proj`` of every layer whose K,V no layer uses, and
keeps Llama's other names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from helpers.lckv import TINYLLAMA_LCKV_W10
from helpers.tiny_models import write_tokenizer
from shortstack.export.assemble import export_bundle
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.spec import ExportSpec
from shortstack.export.twin.folder import load_twin
from shortstack.export.twin.model import Passes, Twin
from shortstack.export.twin.sequential import sequential
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.spec_json import llama_spec
from shortstack.runtime import load

TOLERANCE = 1e-4
LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, VOCAB = 6, 64, 88, 4, 2, 131
HEAD_DIM = HIDDEN // HEADS

CONFIG: dict[str, Any] = TINYLLAMA_LCKV_W10 | {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": HEAD_DIM,
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.2",
    "use_cache": True,
    "vocab_size": VOCAB,
}

RELEASES: dict[str, tuple[dict[str, Any], tuple[int, ...], tuple[int, ...]]] = {
    "w2": ({"layer_types": "0_4_4_4_4_5"}, (0, 4, 4, 4, 4, 5), ()),
    "w2-with-diagonal": ({"layer_types": "0_4_4_4_4_5", "force_nodiag": False}, (0, 4, 4, 4, 4, 5), ()),
    "sandwich-middle": ({"layer_types": "0_2_2_2_2_5", "force_nodiag": False}, (0, 2, 2, 2, 2, 5), ()),
    "cla": ({"layer_types": "0_0_2_2_4_4", "force_nodiag": False}, (0, 0, 2, 2, 4, 4), ()),
    "yoco": (
        {"layer_types": "0s_1s_2s_3_3_3", "sliding_window": 5, "force_nodiag": False},
        (0, 1, 2, 3, 3, 3),
        (5, 5, 5, 0, 0, 0),
    ),
}
"""The changed fields, the map and the windows of each release, by name."""


@pytest.fixture(autouse=True)
def quick(one_torch_thread: object) -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


def released_tensors(own_kv: set[int]) -> dict[str, torch.Tensor]:
    """Return tensors named and shaped as in a release's ``model.safetensors``, in bfloat16; layers add little."""

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return gain * columns**-0.5 * torch.randn(rows, columns)

    def norm() -> torch.Tensor:
        return 0.5 + torch.rand(HIDDEN)

    tensors = {
        "model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN),
        "model.norm.weight": norm(),
        "lm_head.weight": matrix(VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        tensors |= {
            f"{at}.input_layernorm.weight": norm(),
            f"{at}.post_attention_layernorm.weight": norm(),
            f"{at}.self_attn.q_proj.weight": matrix(HEADS * HEAD_DIM, HIDDEN, 1.5),
            f"{at}.self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD_DIM, 0.35),
            f"{at}.mlp.gate_proj.weight": matrix(INNER, HIDDEN),
            f"{at}.mlp.up_proj.weight": matrix(INNER, HIDDEN),
            f"{at}.mlp.down_proj.weight": matrix(HIDDEN, INNER, 0.35),
        }
        if layer in own_kv:
            tensors |= {
                f"{at}.self_attn.k_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN, 1.5),
                f"{at}.self_attn.v_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            }
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


def write_release(folder: Path, fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | fields, indent=2), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, VOCAB)


def by_definition(
    tensors: dict[str, torch.Tensor], kv_map: tuple[int, ...], windows: tuple[int, ...], masks_diagonal: bool
) -> Twin:
    """Build the model that a release describes, without its config."""
    spec = llama_spec(
        model_type="llama",
        num_hidden_layers=LAYERS,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        vocab_size=VOCAB,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        kv_map=kv_map,
        windows=windows,
        masks_diagonal=masks_diagonal,
    )
    twin = Twin(spec).eval()
    twin.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return twin


@pytest.mark.parametrize("name", RELEASES)
def test_an_exported_release_computes_what_it_defines(tmp_path: Path, name: str) -> None:
    fields, kv_map, windows = RELEASES[name]
    tensors = released_tensors(set(kv_map))
    write_release(tmp_path / "release", fields, tensors)
    twin = by_definition(tensors, kv_map, windows, fields.get("force_nodiag", True))
    read = load_twin(str(tmp_path / "release"))
    assert read.spec == twin.spec
    assert read.passes == Passes(without_gradient=7, with_gradient=2)

    export_bundle(ExportSpec(str(tmp_path / "release"), tmp_path / "bundle"))
    assert open_bundle(tmp_path / "bundle").manifest.spec == twin.spec
    model = load(tmp_path / "bundle")
    ids = np.random.randint(3, VOCAB, 24).tolist()
    expected = sequential(twin, torch.tensor([ids])).logits[0]
    assert np.abs(model.activations(ids).heads[LAYERS] - expected.numpy()).max() <= TOLERANCE

    generated = model.generate(ids[:8], max_new_tokens=10, ignore_eos=True).tokens
    again = sequential(twin, torch.tensor([[*ids[:8], *generated]])).logits[0, 7:-1]
    assert tuple(again.argmax(-1).tolist()) == generated


def test_a_release_holds_no_kv_projections_of_consumers(tmp_path: Path) -> None:
    fields, kv_map, _ = RELEASES["w2"]
    write_release(tmp_path / "release", fields, released_tensors(set(kv_map)))
    names = open_checkpoint(str(tmp_path / "release")).names()
    assert {name.split(".")[2] for name in names if "k_proj" in name} == {"0", "4", "5"}
    assert len(names) == 3 + 7 * LAYERS + 2 * 3
