"""The shapes of Gemma 4 E2B and of its assistant, for checkpoints of random weights.

A layer of E2B reads a row of a table for each token, beside the residual stream. The table has as many rows as the
vocabulary: 2.35e9 values, 4.7 GB in bfloat16. A step reads one row, so :class:`Gemma4` makes fewer rows; only token ids
below their number may be run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shortstack.samples.bench.made_model import Tensor

_SLIDING, _FULL = "sliding_attention", "full_attention"
_ROPES = {
    _SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    _FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
}


@dataclass(frozen=True, slots=True)
class Gemma4:
    """Sizes of a Gemma 4 whose upper layers share keys and values: four sliding layers, then a full one, and so on.

    Attributes:
        layers: Layers.
        sharing: How many of them, the last ones, use keys and values of layers below.
        hidden: Width of the residual stream.
        inner: Width of the MLP; twice as wide in sharing layers.
        heads: Heads of queries.
        kv_heads: Heads of keys and values.
        head_dim: Width of a head of a sliding layer; one of a full layer is twice as wide.
        window: Positions that a sliding layer sees.
        vocab: Tokens.
        table_width: Width of the table's row for one layer.
        table_rows: Tokens that the table has.
    """

    layers: int
    sharing: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    vocab: int
    table_width: int
    table_rows: int

    def with_layers(self, layers: int) -> Gemma4:
        """Return it with another depth: as large a share of the layers shares, and one full layer has its own."""
        owning = min(layers, max(5, layers * (self.layers - self.sharing) // self.layers))
        return replace(self, layers=layers, sharing=layers - owning)

    @property
    def types(self) -> list[str]:
        """The kind of each layer; the last one always is full."""
        kinds = [_FULL if number % 5 == 4 else _SLIDING for number in range(self.layers)]
        return [*kinds[:-1], _FULL]

    def config(self) -> dict[str, Any]:
        """Return config.json."""
        return {
            "architectures": ["Gemma4ForCausalLM"],
            "model_type": "gemma4_text",
            "torch_dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "layer_types": self.types,
            "num_kv_shared_layers": self.sharing,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": self.table_width,
            "vocab_size_per_layer_input": self.table_rows,
            "final_logit_softcapping": 30.0,
            "bos_token_id": 0,
            "eos_token_id": 0,
            **_shared_fields(self),
        }

    def shards(self) -> Iterator[Mapping[str, Tensor]]:
        """Yield the tensors of each shard: the ends first, then layer by layer."""
        table = self.layers * self.table_width
        yield {"model.embed_tokens.weight": (self.vocab, self.hidden), "model.norm.weight": (self.hidden,)}
        yield {
            "model.embed_tokens_per_layer.weight": (self.table_rows, table),
            "model.per_layer_model_projection.weight": (table, self.hidden),
            "model.per_layer_projection_norm.weight": (self.table_width,),
        }
        for number, kind in enumerate(self.types):
            owns_kv = number < self.layers - self.sharing
            inner, width = self.inner * (1 if owns_kv else 2), _head_dim(self, kind)
            found = _layer(self.hidden, inner, self.heads * width, width)
            if owns_kv:
                keys = self.kv_heads * width
                found |= {"self_attn.k_proj.weight": (keys, self.hidden), "self_attn.k_norm.weight": (width,)}
                found |= {"self_attn.v_proj.weight": (keys, self.hidden)}
            found |= {
                "per_layer_input_gate.weight": (self.table_width, self.hidden),
                "per_layer_projection.weight": (self.hidden, self.table_width),
                "post_per_layer_input_norm.weight": (self.hidden,),
            }
            yield {f"model.layers.{number}.{name}": shape for name, shape in found.items()}


@dataclass(frozen=True, slots=True)
class Assistant:
    """Sizes of an assistant with a head of centroids.

    Attributes:
        model: Its model.
        layers: Layers; the last one is full.
        hidden: Width of its own stream.
        inner: Width of the MLP.
        heads: Heads of queries.
        centroids: Groups of tokens.
        top_centroids: How many of the groups a draft computes.
    """

    model: Gemma4
    layers: int
    hidden: int
    inner: int
    heads: int
    centroids: int
    top_centroids: int

    @property
    def types(self) -> list[str]:
        """The kind of each layer."""
        return [_SLIDING] * (self.layers - 1) + [_FULL]

    def config(self) -> dict[str, Any]:
        """Return config.json."""
        return {
            "architectures": ["Gemma4AssistantForCausalLM"],
            "model_type": "gemma4_assistant",
            "torch_dtype": "bfloat16",
            "backbone_hidden_size": self.model.hidden,
            "use_ordered_embeddings": True,
            "num_centroids": self.centroids,
            "centroid_intermediate_top_k": self.top_centroids,
            "tie_word_embeddings": True,
            "text_config": {
                "model_type": "gemma4_text",
                "hidden_size": self.hidden,
                "intermediate_size": self.inner,
                "num_hidden_layers": self.layers,
                "num_kv_shared_layers": self.layers,
                "num_attention_heads": self.heads,
                "layer_types": self.types,
                "hidden_size_per_layer_input": 0,
                **_shared_fields(self.model),
            },
        }

    def shards(self) -> Iterator[Mapping[str, Tensor]]:
        """Yield the tensors of the one shard."""
        backbone = self.model.hidden
        found: dict[str, Tensor] = {
            "model.embed_tokens.weight": (self.model.vocab, self.hidden),
            "model.norm.weight": (self.hidden,),
            "pre_projection.weight": (self.hidden, 2 * backbone),
            "post_projection.weight": (backbone, self.hidden),
            "masked_embedding.centroids.weight": (self.centroids, self.hidden),
            "masked_embedding.token_ordering": np.arange(self.model.vocab),
        }
        for number, kind in enumerate(self.types):
            width = _head_dim(self.model, kind)
            own = _layer(self.hidden, self.inner, self.heads * width, width)
            found |= {f"model.layers.{number}.{name}": shape for name, shape in own.items()}
        yield found


E2B = Gemma4(35, 20, 1536, 6144, 8, 1, 256, 512, 262_144, 256, 4096)


def assistant_of_e2b(model: Gemma4) -> Assistant:
    """Return the assistant that was published for E2B, for a model of its sizes."""
    return Assistant(model, 4, 256, 2048, 4, 2048, 32)


def _head_dim(model: Gemma4, kind: str) -> int:
    return model.head_dim * (2 if kind == _FULL else 1)


def _shared_fields(model: Gemma4) -> dict[str, Any]:
    """Return the fields that the assistant's layers have in common with the model's."""
    return {
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "global_head_dim": 2 * model.head_dim,
        "sliding_window": model.window,
        "vocab_size": model.vocab,
        "rope_parameters": _ROPES,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }


def _layer(hidden: int, inner: int, queries: int, head_dim: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layer's tensors without keys and values."""
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    return {
        **{f"{name}_layernorm.weight": (hidden,) for name in norms},
        "layer_scalar": (1,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.q_norm.weight": (head_dim,),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
