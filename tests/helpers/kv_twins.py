"""Small twins with random weights for any K,V map."""

from __future__ import annotations

from typing import Any

import torch

from shortstack.export.twin.model import Twin
from shortstack.graphs.spec import ModelSpec
from shortstack.graphs.spec_json import llama_spec

VOCAB = 61
_GAINS = {"embed_tokens": 32**0.5, "q_proj": 1.5, "k_proj": 1.5, "o_proj": 0.35, "down_proj": 0.35}


def kv_spec(kv_map: tuple[int, ...], **changes: Any) -> ModelSpec:
    """Return a spec with as many layers as the map, and two query heads per key/value head unless changed."""
    fields: dict[str, Any] = {
        "model_type": "llama",
        "num_hidden_layers": len(kv_map),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "kv_map": kv_map,
    }
    return llama_spec(**fields | changes)


def random_twin(spec: ModelSpec) -> Twin:
    """Return a twin in evaluation mode, with weights from torch's global generator.

    Attention is far from uniform. What a layer adds to the stream is small, so that rounding does not grow from
    position to position.
    """
    twin = Twin(spec).eval()
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            elif parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                gain = next((gain for part, gain in _GAINS.items() if part in name), 1.0)
                parameter.normal_(0.0, gain * parameter.shape[1] ** -0.5)
        if spec.tie_word_embeddings:  # gives logits of the same size as a separate head
            twin.model.norm.weight.mul_(spec.hidden_size**-0.5)
    return twin


def random_ids(batch: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length))
