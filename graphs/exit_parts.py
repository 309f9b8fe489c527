"""The weights of one exit node: what its parts are called, and their shapes. Standard library only.

==========================  =====================  =================================================
part                        shape                  exits that have it
==========================  =====================  =================================================
linear.weight               [hidden, inputs]       branch linear; inputs = hidden * (1..3)
linear.bias                 [hidden]
linear.gate_proj.weight     [inner, inputs]        branch linear with a gated MLP
linear.up_proj.weight       [inner, inputs]
linear.down_proj.weight     [hidden, inner]
mlp.gate_proj.weight ...    as those of a layer    branch mlp
block.self_attn. ...        as those of a layer    branch block, under the names of transformers
norm.weight                 [hidden]               norm own
head.weight                 [rows, hidden]         head own
head.down.weight            [rank, hidden]         head low_rank
head.up.weight              [rows, rank]
head.ids                    int64 [rows]           any trimmed head: the rows' token ids, ascending
gate.weight, gate.bias      [1, hidden], [1]       a gate
==========================  =====================  =================================================

A matrix is [out, in]. A whole name is :func:`names.exit_weight` of depth and part. In a bundle, matrices stored as
floats are turned to [in, out], :data:`ROWS` excepted; an MLP exit has :data:`MLP_NORM` besides; a block is stored as
layers are (:func:`stored_parts`).
"""

from __future__ import annotations

from shortstack.graphs.layer_parts import Shape, layer_parts
from shortstack.graphs.plan import ExitSpec
from shortstack.graphs.spec import ModelSpec

HEAD_IDS = "head.ids"
ROWS = ("head.weight", "head.up.weight")  # one row per logit, stored so in a bundle too
GATE_MATRIX = "gate.weight"  # one row: never in blocks
# The norm before an MLP exit, as the model has it: quantization may scale that of the layer.
MLP_NORM = "mlp.input_norm.weight"
BLOCK = "block"  # what the parts of a block begin with


def head_rows(spec: ModelSpec, exit_spec: ExitSpec) -> int:
    """Return how many logits the exit has."""
    return spec.vocab_size if exit_spec.draft_vocab is None else exit_spec.draft_vocab


def linear_inputs(spec: ModelSpec, exit_spec: ExitSpec) -> int:
    """Return the width of what a linear branch reads."""
    return spec.hidden_size * (1 + exit_spec.sees_token + exit_spec.sees_state)


def exit_parts(spec: ModelSpec, exit_spec: ExitSpec) -> dict[str, Shape]:
    """Return the shape of each weight that a trained exit has of its own, by part; ``head.ids`` is among them.

    A shared head that is trimmed has ``head.ids`` only: its rows are the LM head's.
    """
    hidden, rows = spec.hidden_size, head_rows(spec, exit_spec)
    parts: dict[str, Shape] = {}
    if exit_spec.branch == "linear":
        inputs = linear_inputs(spec, exit_spec)
        parts |= {"linear.weight": (hidden, inputs), "linear.bias": (hidden,)}
        if inner := exit_spec.linear_mlp:
            parts |= {"linear.gate_proj.weight": (inner, inputs), "linear.up_proj.weight": (inner, inputs)}
            parts["linear.down_proj.weight"] = (hidden, inner)
    if exit_spec.branch == "mlp":
        parts |= _mlp_parts(spec, "mlp")
    if exit_spec.branch == "block":
        parts |= _attention_parts(spec, f"{BLOCK}.self_attn") | _mlp_parts(spec, f"{BLOCK}.mlp")
        norms = (f"{BLOCK}.input_layernorm.weight", f"{BLOCK}.post_attention_layernorm.weight")
        parts |= dict.fromkeys(norms, (hidden,))
    if exit_spec.norm == "own":
        parts["norm.weight"] = (hidden,)
    if exit_spec.head == "own":
        parts["head.weight"] = (rows, hidden)
    if exit_spec.head == "low_rank":
        parts |= {"head.down.weight": (exit_spec.head_rank, hidden), "head.up.weight": (rows, exit_spec.head_rank)}
    if exit_spec.draft_vocab is not None:
        parts[HEAD_IDS] = (rows,)
    if exit_spec.has_gate:
        parts |= {"gate.weight": (1, hidden), "gate.bias": (1,)}
    return parts


def stored_parts(spec: ModelSpec, exit_spec: ExitSpec) -> dict[str, Shape]:
    """Return what a bundle stores of the exit's own weights, by part; matrices [out, in].

    The same as :func:`exit_parts`, but that a block is a layer's: q, k and v in one matrix, heads padded.
    """
    parts = exit_parts(spec, exit_spec)
    if exit_spec.branch != "block":
        return parts
    block = {f"{BLOCK}.{part}": shape for part, shape in layer_parts(spec).items()}
    return block | {part: shape for part, shape in parts.items() if not part.startswith(f"{BLOCK}.")}


def exit_matrices(spec: ModelSpec, exit_spec: ExitSpec) -> dict[str, tuple[int, int]]:
    """Return the shapes [out, in] of the exit's own matrices that a bundle may store in blocks, by part."""
    parts = stored_parts(spec, exit_spec).items()
    return {part: (shape[0], shape[1]) for part, shape in parts if len(shape) == 2 and part != GATE_MATRIX}


def _mlp_parts(spec: ModelSpec, prefix: str) -> dict[str, Shape]:
    hidden, inner = spec.hidden_size, spec.intermediate_size
    return _projections(
        prefix,
        {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)},
        dict.fromkeys(("gate_proj", "up_proj", "down_proj"), spec.mlp_bias),
    )


def _attention_parts(spec: ModelSpec, prefix: str) -> dict[str, Shape]:
    hidden, q_rows = spec.hidden_size, spec.num_attention_heads * spec.head_dim
    kv_rows = spec.num_key_value_heads * spec.head_dim
    return _projections(
        prefix,
        {
            "q_proj": (q_rows, hidden),
            "k_proj": (kv_rows, hidden),
            "v_proj": (kv_rows, hidden),
            "o_proj": (hidden, q_rows),
        },
        dict.fromkeys(("q_proj", "k_proj", "v_proj"), spec.qkv_bias) | {"o_proj": spec.attention_out_bias},
    )


def _projections(prefix: str, shapes: dict[str, tuple[int, int]], has_bias: dict[str, bool]) -> dict[str, Shape]:
    parts: dict[str, Shape] = {}
    for name, shape in shapes.items():
        parts[f"{prefix}.{name}.weight"] = shape
        if has_bias[name]:
            parts[f"{prefix}.{name}.bias"] = shape[:1]
    return parts
