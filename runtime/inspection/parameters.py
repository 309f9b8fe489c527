"""How many parameters each part of a model has, by its spec alone; no graph and no tensor is opened.

For :mod:`shortstack.runtime.inspection.report`. With H hidden, I intermediate, N heads, K kv_heads, D head_dim and V
vocab::

    attention  qkv   H * (N + 2K) * D    a consumer of another layer's K,V has q alone: H * N * D
               o     N * D * H
    mlp        3 * H * I                 gate, up, down
    norms      2 * H
    embedding  V * H                     LM head the same, and stored once if tied
"""

from __future__ import annotations

from dataclasses import dataclass

from shortstack.graphs.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class LayerParameters:
    """Parameters of one decoder layer.

    Attributes:
        qkv: The q, k and v projections; q alone in a layer that uses another layer's K,V.
        o: The output projection of attention.
        mlp: The gate, up and down projections.
        norms: Both RMS norms.
        biases: All biases.
    """

    qkv: int
    o: int
    mlp: int
    norms: int
    biases: int

    @property
    def total(self) -> int:
        """All parameters of the layer."""
        return self.qkv + self.o + self.mlp + self.norms + self.biases


def layer_parameters(spec: ModelSpec, layer: int, head_dim: int | None = None) -> LayerParameters:
    """Count the parameters of one layer.

    Args:
        spec: The model.
        layer: Its number.
        head_dim: Width of one head; None takes the model's own, ``spec.cache_head_dim`` counts what is stored.
    """
    hidden, mlp_width, width = spec.hidden_size, spec.intermediate_size, head_dim or spec.head_dim
    owns_kv = spec.kv_map[layer] == layer
    projected = (spec.num_attention_heads + (2 * spec.num_key_value_heads if owns_kv else 0)) * width
    biases = (
        (projected if spec.qkv_bias else 0)
        + (hidden if spec.attention_out_bias else 0)
        + (2 * mlp_width + hidden if spec.mlp_bias else 0)
    )
    return LayerParameters(
        qkv=hidden * projected,
        o=spec.num_attention_heads * width * hidden,
        mlp=3 * hidden * mlp_width,
        norms=2 * hidden,
        biases=biases,
    )


@dataclass(frozen=True, slots=True)
class ModelParameters:
    """Parameters of a whole model, a tied head counted once.

    Attributes:
        embedding: The token embedding.
        layers: All decoder layers.
        final_norm: The norm before every head.
        lm_head: An LM head of its own; 0 when it is the embedding.
    """

    embedding: int
    layers: int
    final_norm: int
    lm_head: int

    @property
    def total(self) -> int:
        """All parameters of the model; rows copied into trimmed heads are not among them."""
        return self.embedding + self.layers + self.final_norm + self.lm_head


def model_parameters(spec: ModelSpec) -> ModelParameters:
    """Count the parameters of a model."""
    table = spec.vocab_size * spec.hidden_size
    return ModelParameters(
        embedding=table,
        layers=sum(layer_parameters(spec, layer).total for layer in range(spec.num_hidden_layers)),
        final_norm=spec.hidden_size,
        lm_head=0 if spec.tie_word_embeddings else table,
    )
