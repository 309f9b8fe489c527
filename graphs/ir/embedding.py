"""What the first layer reads: the embeddings of token ids, scaled as the model does it, and their positions."""

from __future__ import annotations

import onnx_ir as ir

from shortstack.graphs import names
from shortstack.graphs.ir.builder import GraphBuilder
from shortstack.graphs.ir.lengths import Lengths, positions
from shortstack.graphs.ir.matrix import embed
from shortstack.graphs.spec import ModelSpec


def embed_tokens(g: GraphBuilder, spec: ModelSpec, ids: ir.Value, node: str) -> ir.Value:
    """Append the look-up of token ids [batch, seq] and its scale; returns [batch, seq, hidden]."""
    found = embed(g, ids, names.EMBED_TOKENS, node)
    scale = spec.ends.embed_scale
    return found if scale == 1.0 else g.scaled(found, scale, f"{node}/scale")


def first_stream(g: GraphBuilder, spec: ModelSpec, ids: ir.Value, lengths: Lengths) -> ir.Value:
    """Append the residual stream before the first layer, [batch, seq] -> [batch, seq, hidden].

    Args:
        g: The graph.
        spec: The model.
        ids: The token ids of a run.
        lengths: How far the run reaches, no spare row counted.
    """
    found = embed_tokens(g, spec, ids, "/model/embed_tokens")
    if not spec.ends.learned_positions:
        return found
    node = "/model/embed_positions"
    rows = g.op("Gather", [g.weight(names.EMBED_POSITIONS), positions(g, ids, lengths)], f"{node}/Gather")
    return g.op("Add", [found, rows], f"{node}/Add")
