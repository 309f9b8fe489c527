"""One segment's graph: embedding or hidden states in, layers, exit node or final head out.

::

    input_ids ─ Gather ┐
                       ├─ layers [start, end) ─┬─ sum ─────────────────── hidden_states_out   (all but the last)
    hidden_states ─────┘                       └─ exit node, or norm ─ head ─ token, confidence, logits
"""

from __future__ import annotations

import onnx_ir as ir

from shortstack import __version__
from shortstack.graphs import names
from shortstack.graphs.contract import segment_contract
from shortstack.graphs.drafter_weights import MODEL_NORM
from shortstack.graphs.errors import UnsupportedError
from shortstack.graphs.ir.attention import Caches, layer_site
from shortstack.graphs.ir.builder import GraphBuilder
from shortstack.graphs.ir.embedding import embed_tokens, first_stream
from shortstack.graphs.ir.exit import ExitInputs, exit_node, full_head
from shortstack.graphs.ir.head import head, last_rows
from shortstack.graphs.ir.layer import Residual, Tokens, decoder_layer, norm, residual_sum, unit_rms
from shortstack.graphs.ir.lengths import Lengths, Packing, with_spare_row
from shortstack.graphs.ir.norm import norm_op
from shortstack.graphs.ir.weights import WeightStore
from shortstack.graphs.kv_map import check_boundaries, lenders
from shortstack.graphs.plan import Segment, SplitPlan
from shortstack.graphs.precision import KVType, Precision
from shortstack.graphs.spec import DType, ModelSpec


def segment_model(
    spec: ModelSpec,
    plan: SplitPlan,
    segment: Segment,
    dtype: DType,
    store: WeightStore,
    kv_cache: KVType = "float",
    *,
    is_packed: bool = False,
) -> ir.Model:
    """Build one segment's graph.

    Args:
        spec: The model.
        plan: Its cuts.
        segment: Which segment.
        dtype: Type of activations and cache; the stored weights have it already.
        store: The weights, under the names of :mod:`shortstack.graphs.names`; an exit whose own ``head.weight`` it has
            uses that one, others the final head's.
        kv_cache: Type of the layers' cache; an exit's block has one of floats.
        is_packed: The form of several sequences (:mod:`shortstack.graphs.packing`), which the model must have.

    Raises:
        RequestError: A boundary cuts layers apart that run together.
        UnsupportedError: A layer that does not see its own position has a window of that position alone.
    """
    layers = range(segment.start, segment.end)
    check_boundaries(spec.kv_map, plan.boundaries)
    if blind := [layer for layer in layers if spec.window(layer) == 1 and not spec.sees_itself(layer)]:
        raise UnsupportedError(
            f"layers {blind} see nothing at all: their window is their own position, which they do not see",
            found="a window of 1",
            expected="2 or more",
        )
    exit_spec = plan.exit_of(segment)
    contract = segment_contract(spec, plan, segment, dtype, kv_cache, is_packed=is_packed)
    g = GraphBuilder(f"layers [{segment.start}, {segment.end})", store)
    inputs = {port.name: g.input(port) for port in contract.inputs}

    packing = None
    if is_packed:
        packing = Packing(
            inputs[names.QUERY_SEQLENS],
            inputs[names.TO_SLOTS],
            inputs[names.TO_ROWS],
            inputs.get(names.ROW_POSITIONS),
        )
    lengths = Lengths(inputs[names.SEQLENS_K], inputs[names.TOTAL_SEQUENCE_LENGTH], packing=packing)
    if segment.is_first:
        x = Residual(first_stream(g, spec, inputs[names.INPUT_IDS], lengths))
    else:
        x = Residual(inputs[names.HIDDEN_STATES])
    if packing is None and Precision(store.formats, kv_cache).has_spare_row(dtype):
        lengths = with_spare_row(g, lengths)
    outputs: dict[str, ir.Value] = {}
    caches = Caches(g)
    tokens = None
    if spec.reads_tokens(layers):
        ids = inputs[names.INPUT_IDS]
        scaled = x.stream if segment.is_first else embed_tokens(g, spec, ids, "/model/embed_tokens")
        tokens = Tokens(ids, scaled, spec.hidden_size)
    for layer in layers:
        x = decoder_layer(g, layer_site(spec, layer, kv_cache), x, lengths, caches, tokens=tokens)
        if layer + 1 in plan.features_of(segment):
            name = f"/features.{layer + 1}"
            total = residual_sum(g, x, name)  # beside the stream, which stays as it is without a drafter
            outputs[names.feature(layer + 1)] = g.op("Identity", [total], f"{name}/Identity")

    if is_packed:
        for owner in lenders(spec.kv_map, segment.start, segment.end):
            outputs |= dict(zip((names.new_rows(owner, p) for p in names.KV_PARTS), caches.rows_of(owner), strict=True))
    num_rows = inputs[names.NUM_ROWS]
    if exit_spec is not None:
        outputs[names.HIDDEN_STATES_OUT] = boundary = residual_sum(
            g, x, f"/exits.{exit_spec.exit_layer}/hidden_states_out"
        )
        given = ExitInputs(
            boundary, x.middle or x.stream, lengths, caches, inputs.get(names.INPUT_IDS), inputs.get(names.EXIT_STATE)
        )
        outputs |= exit_node(g, spec, exit_spec, given, num_rows) | caches.presents()
        return g.finish(contract, outputs, f"shortstack {__version__}")
    normed, stream = norm(g, spec.ends.final_norm, x, names.FINAL_NORM, "/lm_head/norm")
    if plan.has_state:
        last = last_rows(g, stream, num_rows, "/final_state/last_rows")
        outputs[names.FINAL_STATE] = unit_rms(g, spec, last, "/final_state")
    rows = last_rows(g, normed, num_rows, "/lm_head/last_rows")
    if plan.gives_state(segment):
        own = names.drafter_weight(MODEL_NORM)
        outputs[names.DRAFT_STATE] = norm_op(g, spec.ends.final_norm, stream, own, "/draft_state")
    outputs |= (
        head(g, rows, spec.hidden_size, spec.ends, "/lm_head", weight=full_head(spec), id_map=None) | caches.presents()
    )
    return g.finish(contract, outputs, f"shortstack {__version__}")
