"""The weights of one decoder layer, as one table: a layer of the stack, or the block of an exit.

Each row is a *role*, one tensor as the layer's formula has it, and the *part* in which a bundle stores it. Roles of the
same part are stacked along their rows, in the order of the table; heads are padded to ``cache_head_dim``. A matrix is
[out, in] here; stored as floats it is turned.

==========================  ==========================  =========================================  =================
role                        part                        shape                                      layers that have it
==========================  ==========================  =========================================  =================
input_norm.weight           the same                    [hidden]                                   before_attention
q_proj.weight               attn.qkv_proj.weight        [heads * head_dim, hidden]
k_proj.weight, v_proj..     attn.qkv_proj.weight        [kv_heads * head_dim, hidden]              producers of K,V
q_norm.weight, k_norm..     attn.q_norm.weight, ..      [head_dim], or all heads' columns          qk_norm
o_proj.weight               attn.o_proj.weight          [hidden, heads * head_dim]
attention_out_norm.weight   attn.out_norm.weight        [hidden]                                   after_attention
post_attention_norm.weight  the same                    [hidden]                                   before_mlp
gate_proj.weight            mlp.gate_proj.weight        [width, hidden]                            is_gated
up_proj.weight              mlp.up_proj.weight          [width, hidden]
down_proj.weight            mlp.down_proj.weight        [hidden, width]
mlp_out_norm.weight         mlp.out_norm.weight         [hidden]                                   after_mlp
per_layer_embed.weight      per_layer.embed.weight      [its vocab, its width], rows               per_layer_input
per_layer_context.weight    per_layer.context.weight    [its width, hidden]                        the same
per_layer_norm.weight       per_layer.norm.weight       [its width]                                the same
per_layer_gate.weight       per_layer.gate.weight       [its width, hidden]                        the same
per_layer_out.weight        per_layer.out.weight        [hidden, its width]                        the same
per_layer_out_norm.weight   per_layer.out_norm.weight   [hidden]                                   the same
layer_scalar.weight         layer_scalar.weight         [1]                                        has_scalar
==========================  ==========================  =========================================  =================

A projection or norm that has a bias has the role ``<name>.bias`` besides, stored after its weight. Everything that
lists weights walks this table. Standard library only.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from shortstack.graphs.layer_spec import Attention, Layer, Norm, PerLayerInput

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of a layer.

    Attributes:
        role: What the layer's formula calls it.
        part: What a bundle calls it, after the layer's name.
        shape: Its own shape, heads not padded; matrices are [out, in].
        reads: What a matrix multiplies: ``stream`` (normalised), ``mixed`` values, ``mlp`` (the stream before the MLP)
            or ``active``, what is between the MLP's projections; of a branch on tokens ``embedding``, ``above`` and
            ``per_layer``. Empty for a vector, and for a table whose rows are looked up.
        row_heads: How many heads its rows are, each of which is padded; 0 if they are none.
        column_heads: The same for the columns of a matrix.
        is_rotated: Its rows are rotated by position, or multiply rows that are.
    """

    role: str
    part: str
    shape: Shape
    reads: str = ""
    row_heads: int = 0
    column_heads: int = 0
    is_rotated: bool = False

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix of a projection."""
        return bool(self.reads)

    @property
    def is_table(self) -> bool:
        """Whether its rows are looked up, as those of an embedding are."""
        return len(self.shape) == 2 and not self.reads

    @property
    def is_norm(self) -> bool:
        """Whether it is the weight or bias of a norm."""
        return self.role.rsplit(".", 1)[0].endswith("_norm")


_MODULES = {
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "attention_out_norm": "attention_out_layernorm",
    "mlp_out_norm": "mlp_out_layernorm",
    **{role: f"self_attn.{role}" for role in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")},
    **{role: f"mlp.{role}" for role in ("gate_proj", "up_proj", "down_proj")},
    **{f"per_layer_{name}": f"per_layer.{name}" for name in ("embed", "context", "norm", "gate", "out", "out_norm")},
    "layer_scalar": "layer_scalar",
}
_ROLES = {module: role for role, module in _MODULES.items()}


def parameter_name(role: str) -> str:
    """Return what the PyTorch twin and folders of trained exits call a weight of a layer: as transformers' Llama."""
    name, kind = role.rsplit(".", 1)
    return f"{_MODULES[name]}.{kind}"


def parameter_role(name: str) -> str:
    """Return the role of a weight that :func:`parameter_name` names."""
    module, kind = name.rsplit(".", 1)
    return f"{_ROLES[module]}.{kind}"


@functools.cache
def layer_weights(layer: Layer, hidden: int, *, owns_kv: bool = True) -> tuple[Weight, ...]:
    """Return the weights of a layer, in the order in which a bundle stores them.

    Args:
        layer: The layer.
        hidden: Width of the residual stream.
        owns_kv: It makes its own keys and values; one that uses another layer's has queries alone.
    """
    table = [
        *_norm("input_norm", "input_norm", layer.before_attention, hidden),
        *_attention(layer.attention, hidden, owns_kv=owns_kv),
        *_norm("attention_out_norm", "attn.out_norm", layer.after_attention, hidden),
        *_norm("post_attention_norm", "post_attention_norm", layer.before_mlp, hidden),
    ]
    mlp = layer.mlp
    for name in ("gate_proj", "up_proj") if mlp.is_gated else ("up_proj",):
        table += _projection(name, f"mlp.{name}", (mlp.width, hidden), "mlp", has_bias=mlp.has_bias)
    table += _projection("down_proj", "mlp.down_proj", (hidden, mlp.width), "active", has_bias=mlp.has_bias)
    table += _norm("mlp_out_norm", "mlp.out_norm", layer.after_mlp, hidden)
    if layer.per_layer_input is not None:
        table += _per_layer(layer.per_layer_input, hidden)
    if layer.has_scalar:
        table.append(Weight("layer_scalar.weight", "layer_scalar.weight", (1,)))
    return tuple(table)


def _per_layer(own: PerLayerInput, hidden: int) -> list[Weight]:
    shapes: dict[str, tuple[Shape, str]] = {
        "embed": ((own.vocab, own.width), ""),
        "context": ((own.width, hidden), "embedding"),
        "norm": ((own.width,), ""),
        "gate": ((own.width, hidden), "above"),
        "out": ((hidden, own.width), "per_layer"),
        "out_norm": ((hidden,), ""),
    }
    return [
        Weight(f"per_layer_{name}.weight", f"per_layer.{name}.weight", shape, reads)
        for name, (shape, reads) in shapes.items()
    ]


def _attention(attention: Attention, hidden: int, *, owns_kv: bool) -> list[Weight]:
    kv = ("k_proj",) if attention.k_equals_v else ("k_proj", "v_proj")
    heads = {"q_proj": attention.heads} | (dict.fromkeys(kv, attention.kv_heads) if owns_kv else {})
    rotates = attention.rope is not None
    stacked: list[Weight] = []
    for kind in ("weight", "bias") if attention.qkv_bias else ("weight",):
        for name, count in heads.items():
            rows, is_matrix = count * attention.head_dim, kind == "weight"
            stacked.append(
                Weight(
                    f"{name}.{kind}",
                    f"attn.qkv_proj.{kind}",
                    (rows, hidden) if is_matrix else (rows,),
                    reads="stream" if is_matrix else "",
                    row_heads=count,
                    is_rotated=rotates and name != "v_proj",
                )
            )
    for name, norm_name in (("q_proj", "q_norm"), ("k_proj", "k_norm")):
        if attention.qk_norm is not None and name in heads:
            count = 1 if attention.qk_norm_over == "head" else heads[name]
            shape = (count * attention.head_dim,)
            stacked.append(
                Weight(f"{norm_name}.weight", f"attn.{norm_name}.weight", shape, row_heads=count, is_rotated=rotates)
            )
    width = attention.heads * attention.head_dim
    out = _projection("o_proj", "attn.o_proj", (hidden, width), "mixed", has_bias=attention.out_bias)
    return [*stacked, *(_with_columns(weight, attention.heads) for weight in out)]


def _with_columns(weight: Weight, heads: int) -> Weight:
    if not weight.is_matrix:
        return weight
    return Weight(weight.role, weight.part, weight.shape, weight.reads, column_heads=heads)


def _projection(role: str, part: str, shape: tuple[int, int], reads: str, *, has_bias: bool) -> list[Weight]:
    matrix = Weight(f"{role}.weight", f"{part}.weight", shape, reads)
    return [matrix, Weight(f"{role}.bias", f"{part}.bias", shape[:1])] if has_bias else [matrix]


def _norm(role: str, part: str, norm: Norm | None, size: int) -> list[Weight]:
    if norm is None:
        return []
    weight = Weight(f"{role}.weight", f"{part}.weight", (size,))
    return [weight, Weight(f"{role}.bias", f"{part}.bias", (size,))] if norm.has_bias else [weight]


def stored_shapes(weights: tuple[Weight, ...], attention: Attention) -> dict[str, Shape]:
    """Return the shape in which each part of a layer is stored, matrices [out, in], in the order of storage.

    Args:
        weights: The layer's weights.
        attention: Its attention, for the width of padded heads.
    """
    width = attention.cache_head_dim
    shapes: dict[str, Shape] = {}
    for weight in weights:
        rows = weight.row_heads * width or weight.shape[0]
        columns = (weight.column_heads * width or weight.shape[1],) if len(weight.shape) == 2 else ()
        shapes[weight.part] = (shapes.get(weight.part, (0,))[0] + rows, *columns)
    return shapes


def table_parts(weights: tuple[Weight, ...]) -> tuple[str, ...]:
    """Return the parts of a layer whose rows are looked up, in order; stored as [rows, width]."""
    return tuple(weight.part for weight in weights if weight.is_table)


def matrix_parts(weights: tuple[Weight, ...]) -> dict[str, str]:
    """Return the parts of a layer that are matrices of projections, in order, with what each of them reads."""
    return {weight.part: weight.reads for weight in weights if weight.is_matrix}
