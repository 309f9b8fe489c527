"""What stands between the projection of a layer and its attention kernel: norms, rotation and scales of heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from shortstack.graphs import names
from shortstack.graphs.ir.builder import MICROSOFT, GraphBuilder
from shortstack.graphs.ir.lengths import Lengths
from shortstack.graphs.ir.lengths import positions as positions_of
from shortstack.graphs.ir.norm import norm_op
from shortstack.graphs.layer_spec import Attention, Norm, QueryScale


def split_heads(
    g: GraphBuilder,
    own: Attention,
    weight: Callable[[str], str],
    packed: ir.Value,
    lengths: Lengths,
    node: str,
    *,
    owns_kv: bool,
) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
    """Append what is done to queries, keys and values; return the three, packed as queries where nothing is.

    Heads are padded with zeros, which a root mean square counts: the weights and the epsilon make up for it, see
    :func:`padded_share`.

    Args:
        g: The graph.
        own: The layer's attention.
        weight: Returns the name of a weight of the layer, by its part.
        packed: What the projection gives, [batch, rows, (heads + 2 * kv_heads) * head_dim].
        lengths: How far the run reaches.
        node: Prefix of the node names.
        owns_kv: The layer makes keys and values; otherwise ``packed`` are queries alone.
    """
    factors = None if own.query_scale is None else _query_factors(g, own, own.query_scale, packed, lengths)
    if own.qk_norm is None and own.v_norm is None and factors is None and not own.k_equals_v:
        return packed, None, None
    norm = None if own.qk_norm is None else replace(own.qk_norm, eps=own.qk_norm.eps * padded_share(own))

    def normed(x: ir.Value, name: str) -> ir.Value:
        if norm is None:
            return x
        if own.qk_norm_after_rope:
            x = _rotated(g, own, x, positions_of(g, packed, lengths), f"{node}/{name}/RotaryEmbedding")
        scale = weight(f"attn.{name}.weight")
        if own.qk_norm_over == "width":
            return norm_op(g, norm, x, scale, f"{node}/{name}")
        if own.qk_norm_over == "each_head":
            unit = _unit_heads(g, own, norm, x, f"{node}/{name}")
            return g.op("Mul", [unit, g.weight(scale)], f"{node}/{name}/Mul")
        heads = g.op("Reshape", [x, g.constant([0, 0, -1, own.cache_head_dim])], f"{node}/{name}/heads")
        return g.op(
            "Reshape",
            [norm_op(g, norm, heads, scale, f"{node}/{name}"), g.constant([0, 0, -1])],
            f"{node}/{name}/flat",
        )

    def grown(x: ir.Value) -> ir.Value:
        if factors is None:
            return x
        return g.op("Mul", [x, g.op("CastLike", [factors, x], f"{node}/grown/factors")], f"{node}/grown")

    if not owns_kv:
        return grown(normed(packed, "q_norm")), None, None
    width, kv_width = own.heads * own.cache_head_dim, own.kv_heads * own.cache_head_dim
    suffixes = ("/query", "/key") if own.k_equals_v else ("/query", "/key", "/value")
    sizes = g.constant([width, *([kv_width] * (len(suffixes) - 1))])
    query, key, *values = g.ops("Split", [packed, sizes], f"{node}/split", suffixes, axis=-1)
    value = values[0] if values else key
    if own.v_norm is not None:
        value = _v_normed(g, own, own.v_norm, value, f"{node}/v_norm")
    return grown(normed(query, "q_norm")), normed(key, "k_norm"), value


def rope_tables(g: GraphBuilder, own: Attention) -> list[ir.Value]:
    """Return cos and sin of the layer's rotary embedding, each [positions, cache_head_dim / 2]."""
    assert own.rope is not None
    return [g.weight(names.rope_table(own.rope, part)) for part in names.ROPE_PARTS]


def _rotated(g: GraphBuilder, own: Attention, x: ir.Value, positions: ir.Value, node: str) -> ir.Value:
    """Append the rotation of heads [batch, rows, heads * head_dim], outside the attention kernel."""
    inputs = [x, positions, *rope_tables(g, own)]
    return g.op("RotaryEmbedding", inputs, node, domain=MICROSOFT, interleaved=0)


def _query_factors(
    g: GraphBuilder, own: Attention, scale: QueryScale, rows: ir.Value, lengths: Lengths
) -> ir.Value | None:
    """Append what queries are multiplied by, float32 [batch, rows, 1]; None where that is 1 at all positions.

    They are looked up: a logarithm might round differently in a run of several rows.
    """
    table = rope_tables(g, own)[0].shape
    assert table is not None
    positions = int(str(table[0]))
    periods = np.arange((positions - 1) // scale.original + 1, dtype=np.float32)
    if len(periods) < 2 or not scale.beta:
        return None

    def make() -> ir.Value:
        node = "/model/lengths/query"
        factors = 1 + np.float32(scale.beta) * np.log1p(periods)  # [periods]
        values = g.numbers(factors[:, None].astype(np.float32), f"query.{scale.beta!r}.{scale.original}.{len(periods)}")
        period = g.op("Div", [positions_of(g, rows, lengths), g.constant(scale.original)], f"{node}/period")
        return g.op("Gather", [values, period], f"{node}/factors", axis=0)  # [batch, rows, 1]

    return g.once(("query_factors", scale, len(periods), lengths.spare_row), make)


def _v_normed(g: GraphBuilder, own: Attention, kind: Norm, value: ir.Value, node: str) -> ir.Value:
    """Append the norm of each head of the values [batch, seq, kv_heads * head_dim], which has no weights."""
    share = padded_share(own)
    return _unit_heads(g, own, replace(kind, eps=kind.eps * share), value, node, share**0.5)


def _unit_heads(g: GraphBuilder, own: Attention, kind: Norm, x: ir.Value, node: str, weight: float = 1.0) -> ir.Value:
    """Append a norm of each head [batch, rows, heads * head_dim] whose weights are one number."""
    heads = g.op("Reshape", [x, g.constant([0, 0, -1, own.cache_head_dim])], f"{node}/heads")
    if kind.kind == "layer":
        heads = _centred(g, own, heads, node)
    ones = g.op("CastLike", [g.filled(own.cache_head_dim, weight), heads], f"{node}/ones")
    name = f"{node}/SimplifiedLayerNormalization"
    heads = g.op("SimplifiedLayerNormalization", [heads, ones], name, axis=-1, epsilon=kind.eps, stash_type=1)
    return g.op("Reshape", [heads, g.constant([0, 0, -1])], f"{node}/flat")


def _centred(g: GraphBuilder, own: Attention, heads: ir.Value, node: str) -> ir.Value:
    """Append the subtraction of each head's mean over the model's own columns; padding stays 0."""
    share = padded_share(own)
    mean = g.op("ReduceMean", [heads, g.constant([-1])], f"{node}/mean", keepdims=1)
    if share == 1.0:
        return g.op("Sub", [heads, mean], f"{node}/centred")
    half, extra = own.head_dim // 2, (own.cache_head_dim - own.head_dim) // 2
    columns = np.array(([1 / share] * half + [0.0] * extra) * 2, np.float32)
    label = f"columns.{own.head_dim}.{own.cache_head_dim}"
    mask = g.op("CastLike", [g.numbers(columns, label), heads], f"{node}/columns")
    return g.op("Sub", [heads, g.op("Mul", [mean, mask], f"{node}/own_mean")], f"{node}/centred")


def padded_share(attention: Attention) -> float:
    """Return which share of a padded head are columns of the model.

    The mean square over a padded head is that share of the mean square over the head itself. So its norm has this share
    of the epsilon, and weights times its square root.
    """
    return attention.head_dim / attention.cache_head_dim
