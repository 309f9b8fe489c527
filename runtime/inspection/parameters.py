"""How many parameters each part of a model has, by its spec alone; no graph and no tensor is opened.

For :mod:`shortstack.runtime.inspection.report`. The weights of a layer are those of
:mod:`shortstack.graphs.layer_weights`; embedding and LM head are [vocab, hidden] each, stored once if tied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shortstack.graphs.layer_weights import Weight
from shortstack.graphs.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class LayerParameters:
    """Parameters of one decoder layer.

    Attributes:
        qkv: The q, k and v projections; q alone in a layer that uses another layer's K,V.
        o: The output projection of attention.
        mlp: The projections of the MLP.
        norms: All norms.
        biases: All biases of projections.
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


def layer_parameters(spec: ModelSpec, layer: int) -> LayerParameters:
    """Count the parameters of one layer.

    Args:
        spec: The model.
        layer: Its number.
    """
    counts = dict.fromkeys(("qkv", "o", "mlp", "norms", "biases"), 0)
    for weight in spec.weights(layer):
        counts[_kind(weight)] += math.prod(weight.shape)
    return LayerParameters(**counts)


def _kind(weight: Weight) -> str:
    if weight.is_norm:
        return "norms"
    if not weight.is_matrix:
        return "biases"
    if weight.part.startswith("mlp."):
        return "mlp"
    return "o" if weight.reads == "mixed" else "qkv"


@dataclass(frozen=True, slots=True)
class ModelParameters:
    """Parameters of a whole model, a tied head counted once.

    Attributes:
        embedding: The token embedding, and learned positions.
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
        embedding=table + spec.ends.learned_positions * spec.hidden_size,
        layers=sum(layer_parameters(spec, layer).total for layer in range(spec.num_hidden_layers)),
        final_norm=spec.hidden_size * (1 + spec.ends.final_norm.has_bias),
        lm_head=0 if spec.tie_word_embeddings else table,
    )
