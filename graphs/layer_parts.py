"""The weights of one decoder layer as a bundle stores them, a layer of the stack or the block of an exit.

===============================  ==================================================  =====================
part                             shape                                               layers that have it
===============================  ==================================================  =====================
input_norm.weight                [hidden]
attn.qkv_proj.weight             [(heads + 2 * kv_heads) * cache_head_dim, hidden]
attn.qkv_proj.bias               rows of the matrix                                  qkv_bias
attn.o_proj.weight               [hidden, heads * cache_head_dim]
attn.o_proj.bias                 [hidden]                                            attention_out_bias
post_attention_norm.weight       [hidden]
mlp.gate_proj.weight, mlp.up_..  [inner, hidden]
mlp.down_proj.weight             [hidden, inner]
mlp.gate_proj.bias ...           rows of the matrix                                  mlp_bias
===============================  ==================================================  =====================

A matrix is [out, in] here; stored as floats it is turned. Standard library only.
"""

from __future__ import annotations

from shortstack.graphs.spec import ModelSpec

Shape = tuple[int, ...]


def layer_parts(spec: ModelSpec, *, owns_kv: bool = True) -> dict[str, Shape]:
    """Return the shape of each weight of a layer, by part, in the order in which they are stored.

    Args:
        spec: The model.
        owns_kv: It makes its own keys and values; one that uses another layer's has rows for its queries alone.
    """
    hidden, inner, width = spec.hidden_size, spec.intermediate_size, spec.cache_head_dim
    queries = spec.num_attention_heads * width
    stacked = queries + (2 * spec.num_key_value_heads * width if owns_kv else 0)
    parts: dict[str, Shape] = {"input_norm.weight": (hidden,)}
    parts |= _projection("attn.qkv_proj", (stacked, hidden), spec.qkv_bias)
    parts |= _projection("attn.o_proj", (hidden, queries), spec.attention_out_bias)
    parts["post_attention_norm.weight"] = (hidden,)
    for name, shape in (("gate_proj", (inner, hidden)), ("up_proj", (inner, hidden)), ("down_proj", (hidden, inner))):
        parts |= _projection(f"mlp.{name}", shape, spec.mlp_bias)
    return parts


def _projection(name: str, shape: tuple[int, int], has_bias: bool) -> dict[str, Shape]:
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if has_bias else {})
