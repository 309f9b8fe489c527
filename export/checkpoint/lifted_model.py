"""What a decoder's graph says of its model, as :mod:`shortstack.export.checkpoint.genai_walk` lifts it."""

from __future__ import annotations

from dataclasses import dataclass, field

from shortstack.export.checkpoint.graph_reader import LiftedNorm, Product
from shortstack.export.checkpoint.onnx_graph import Node
from shortstack.export.checkpoint.onnx_matrix import Matrix
from shortstack.graphs.layer_spec import Activation


@dataclass(slots=True)
class LiftedLayer:
    """What a graph says of one layer.

    Attributes:
        attention: The node.
        q, k, v, o: The projections.
        norms: The norms of the stream and of the branches, by :class:`Layer`'s names.
        qk_norms: Those of queries and keys.
        rope: Cos and sin tables, by name; None without rotation.
        is_interleaved: Neighbouring columns are rotated together.
        mlp: The projections by name: up, down, and gate where it is gated.
        activation: Between them.
        scale: What both branches are multiplied by.
    """

    attention: Node
    q: Product
    k: Product
    v: Product
    o: Product
    norms: dict[str, LiftedNorm] = field(default_factory=dict)
    qk_norms: tuple[LiftedNorm, LiftedNorm] | None = None
    rope: tuple[str, str] | None = None
    is_interleaved: bool = False
    mlp: dict[str, Product] = field(default_factory=dict)
    activation: Activation = "silu"
    scale: float = 1.0


@dataclass(slots=True)
class LiftedModel:
    """What a graph says of the model."""

    embedding: Matrix
    head: Matrix
    final_norm: LiftedNorm
    layers: list[LiftedLayer]
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
