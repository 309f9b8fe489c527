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
from shortstack.graphs.ir.builder import MICROSOFT, GraphBuilder
from shortstack.graphs.spec import ModelSpec


def attention(
    g: GraphBuilder, spec: ModelSpec, layer: int, normed: ir.Value, lengths: tuple[ir.Value, ir.Value]
) -> tuple[ir.Value, dict[str, ir.Value]]:
    """Append one attention block.

    Args:
        g: The graph.
        spec: The model.
        layer: Number of the layer in the full model.
        normed: The normalised residual stream [batch, seq, hidden].
        lengths: ``seqlens_k`` and ``total_sequence_length``.

    Returns:
        The output before the o projection's bias [batch, seq, hidden], and the layer's present values by port name.
    """
    node = f"/model/layers.{layer}/attn"
    packed = g.op(
        "MatMul", [normed, g.weight(names.layer_weight(layer, "attn.qkv_proj.weight"))], f"{node}/qkv_proj/MatMul"
    )
    if spec.qkv_bias:
        packed = g.op(
            "Add", [packed, g.weight(names.layer_weight(layer, "attn.qkv_proj.bias"))], f"{node}/qkv_proj/Add"
        )
    pasts = [g.input_named(names.past(layer, part)) for part in names.KV_PARTS]
    mixed, *presents = g.ops(
        "GroupQueryAttention",
        [packed, None, None, *pasts, *lengths, g.weight(names.ROPE_COS), g.weight(names.ROPE_SIN)],
        f"{node}/GroupQueryAttention",
        ("", "/present_key", "/present_value"),
        domain=MICROSOFT,
        num_heads=spec.num_attention_heads,
        kv_num_heads=spec.num_key_value_heads,
        scale=1.0 / math.sqrt(spec.head_dim),
        do_rotary=1,
        rotary_interleaved=0,
    )
    out = g.op("MatMul", [mixed, g.weight(names.layer_weight(layer, "attn.o_proj.weight"))], f"{node}/o_proj/MatMul")
    return out, {names.present(layer, part): value for part, value in zip(names.KV_PARTS, presents, strict=True)}
