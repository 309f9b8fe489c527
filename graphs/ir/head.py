"""The head of an exit node or of the whole model: from normalised hidden states to token, confidence and logits.

::

    [batch, seq, hidden]
      └─ the last num_rows positions, normalised     [batch, rows, hidden]; none at all for num_rows = 0
           └─ product with the head                  [batch * rows, vocab]; of a low-rank head, two products
                ├─ TopK 2                            token, through the id map of a trimmed head
                └─ Softmax                           top_prob, margin, entropy

The head multiplies by the tensor as the checkpoint stores it, [vocab, hidden], so a tied embedding is stored once.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from shortstack.graphs import names
from shortstack.graphs.ir.builder import GraphBuilder
from shortstack.graphs.ir.matrix import head_product, project
from shortstack.graphs.layer_spec import Ends

_TO_THE_END = 2**62


def last_rows(g: GraphBuilder, x: ir.Value, num_rows: ir.Value, node: str) -> ir.Value:
    """Append the slice of the last ``num_rows`` positions: [batch, seq, ...] -> [batch, rows, ...].

    Args:
        g: The graph.
        x: What to slice.
        num_rows: How many positions, int64 []; may be 0.
        node: Name of the slice.
    """
    seq = g.op("Shape", [x], f"{node}/seq", start=1, end=2)
    first = g.op("Sub", [seq, num_rows], f"{node}/first_row")  # seq - num_rows, so that 0 rows means none, not all
    return g.op("Slice", [x, first, g.constant([_TO_THE_END]), g.constant([1])], node)


def head(
    g: GraphBuilder,
    normed: ir.Value,
    hidden: int,
    ends: Ends,
    node: str,
    *,
    weight: str,
    id_map: str | None,
    down: str | None = None,
) -> dict[str, ir.Value]:
    """Append a head.

    Args:
        g: The graph.
        normed: Normalised hidden states of the rows to evaluate, [batch, rows, hidden].
        hidden: Width of these.
        ends: The scale and the cap of its logits.
        node: Prefix of the node names.
        weight: Name of the head's weight [vocab, hidden], or [vocab, rank] of a low-rank one.
        id_map: Name of the row-to-token-id map int64 [vocab] of a trimmed head; None when rows are token ids.
        down: Name of the projection from hidden to rank of a low-rank head; None for any other.

    Returns:
        The outputs by port name.
    """
    batch_rows = g.op("Shape", [normed], f"{node}/batch_rows", start=0, end=2)
    flat = g.op("Reshape", [normed, g.constant([-1, hidden])], f"{node}/flatten")  # [batch * rows, hidden]
    if down is not None:
        flat = project(g, flat, down, f"{node}/down")  # [batch * rows, rank]
    logits = logits_of(g, ends, flat, weight, node)  # [batch * rows, vocab]

    def token_of(row: ir.Value) -> ir.Value:
        return row if id_map is None else g.op("Gather", [g.weight(id_map), row], f"{node}/id_map")

    return readings(g, logits, batch_rows, node, token_of)


def readings(
    g: GraphBuilder, logits: ir.Value, batch_rows: ir.Value, node: str, token_of: Callable[[ir.Value], ir.Value]
) -> dict[str, ir.Value]:
    """Append what is read from logits [batch * rows, n]: token, confidence, and the logits by row.

    Args:
        g: The graph.
        logits: The logits.
        batch_rows: Batch and rows, int64 [2].
        node: Prefix of the node names.
        token_of: Appends the token ids that columns of the logits stand for; both are int64 [batch * rows].

    Returns:
        The outputs by port name.
    """
    best, best_row = g.ops("TopK", [logits, g.constant([2])], f"{node}/TopK", ("/values", "/indices"), axis=-1)
    zero = g.constant([0])
    token = g.op("Gather", [best_row, g.constant(0)], f"{node}/top_row", axis=1)  # [batch * rows]
    token = token_of(token)

    probs = g.op("Softmax", [logits], f"{node}/Softmax", axis=-1)
    best_probs = g.op("GatherElements", [probs, best_row], f"{node}/best_probs", axis=1)  # [batch * rows, 2]
    top_prob, second_prob = g.ops("Split", [best_probs], f"{node}/Split", ("/top", "/second"), axis=1, num_outputs=2)
    margin = g.op("Sub", [top_prob, second_prob], f"{node}/Sub_margin")
    entropy = _entropy(g, node, logits, probs, g.op("Gather", [best, zero], f"{node}/top_logit", axis=1), top_prob)

    def per_row(value: ir.Value, name: str) -> ir.Value:
        return g.op("Reshape", [value, batch_rows], f"{node}/{name}", allowzero=1)  # 0 rows are 0, not "as before"

    vocab = g.op("Shape", [logits], f"{node}/vocab", start=1, end=2)
    logits_shape = g.op("Concat", [batch_rows, vocab], f"{node}/logits_shape", axis=0)
    return {
        names.TOKEN: per_row(token, "token"),
        names.TOP_PROB: per_row(top_prob, "top_prob"),
        names.MARGIN: per_row(margin, "margin"),
        names.ENTROPY: per_row(entropy, "entropy"),
        names.LOGITS: g.op("Reshape", [logits, logits_shape], f"{node}/logits", allowzero=1),
    }


def logits_of(g: GraphBuilder, ends: Ends, x: ir.Value, weight: str, node: str) -> ir.Value:
    """Append the product of normalised states [rows, hidden] with a head, scaled and capped; returns [rows, vocab]."""
    if ends.logit_scale != 1.0:  # of the states, since there are fewer of them
        x = g.scaled(x, ends.logit_scale, f"{node}/logit_scale")
    logits = head_product(g, x, weight, node)
    if ends.logit_softcap:
        inner = g.scaled(logits, 1.0 / ends.logit_softcap, f"{node}/softcap/inner")
        logits = g.scaled(g.op("Tanh", [inner], f"{node}/softcap/Tanh"), ends.logit_softcap, f"{node}/softcap")
    return logits


def _entropy(
    g: GraphBuilder, node: str, logits: ir.Value, probs: ir.Value, top_logit: ir.Value, top_prob: ir.Value
) -> ir.Value:
    """Append H = logsumexp(z) - sum_i p_i z_i in nats, [batch * rows, 1].

    logsumexp is taken as top logit - log(top probability), so that it needs no further pass over the
    vocabulary. A matrix product for the sum would be four times slower on the CPU than product and reduction.
    """
    products = g.op("Mul", [probs, logits], f"{node}/Mul_expected")
    dot = g.op("ReduceSum", [products, g.constant([1])], f"{node}/ReduceSum_expected", keepdims=1)
    lse = g.op("Sub", [top_logit, g.op("Log", [top_prob], f"{node}/Log")], f"{node}/logsumexp")
    return g.op("Relu", [g.op("Sub", [lse, dot], f"{node}/Sub_entropy")], f"{node}/Relu")  # rounding may go below 0
