"""What the first layer reads: the embeddings of token ids, scaled as the model does it."""

from __future__ import annotations

import onnx_ir as ir

from shortstack.graphs import names
from shortstack.graphs.ir.builder import GraphBuilder
from shortstack.graphs.ir.matrix import embed
from shortstack.graphs.spec import ModelSpec


def embed_tokens(g: GraphBuilder, spec: ModelSpec, ids: ir.Value, node: str) -> ir.Value:
    """Append the look-up of token ids [batch, seq] and its scale; returns [batch, seq, hidden]."""
    found = embed(g, ids, names.EMBED_TOKENS, node)
    scale = spec.ends.embed_scale
    return found if scale == 1.0 else g.scaled(found, scale, f"{node}/scale")
