"""One decoder layer on the residual stream: norms, attention, MLP, in the wiring that the layer's spec says.

The sum of stream and branch and the norm after it are one fused node, so a layer takes and returns the stream as two
parts, ``stream + branch (+ bias)``, not yet added; :func:`residual_sum` adds them where the plain sum is needed (at a
boundary). What a layer computes is :mod:`shortstack.graphs.layer_spec`; :mod:`shortstack.export.twin.layer` is the same
in PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from shortstack.graphs import names
from shortstack.graphs.ir.attention import Caches, LayerSite, attention
from shortstack.graphs.ir.builder import MICROSOFT, GraphBuilder
from shortstack.graphs.ir.head import last_rows
from shortstack.graphs.ir.lengths import Lengths
from shortstack.graphs.ir.matrix import embed, project
from shortstack.graphs.ir.norm import norm_op
from shortstack.graphs.layer_spec import Activation, Mlp, Norm, PerLayerInput
from shortstack.graphs.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Residual:
    """The residual stream [batch, seq, hidden] as a sum that is still to be made.

    Attributes:
        stream: What earlier layers left.
        branch: The newest branch's output; None when there is none.
        bias: The bias [hidden] of the projection that made ``branch``; None when it has none.
        middle: Above a layer: the stream between its attention and its MLP, which an MLP exit reads.
    """

    stream: ir.Value
    branch: ir.Value | None = None
    bias: ir.Value | None = None
    middle: ir.Value | None = None


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a run, for layers that have a branch on them.

    Attributes:
        ids: Token ids [batch, seq].
        embeddings: Their scaled embeddings [batch, seq, hidden].
        hidden: Width of these.
    """

    ids: ir.Value
    embeddings: ir.Value
    hidden: int


def norm(g: GraphBuilder, kind: Norm, x: Residual, weight: str, name: str) -> tuple[ir.Value, ir.Value]:
    """Append a norm of the residual stream.

    Args:
        g: The graph.
        kind: The norm.
        x: The stream.
        weight: Name of its weight; the name of its bias, if it has one, follows from it.
        name: Prefix of the node names.

    Returns:
        The normalised stream and the plain sum, both [batch, seq, hidden].
    """
    if x.branch is None:
        return norm_op(g, kind, x.stream, weight, name), x.stream
    scale = g.weight(weight)
    node = "SkipSimplifiedLayerNormalization" if kind.kind == "rms" else "SkipLayerNormalization"
    inputs: list[ir.Value | None] = [x.stream, x.branch, scale]
    if kind.kind == "layer":
        inputs.append(g.weight(weight.removesuffix("weight") + "bias") if kind.has_bias else None)
    out, _, _, total = g.ops(
        node,
        inputs + ([x.bias] if x.bias is not None else []),
        f"{name}/{node}",
        ("", None, None, "/sum"),
        domain=MICROSOFT,
        epsilon=kind.eps,
    )
    return out, total


def unit_rms(g: GraphBuilder, spec: ModelSpec, x: ir.Value, name: str) -> ir.Value:
    """Append x / rms(x) over the last dimension: a norm whose weight is ones."""
    return norm(g, Norm("rms", spec.norm_eps), Residual(x), names.UNIT_NORM, name)[0]


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
    site: LayerSite,
    x: Residual,
    lengths: Lengths,
    caches: Caches,
    num_rows: ir.Value | None = None,
    tokens: Tokens | None = None,
    reads: ir.Value | None = None,
) -> Residual:
    """Append one decoder layer.

    Args:
        g: The graph.
        site: Which layer, and whose cache it has.
        x: The residual stream before it, [batch, seq, hidden].
        lengths: How far the run reaches.
        caches: The keys and values of all; those that it writes are added.
        num_rows: How many trailing positions the layer is computed for, int64 []; None for all. Keys and values are
            written for all positions in any case.
        tokens: What a branch on tokens reads; None where the layer has none.
        reads: What attention reads in place of the stream, [batch, seq, width].

    Returns:
        The residual after the layer, [batch, rows, hidden].
    """
    node, layer = site.node, site.layer
    normed, stream = _before(g, layer.before_attention, x, site.weight("input_norm.weight"), f"{node}/input_norm")
    mixed = attention(g, site, normed if reads is None else reads, lengths, caches)
    if num_rows is not None:
        mixed = last_rows(g, mixed, num_rows, f"{node}/attn/last_rows")  # [batch, rows, heads * head_dim]
        stream = last_rows(g, stream, num_rows, f"{node}/last_rows")  # [batch, rows, hidden]
    out = project(g, mixed, site.weight("attn.o_proj.weight"), f"{node}/attn/o_proj")
    bias = g.weight(site.weight("attn.o_proj.bias")) if layer.attention.out_bias else None
    scale = layer.residual_scale
    branch = _after(g, layer.after_attention, Residual(stream, out, bias), site.weight("attn.out_norm.weight"), scale)
    if layer.is_parallel:
        if num_rows is not None:
            normed = last_rows(g, normed, num_rows, f"{node}/mlp/last_rows")
        if layer.before_mlp is not None:
            weight = site.weight("post_attention_norm.weight")
            normed, _ = norm(g, layer.before_mlp, Residual(stream), weight, f"{node}/post_attention_norm")
        stream = residual_sum(g, branch, f"{node}/attn")
    else:
        weight = site.weight("post_attention_norm.weight")
        normed, stream = _before(g, layer.before_mlp, branch, weight, f"{node}/post_attention_norm")
    mlp = mlp_branch(g, layer.mlp, normed, site.weight("mlp"), f"{node}/mlp")
    above = _after(g, layer.after_mlp, Residual(stream, *mlp), site.weight("mlp.out_norm.weight"), scale)
    if layer.per_layer_input is not None:
        assert tokens is not None, f"{node} has a branch on tokens"
        above = _on_tokens(g, layer.per_layer_input, site, residual_sum(g, above, f"{node}/mlp"), tokens, num_rows)
    if layer.has_scalar:
        total = residual_sum(g, above, f"{node}/above")
        above = Residual(g.op("Mul", [total, g.weight(site.weight("layer_scalar.weight"))], f"{node}/scalar"))
    return replace(above, middle=stream)


def _on_tokens(
    g: GraphBuilder, own: PerLayerInput, site: LayerSite, x: ir.Value, tokens: Tokens, num_rows: ir.Value | None
) -> Residual:
    """Append the branch that :class:`PerLayerInput` describes to the stream ``x`` [batch, rows, hidden]."""
    node = f"{site.node}/per_layer"
    hidden = tokens.hidden
    context = project(g, tokens.embeddings, site.weight("per_layer.context.weight"), f"{node}/context")
    context = g.scaled(context, hidden**-0.5, f"{node}/context/scale")
    context = norm_op(g, own.norm, context, site.weight("per_layer.norm.weight"), node)
    found = embed(g, tokens.ids, site.weight("per_layer.embed.weight"), f"{node}/embed")
    found = g.op("Add", [context, g.scaled(found, own.width**0.5, f"{node}/embed/scale")], f"{node}/Add")
    found = g.scaled(found, 2**-0.5, f"{node}/scale")  # [batch, seq, width]
    if num_rows is not None:
        found = last_rows(g, found, num_rows, f"{node}/last_rows")
    gate = _activated(g, own.activation, project(g, x, site.weight("per_layer.gate.weight"), f"{node}/gate"), node)
    product = g.op("Mul", [gate, found], f"{node}/Mul")
    out = project(g, product, site.weight("per_layer.out.weight"), f"{node}/out")
    return Residual(x, norm_op(g, own.norm, out, site.weight("per_layer.out_norm.weight"), f"{node}/out_norm"))


def _before(g: GraphBuilder, kind: Norm | None, x: Residual, weight: str, node: str) -> tuple[ir.Value, ir.Value]:
    """Append the norm of what a branch reads; without one, it reads the plain stream."""
    if kind is not None:
        return norm(g, kind, x, weight, node)
    total = residual_sum(g, x, node.removesuffix("_norm"))
    return total, total


def _after(g: GraphBuilder, kind: Norm | None, x: Residual, weight: str, scale: float) -> Residual:
    """Append the norm of what a branch returns, and its scale."""
    assert x.branch is not None
    node = x.branch.name or ""
    branch, bias = x.branch, x.bias
    if (kind is not None or scale != 1.0) and bias is not None:
        branch, bias = g.op("Add", [branch, bias], f"{node}/Add_bias"), None
    if kind is not None:
        branch = norm_op(g, kind, branch, weight, f"{node}/norm")
    if scale != 1.0:
        branch = g.scaled(branch, scale, f"{node}/residual_scale")
    return Residual(x.stream, branch, bias)


def mlp_branch(g: GraphBuilder, mlp: Mlp, x: ir.Value, weights: str, node: str) -> tuple[ir.Value, ir.Value | None]:
    """Append an MLP; the down projection's bias is returned, not added.

    Args:
        g: The graph.
        mlp: Its shape.
        x: [batch, seq, inputs].
        weights: What the names of its weights begin with, such as ``model.layers.3.mlp``.
        node: Prefix of the node names.
    """
    first = ("gate_proj", "up_proj") if mlp.is_gated else ("up_proj",)
    projected = [project(g, x, f"{weights}.{name}.weight", f"{node}/{name}") for name in first]
    if mlp.has_bias:
        projected = [
            g.op("Add", [value, g.weight(f"{weights}.{name}.bias")], f"{node}/{name}/Add")
            for name, value in zip(first, projected, strict=True)
        ]
    product = _activated(g, mlp.activation, projected[0], node)
    if mlp.is_gated:
        product = g.op("Mul", [product, projected[1]], f"{node}/Mul")
    out = project(g, product, f"{weights}.down_proj.weight", f"{node}/down_proj")
    return out, g.weight(f"{weights}.down_proj.bias") if mlp.has_bias else None


def _activated(g: GraphBuilder, activation: Activation, x: ir.Value, node: str) -> ir.Value:
    name = f"{node}/act_fn"
    if activation == "silu":  # QuickGelu with alpha 1 is x * sigmoid(x): SiLU in one node
        return g.op("QuickGelu", [x], f"{name}/QuickGelu", domain=MICROSOFT, alpha=1.0)
    if activation == "relu2":
        positive = g.op("Relu", [x], f"{name}/Relu")
        return g.op("Mul", [positive, positive], f"{name}/Mul")
    return g.op("Gelu", [x], f"{name}/Gelu", approximate="tanh" if activation == "gelu_tanh" else "none")
