"""One decoder layer on the residual stream: norm, attention, norm, gated MLP.

The sum of stream and branch and the norm after it are one fused node, so a layer takes and returns the stream as two
parts, ``stream + branch (+ bias)``, not yet added; :func:`residual_sum` adds them where the plain sum is needed (at a
boundary).
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from shortstack.graphs import names
from shortstack.graphs.ir.attention import Caches, LayerSite, Lengths, attention
from shortstack.graphs.ir.builder import MICROSOFT, GraphBuilder
from shortstack.graphs.ir.head import last_rows
from shortstack.graphs.ir.matrix import project
from shortstack.graphs.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Residual:
    """The residual stream [batch, seq, hidden] as a sum that is still to be made.

    Attributes:
        stream: What earlier layers left.
        branch: The newest branch's output; None when there is none.
        bias: The bias [hidden] of the projection that made ``branch``; None when it has none.
    """

    stream: ir.Value
    branch: ir.Value | None = None
    bias: ir.Value | None = None


def norm(g: GraphBuilder, spec: ModelSpec, x: Residual, weight: str, name: str) -> tuple[ir.Value, ir.Value]:
    """Append an RMS norm of the residual stream.

    Returns:
        The normalised stream and the plain sum, both [batch, seq, hidden].
    """
    scale = g.weight(weight)
    if x.branch is None:
        node = f"{name}/SimplifiedLayerNormalization"
        out = g.op(
            "SimplifiedLayerNormalization", [x.stream, scale], node, axis=-1, epsilon=spec.rms_norm_eps, stash_type=1
        )
        return out, x.stream
    out, _, _, total = g.ops(
        "SkipSimplifiedLayerNormalization",
        [x.stream, x.branch, scale] + ([x.bias] if x.bias is not None else []),
        f"{name}/SkipSimplifiedLayerNormalization",
        ("", None, None, "/sum"),
        domain=MICROSOFT,
        epsilon=spec.rms_norm_eps,
    )
    return out, total


def unit_rms(g: GraphBuilder, spec: ModelSpec, x: ir.Value, name: str) -> ir.Value:
    """Append x / rms(x) over the last dimension: a norm whose weight is ones."""
    return norm(g, spec, Residual(x), names.UNIT_NORM, name)[0]


def residual_sum(g: GraphBuilder, x: Residual, name: str) -> ir.Value:
    """Append the additions that turn a residual into one tensor [batch, seq, hidden]."""
    total = x.stream
    if x.branch is not None:
        total = g.op("Add", [total, x.branch], f"{name}/Add")
    if x.bias is not None:
        total = g.op("Add", [total, x.bias], f"{name}/Add_bias")
    return total


def decoder_layer(
    g: GraphBuilder,
    spec: ModelSpec,
    site: LayerSite,
    x: Residual,
    lengths: Lengths,
    caches: Caches,
    num_rows: ir.Value | None = None,
) -> Residual:
    """Append one decoder layer.

    Args:
        g: The graph.
        spec: The model.
        site: Which layer, and whose cache it has.
        x: The residual stream before it, [batch, seq, hidden].
        lengths: How far the run reaches.
        caches: The keys and values of all; those that it writes are added.
        num_rows: How many trailing positions the layer is computed for, int64 []; None for all. Keys and values are
            written for all positions in any case.

    Returns:
        The residual after the layer, [batch, rows, hidden].
    """
    node = site.node
    normed, stream = norm(g, spec, x, site.weight("input_norm.weight"), f"{node}/input_norm")
    mixed = attention(g, spec, site, normed, lengths, caches)
    if num_rows is not None:
        mixed = last_rows(g, mixed, num_rows, f"{node}/attn/last_rows")  # [batch, rows, heads * head_dim]
        stream = last_rows(g, stream, num_rows, f"{node}/last_rows")  # [batch, rows, hidden]
    out = project(g, mixed, site.weight("attn.o_proj.weight"), f"{node}/attn/o_proj")
    bias = g.weight(site.weight("attn.o_proj.bias")) if spec.attention_out_bias else None
    normed, stream = norm(
        g,
        spec,
        Residual(stream, out, bias),
        site.weight("post_attention_norm.weight"),
        f"{node}/post_attention_norm",
    )
    mlp = gated_mlp(g, normed, site.weight("mlp"), f"{node}/mlp", has_bias=spec.mlp_bias)
    return Residual(stream, *mlp)


def gated_mlp(
    g: GraphBuilder, x: ir.Value, weights: str, node: str, *, has_bias: bool
) -> tuple[ir.Value, ir.Value | None]:
    """Append ``down(silu(gate(x)) * up(x))``; the down projection's bias is returned, not added.

    Args:
        g: The graph.
        x: [batch, seq, inputs].
        weights: What the names of its weights begin with, such as ``model.layers.3.mlp``.
        node: Prefix of the node names.
        has_bias: Whether its projections have biases.
    """
    gate = project(g, x, f"{weights}.gate_proj.weight", f"{node}/gate_proj")
    up = project(g, x, f"{weights}.up_proj.weight", f"{node}/up_proj")
    if has_bias:
        gate = g.op("Add", [gate, g.weight(f"{weights}.gate_proj.bias")], f"{node}/gate_proj/Add")
        up = g.op("Add", [up, g.weight(f"{weights}.up_proj.bias")], f"{node}/up_proj/Add")
    # QuickGelu with alpha 1 is x * sigmoid(x): SiLU in one node.
    active = g.op("QuickGelu", [gate], f"{node}/act_fn/QuickGelu", domain=MICROSOFT, alpha=1.0)
    product = g.op("Mul", [active, up], f"{node}/Mul")
    out = project(g, product, f"{weights}.down_proj.weight", f"{node}/down_proj")
    return out, g.weight(f"{weights}.down_proj.bias") if has_bias else None
