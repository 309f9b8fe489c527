"""Attention of one layer: packed projection, rotary grouped-query attention over the shared cache.

::

    normed [batch, seq, hidden]
      └─ MatMul qkv_proj (+ bias)        [batch, seq, (heads + 2 * kv_heads) * head_dim]
           └─ GroupQueryAttention        past/present: one buffer, updated in place
                └─ mixed values          [batch, seq, heads * head_dim]; the layer multiplies them with o_proj
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from shortstack.graphs import names
from shortstack.graphs.exit_parts import BLOCK
from shortstack.graphs.ir.builder import MICROSOFT, Attribute, GraphBuilder
from shortstack.graphs.ir.matrix import project
from shortstack.graphs.precision import KVType
from shortstack.graphs.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Place:
    """Where a decoder layer stands: in the stack, or on top of it as the block of an exit.

    Attributes:
        weights: What the names of its weights begin with.
        node: Prefix of its node names.
        owner: Whose cache it reads and writes.
        kv_scales: Names of the scales of an int8 cache, by :data:`names.KV_PARTS`; empty where the cache is floats.
    """

    weights: str
    node: str
    owner: names.CacheOwner
    kv_scales: tuple[str, ...] = ()

    def weight(self, part: str) -> str:
        """Return the name of a weight, by its part in :mod:`shortstack.graphs.layer_parts`."""
        return f"{self.weights}.{part}"


def layer_place(layer: int, kv_cache: KVType = "float") -> Place:
    """Return the place of a layer of the stack, by its number in the full model."""
    scales = tuple(names.kv_scale(layer, part) for part in names.KV_PARTS) if kv_cache == "int8" else ()
    return Place(names.layer_weights(layer), f"/model/layers.{layer}", layer, scales)


def block_place(exit_layer: int) -> Place:
    """Return the place of an exit's block; its cache is always floats."""
    return Place(names.exit_weight(exit_layer, BLOCK), f"/exits.{exit_layer}/{BLOCK}", names.exit_block(exit_layer))


@dataclass(frozen=True, slots=True)
class Lengths:
    """How far the positions of a run reach, as attention is told.

    Attributes:
        past_end: ``seqlens_k``, int32 [batch].
        total: ``total_sequence_length``, int32 [].
        spare_row: Both count one empty row behind the run's own, which attention adds and drops again, see
            :meth:`Precision.has_spare_row`.
    """

    past_end: ir.Value
    total: ir.Value
    spare_row: bool = False


def attention(
    g: GraphBuilder, spec: ModelSpec, place: Place, normed: ir.Value, lengths: Lengths
) -> tuple[ir.Value, dict[str, ir.Value]]:
    """Append attention without its output projection.

    Args:
        g: The graph.
        spec: The model.
        place: Which layer.
        normed: The normalised residual stream [batch, seq, hidden].
        lengths: How far the run reaches.

    Returns:
        The mixed values [batch, seq, heads * head_dim], and the layer's present values by port name.
    """
    node = f"{place.node}/attn"
    packed = project(g, normed, place.weight("attn.qkv_proj.weight"), f"{node}/qkv_proj")
    if spec.qkv_bias:
        packed = g.op("Add", [packed, g.weight(place.weight("attn.qkv_proj.bias"))], f"{node}/qkv_proj/Add")
    if lengths.spare_row:
        packed = g.op("Pad", [packed, g.constant([0, 0, 0, 0, 1, 0])], f"{node}/spare_row")  # [batch, seq + 1, ...]
    pasts = [g.input_named(names.past(place.owner, part)) for part in names.KV_PARTS]
    inputs: list[ir.Value | None] = [
        packed,
        None,
        None,
        *pasts,
        lengths.past_end,
        lengths.total,
        g.weight(names.ROPE_COS),
        g.weight(names.ROPE_SIN),
    ]
    quantized: dict[str, Attribute] = {}
    if place.kv_scales:  # position_ids, attention_bias and head_sink stay empty
        inputs += [None, None, None, *(g.weight(scale) for scale in place.kv_scales)]
        quantized = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    mixed, *presents = g.ops(
        "GroupQueryAttention",
        inputs,
        f"{node}/GroupQueryAttention",
        ("", "/present_key", "/present_value"),
        domain=MICROSOFT,
        num_heads=spec.num_attention_heads,
        kv_num_heads=spec.num_key_value_heads,
        scale=1.0 / math.sqrt(spec.head_dim),
        do_rotary=1,
        rotary_interleaved=0,
        **quantized,
    )
    if lengths.spare_row:
        first, end, axis = g.constant([0]), g.constant([-1]), g.constant([1])
        mixed = g.op("Slice", [mixed, first, end, axis], f"{node}/drop_spare_row")  # [batch, seq, ...]
    return mixed, {names.present(place.owner, part): x for part, x in zip(names.KV_PARTS, presents, strict=True)}
