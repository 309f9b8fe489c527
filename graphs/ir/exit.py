"""An exit node: from what the stack holds at a boundary to a prediction, on the last ``num_rows`` positions only.

::

    hidden_states_out ─ last rows ─┬─ branch ─┬─ norm ─ head ── token, confidence, logits
    middle, ids ─────── last rows ─┤          └─ unit ───────── exit_state_out
    exit_state ────────────────────┘
    hidden_states_out ─ last rows ─ unit ─ gate ─────────────── gate

    hidden_states_out ─ norm ─ qkv ─ attention ─ last rows ─ ... a block instead of a branch of rows
                                         └────────────────────── its keys and values, of all positions

The formulas are those of :class:`shortstack.graphs.plan.ExitSpec`. Rows are taken first, so that a prompt, which needs
no prediction from an exit, does not pay for one. A block still writes keys and values of every position: its later rows
attend to them.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from shortstack.graphs import names
from shortstack.graphs.exit_parts import MLP_NORM
from shortstack.graphs.ir.attention import Caches, exit_layer_site
from shortstack.graphs.ir.builder import GraphBuilder
from shortstack.graphs.ir.embedding import embed_tokens
from shortstack.graphs.ir.head import head, last_rows
from shortstack.graphs.ir.layer import Residual, decoder_layer, mlp_branch, norm, residual_sum, unit_rms
from shortstack.graphs.ir.lengths import Lengths
from shortstack.graphs.ir.matrix import project
from shortstack.graphs.layer_spec import Mlp
from shortstack.graphs.plan import ExitSpec, SplitPlan
from shortstack.graphs.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class ExitInputs:
    """What an exit may read.

    Attributes:
        hidden: The residual stream at the boundary, [batch, seq, hidden].
        middle: The residual stream between attention and MLP of the layer below the boundary, [batch, seq, hidden].
        lengths: How far the run reaches.
        ids: Token ids [batch, seq]; None where the segment has none.
        state: States of the positions before the rows, [batch, rows, hidden]; None where the segment has none.
    """

    hidden: ir.Value
    middle: ir.Value
    lengths: Lengths
    caches: Caches
    ids: ir.Value | None
    state: ir.Value | None


def uses_unit_norm(plan: SplitPlan) -> bool:
    """Whether a graph of the plan divides something by its root mean square and nothing else."""
    return any(e.branch == "linear" or e.has_gate for e in plan.exits)


def full_head(spec: ModelSpec) -> str:
    """Return the name of the model's LM head: the embedding where they are tied."""
    return names.EMBED_TOKENS if spec.tie_word_embeddings else names.LM_HEAD


def exit_node(
    g: GraphBuilder, spec: ModelSpec, exit_spec: ExitSpec, given: ExitInputs, num_rows: ir.Value
) -> dict[str, ir.Value]:
    """Append an exit node.

    Args:
        g: The graph.
        spec: The model.
        exit_spec: The exit.
        given: What it may read.
        num_rows: How many trailing positions to evaluate, int64 [].

    Returns:
        The outputs by port name, the present values of a block among them.
    """
    outputs: dict[str, ir.Value] = {}
    node = f"/exits.{exit_spec.exit_layer}"
    hidden = last_rows(g, given.hidden, num_rows, f"{node}/last_rows")  # [batch, rows, hidden]
    if exit_spec.branch == "linear":
        x = _linear(g, spec, exit_spec, hidden, given, num_rows)
    elif exit_spec.branch == "mlp":
        x = _mlp(g, spec, exit_spec, last_rows(g, given.middle, num_rows, f"{node}/middle"))
    elif exit_spec.branch == "block":
        # A block has a spare row where the layers have one. With an int8 cache they have none, and neither has the
        # block, although its own cache is floats: what it predicts for a row alone may then differ in the last digits
        # from what it predicts for the same row among several. Keys and values do not differ, and no verified token
        # depends on the prediction.
        site = exit_layer_site(spec, exit_spec.exit_layer)
        x = decoder_layer(g, site, Residual(given.hidden), given.lengths, given.caches, num_rows)
    else:
        x = Residual(hidden)

    if exit_spec.sees_state or exit_spec.norm == "none":
        x = Residual(residual_sum(g, x, f"{node}/branch"))
    if exit_spec.sees_state:
        outputs[names.EXIT_STATE_OUT] = unit_rms(g, spec, x.stream, f"{node}/state")
    if exit_spec.has_gate:
        outputs[names.GATE] = _gate(g, spec, exit_spec, hidden)
    if exit_spec.norm == "none":
        normed = x.stream
    else:
        own = names.exit_weight(exit_spec.exit_layer, "norm.weight")
        weight = own if exit_spec.norm == "own" else names.FINAL_NORM
        normed, _ = norm(g, spec.ends.final_norm, x, weight, f"{node}/norm")
    return outputs | _head(g, spec, exit_spec, normed)


def _linear(
    g: GraphBuilder, spec: ModelSpec, exit_spec: ExitSpec, hidden: ir.Value, given: ExitInputs, num_rows: ir.Value
) -> Residual:
    """Append W u + b, and the gated MLP of u if there is one."""
    depth, node = exit_spec.exit_layer, f"/exits.{exit_spec.exit_layer}/linear"
    parts = [unit_rms(g, spec, hidden, f"{node}/unit_hidden")]
    if exit_spec.sees_token:
        assert given.ids is not None
        ids = last_rows(g, given.ids, num_rows, f"{node}/last_ids")  # [batch, rows]
        parts.append(unit_rms(g, spec, embed_tokens(g, spec, ids, f"{node}/embed_tokens"), f"{node}/unit_token"))
    if exit_spec.sees_state:
        assert given.state is not None
        parts.append(given.state)
    u = parts[0] if len(parts) == 1 else g.op("Concat", parts, f"{node}/Concat", axis=-1)  # [batch, rows, inputs]
    x = Residual(
        project(g, u, names.exit_weight(depth, "linear.weight"), node),
        bias=g.weight(names.exit_weight(depth, "linear.bias")),
    )
    x = Residual(residual_sum(g, x, node))
    if exit_spec.linear_mlp:
        x = Residual(
            x.stream, *mlp_branch(g, Mlp(exit_spec.linear_mlp), u, names.exit_weight(depth, "linear"), f"{node}/mlp")
        )
    return x


def _mlp(g: GraphBuilder, spec: ModelSpec, exit_spec: ExitSpec, middle: ir.Value) -> Residual:
    """Append m + MLP(norm(m)), parallel to the MLP of the layer below (EE-LLM, https://arxiv.org/abs/2312.04916)."""
    depth, node = exit_spec.exit_layer, f"/exits.{exit_spec.exit_layer}/mlp"
    below = spec.layers[depth - 1]
    assert below.before_mlp is not None, "mlp_norm has refused it"
    normed, _ = norm(g, below.before_mlp, Residual(middle), names.exit_weight(depth, MLP_NORM), f"{node}/norm")
    return Residual(middle, *mlp_branch(g, below.mlp, normed, names.exit_weight(depth, "mlp"), node))


def _gate(g: GraphBuilder, spec: ModelSpec, exit_spec: ExitSpec, hidden: ir.Value) -> ir.Value:
    """Append sigmoid(w unit(h) + b), [batch, rows]."""
    depth, node = exit_spec.exit_layer, f"/exits.{exit_spec.exit_layer}/gate"
    score = project(
        g, unit_rms(g, spec, hidden, f"{node}/unit"), names.exit_weight(depth, "gate.weight"), node
    )  # [batch, rows, 1]
    score = g.op("Add", [score, g.weight(names.exit_weight(depth, "gate.bias"))], f"{node}/Add")
    return g.op("Sigmoid", [g.op("Squeeze", [score, g.constant([-1])], f"{node}/Squeeze")], f"{node}/Sigmoid")


def _head(g: GraphBuilder, spec: ModelSpec, exit_spec: ExitSpec, normed: ir.Value) -> dict[str, ir.Value]:
    depth = exit_spec.exit_layer
    id_map = names.exit_weight(depth, "head.ids") if exit_spec.draft_vocab is not None else None
    weight, down = names.exit_weight(depth, "head.weight"), None
    if exit_spec.head == "low_rank":
        weight, down = names.exit_weight(depth, "head.up.weight"), names.exit_weight(depth, "head.down.weight")
    elif not g.has_weight(weight):
        weight = full_head(spec)
    return head(g, normed, spec.hidden_size, spec.ends, f"/exits.{depth}", weight=weight, id_map=id_map, down=down)
