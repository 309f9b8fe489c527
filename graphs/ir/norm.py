"""A norm over the last dimension, of any tensor."""

from __future__ import annotations

import onnx_ir as ir

from shortstack.graphs.ir.builder import GraphBuilder
from shortstack.graphs.layer_spec import Norm


def norm_op(g: GraphBuilder, kind: Norm, x: ir.Value, weight: str, name: str) -> ir.Value:
    """Append a norm of ``x`` [..., size].

    Args:
        g: The graph.
        kind: The norm.
        x: What is normalised.
        weight: Name of its weight [size]; the name of its bias, if it has one, follows from it.
        name: Prefix of the node's name.
    """
    scale = g.weight(weight)
    if kind.kind == "rms":
        node = f"{name}/SimplifiedLayerNormalization"
        return g.op("SimplifiedLayerNormalization", [x, scale], node, axis=-1, epsilon=kind.eps, stash_type=1)
    inputs = [x, scale] + ([g.weight(weight.removesuffix("weight") + "bias")] if kind.has_bias else [])
    return g.op("LayerNormalization", inputs, f"{name}/LayerNormalization", axis=-1, epsilon=kind.eps, stash_type=1)
