"""One segment's graph: embedding or hidden states in, layers, exit node or final head out.

::

    input_ids ─ Gather ┐
                       ├─ layers [start, end) ─┬─ sum ──────────── hidden_states_out   (all but the last)
    hidden_states ─────┘                       └─ norm ─ head ──── token, confidence, logits
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from shortstack import __version__
from shortstack.graphs import names
from shortstack.graphs.contract import segment_contract
from shortstack.graphs.errors import UnsupportedError
from shortstack.graphs.ir.block import Residual, decoder_layer, norm, settle
from shortstack.graphs.ir.builder import GraphBuilder
from shortstack.graphs.ir.head import head
from shortstack.graphs.ir.matrix import embed
from shortstack.graphs.ir.weights import WeightStore
from shortstack.graphs.kv_map import producers
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
) -> ir.Model:
    """Build one segment's graph.

    Args:
        spec: The model.
        plan: Its cuts.
        segment: Which segment.
        dtype: Type of activations and cache; the stored weights have it already.
        store: The weights, under the names of :mod:`shortstack.graphs.names`; an exit whose own ``head.weight`` it has
            uses that one, others the final head's.
        kv_cache: Type of the cache.

    Raises:
        UnsupportedError: A layer attends to another layer's cache.
    """
    layers = range(segment.start, segment.end)
    if producers(spec.kv_map, segment.start, segment.end) != tuple(layers):
        raise UnsupportedError(
            "the model shares K,V between layers", found=list(spec.kv_map), remedy="export a model without kv_map"
        )
    exit_spec = plan.exit_of(segment)
    contract = segment_contract(spec, segment, exit_spec, dtype, kv_cache)
    g = GraphBuilder(f"layers [{segment.start}, {segment.end})", store)
    inputs = {port.name: g.input(port) for port in contract.inputs}

    if segment.is_first:
        x = Residual(embed(g, inputs[names.INPUT_IDS], names.EMBED_TOKENS, "/model/embed_tokens"))
    else:
        x = Residual(inputs[names.HIDDEN_STATES])
    lengths = (inputs[names.SEQLENS_K], inputs[names.TOTAL_SEQUENCE_LENGTH])
    if spare_row := Precision(store.formats, kv_cache).has_spare_row(dtype):
        one = g.constant(1, np.int32)
        past_end, total = (g.op("Add", [x, one], f"/model/with_spare_row/{x.name}") for x in lengths)
        lengths = (past_end, total)
    outputs: dict[str, ir.Value] = {}
    for layer in layers:
        x, presents = decoder_layer(g, spec, layer, x, lengths, kv_cache, spare_row=spare_row)
        outputs |= presents

    full_head = names.EMBED_TOKENS if spec.tie_word_embeddings else names.LM_HEAD
    node, weight, id_map = "/lm_head", full_head, None
    if exit_spec is not None:
        node = f"/exits.{exit_spec.exit_layer}"
        outputs[names.HIDDEN_STATES_OUT] = boundary = settle(g, x, f"{node}/hidden_states_out")
        x = Residual(boundary)
        if g.has_weight(own := names.exit_weight(exit_spec.exit_layer, "head.weight")):
            weight = own
        if exit_spec.draft_vocab is not None:
            id_map = names.exit_weight(exit_spec.exit_layer, "head.ids")
    normed, _ = norm(g, spec, x, names.FINAL_NORM, f"{node}/norm")
    outputs |= head(g, normed, inputs[names.NUM_ROWS], spec.hidden_size, node, weight=weight, id_map=id_map)
    return g.finish(contract, outputs, f"shortstack {__version__}")
