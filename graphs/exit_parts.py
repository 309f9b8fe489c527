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

from shortstack.graphs.errors import RequestError
from shortstack.graphs.layer_weights import Shape, Weight, parameter_name, stored_shapes
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

    Raises:
        RequestError: The model's layers do not have what the exit's branch needs.
    """
    hidden, rows = spec.hidden_size, head_rows(spec, exit_spec)
    weights = spec.exit_block_weights(exit_spec.exit_layer)
    parts: dict[str, Shape] = {}
    if exit_spec.branch == "linear":
        inputs = linear_inputs(spec, exit_spec)
        parts |= {"linear.weight": (hidden, inputs), "linear.bias": (hidden,)}
        if inner := exit_spec.linear_mlp:
            parts |= {"linear.gate_proj.weight": (inner, inputs), "linear.up_proj.weight": (inner, inputs)}
            parts["linear.down_proj.weight"] = (hidden, inner)
    if exit_spec.branch == "mlp":
        mlp_norm(spec, exit_spec.exit_layer)
        parts |= {parameter_name(weight.role): weight.shape for weight in mlp_weights(weights)}
    if exit_spec.branch == "block":
        parts |= {f"{BLOCK}.{parameter_name(weight.role)}": weight.shape for weight in weights}
    if exit_spec.norm == "own":
        parts |= dict.fromkeys(own_norm(spec), (hidden,))
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
    depth = exit_spec.exit_layer
    shapes = stored_shapes(spec.exit_block_weights(depth), spec.exit_block_layer(depth).attention)
    block = {f"{BLOCK}.{part}": shape for part, shape in shapes.items()}
    return block | {part: shape for part, shape in parts.items() if not part.startswith(f"{BLOCK}.")}


def exit_matrices(spec: ModelSpec, exit_spec: ExitSpec) -> dict[str, tuple[int, int]]:
    """Return the shapes [out, in] of the exit's own matrices that a bundle may store in blocks, by part."""
    parts = stored_parts(spec, exit_spec).items()
    return {part: (shape[0], shape[1]) for part, shape in parts if len(shape) == 2 and part != GATE_MATRIX}


def mlp_weights(weights: tuple[Weight, ...]) -> tuple[Weight, ...]:
    """Return the weights of a layer's MLP, without its norms."""
    return tuple(weight for weight in weights if parameter_name(weight.role).startswith("mlp."))


def mlp_norm(spec: ModelSpec, depth: int) -> dict[str, str]:
    """Return the parts of the norm before an MLP exit, each with the part of the layer below that it is.

    Raises:
        RequestError: That layer has no norm before its MLP, or runs its MLP side by side with attention.
    """
    below = spec.layers[depth - 1]
    if below.before_mlp is None or below.is_parallel:
        raise RequestError(
            f"exit after {depth} layers: branch",
            found="mlp",
            expected="none, linear or block, since the layer below has "
            + ("its MLP side by side with attention" if below.is_parallel else "no norm before its MLP"),
        )
    own, of_layer = MLP_NORM.removesuffix("weight"), "post_attention_norm."
    return {f"{own}{kind}": f"{of_layer}{kind}" for kind in ("weight", "bias")[: 1 + below.before_mlp.has_bias]}


def own_norm(spec: ModelSpec) -> tuple[str, ...]:
    """Return the parts of an exit's own norm, which is of the kind of the model's final norm."""
    return ("norm.weight", "norm.bias") if spec.ends.final_norm.has_bias else ("norm.weight",)
