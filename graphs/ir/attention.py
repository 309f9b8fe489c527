"""One attention block: packed projection, rotary grouped-query attention over the shared cache, output projection.

::

    normed [batch, seq, hidden]
      └─ MatMul qkv_proj (+ bias)        [batch, seq, (heads + 2 * kv_heads) * head_dim]
           └─ GroupQueryAttention        past/present: one buffer, updated in place
                └─ MatMul o_proj         [batch, seq, hidden]; its bias is added by the next norm
"""

from __future__ import annotations

import math

import onnx_ir as ir

from shortstack.graphs import names
from shortstack.graphs.ir.builder import MICROSOFT, Attribute, GraphBuilder
from shortstack.graphs.ir.matrix import project
from shortstack.graphs.precision import KVType
from shortstack.graphs.spec import ModelSpec


def attention(
    g: GraphBuilder,
    spec: ModelSpec,
    layer: int,
    normed: ir.Value,
    lengths: tuple[ir.Value, ir.Value],
    kv_cache: KVType = "float",
    *,
    spare_row: bool = False,
) -> tuple[ir.Value, dict[str, ir.Value]]:
    """Append one attention block.

    Args:
        g: The graph.
        spec: The model.
        layer: Number of the layer in the full model.
        normed: The normalised residual stream [batch, seq, hidden].
        lengths: ``seqlens_k`` and ``total_sequence_length``.
        kv_cache: Type of the cache; for int8 the store has its scales.
        spare_row: Attend with one empty row more than there are, see :attr:`Precision.has_spare_row`; ``lengths`` count
            it.

    Returns:
        The output before the o projection's bias [batch, seq, hidden], and the layer's present values by port name.
    """
    node = f"/model/layers.{layer}/attn"
    packed = project(g, normed, names.layer_weight(layer, "attn.qkv_proj.weight"), f"{node}/qkv_proj")
    if spec.qkv_bias:
        packed = g.op(
            "Add", [packed, g.weight(names.layer_weight(layer, "attn.qkv_proj.bias"))], f"{node}/qkv_proj/Add"
        )
    if spare_row:
        packed = g.op("Pad", [packed, g.constant([0, 0, 0, 0, 1, 0])], f"{node}/spare_row")  # [batch, seq + 1, ...]
    pasts = [g.input_named(names.past(layer, part)) for part in names.KV_PARTS]
    inputs: list[ir.Value | None] = [
        packed,
        None,
        None,
        *pasts,
        *lengths,
        g.weight(names.ROPE_COS),
        g.weight(names.ROPE_SIN),
    ]
    quantized: dict[str, Attribute] = {}
    if kv_cache == "int8":  # position_ids, attention_bias and head_sink stay empty
        inputs += [None, None, None, *(g.weight(names.kv_scale(layer, part)) for part in names.KV_PARTS)]
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
    if spare_row:
        first, end, axis = g.constant([0]), g.constant([-1]), g.constant([1])
        mixed = g.op("Slice", [mixed, first, end, axis], f"{node}/drop_spare_row")  # [batch, seq, ...]
    out = project(g, mixed, names.layer_weight(layer, "attn.o_proj.weight"), f"{node}/o_proj")
    return out, {names.present(layer, part): value for part, value in zip(names.KV_PARTS, presents, strict=True)}
