"""The uncut model as one graph with the inputs and outputs that onnxruntime-genai drives, from the same weights.data.

==========================  =============================================  ==========================================
tensor                      dtype, shape                                   meaning
==========================  =============================================  ==========================================
input_ids                   int64 [batch, seq]
attention_mask              int64 [batch, total]                           ones; lengths are counted from it
past {i} key/value          float or int8 [batch, kv_heads, capacity,      bound as past *and* present; {i} counts the
                            head_dim]                                      layers that own a cache
logits                      float [batch, seq, vocab]                      of all positions
present {i} key/value       same as the past                               the same buffer, updated in place
==========================  =============================================  ==========================================

Layers, head and attention's spare row are those of the segments, so logits equal theirs bit for bit.
"""

from __future__ import annotations

import onnx_ir as ir

from shortstack import __version__
from shortstack.graphs import names
from shortstack.graphs.contract import CacheType, GraphContract, Port, cache_shape, cache_type
from shortstack.graphs.genai_config import check_uncut
from shortstack.graphs.ir.attention import Caches, layer_site
from shortstack.graphs.ir.builder import GraphBuilder
from shortstack.graphs.ir.embedding import embed_tokens, first_stream
from shortstack.graphs.ir.exit import full_head
from shortstack.graphs.ir.head import logits_of
from shortstack.graphs.ir.layer import Residual, Tokens, decoder_layer, norm, residual_sum
from shortstack.graphs.ir.lengths import Lengths, with_spare_row
from shortstack.graphs.ir.weights import WeightStore
from shortstack.graphs.kv_map import producers
from shortstack.graphs.plan import SplitPlan
from shortstack.graphs.precision import KVType, Precision
from shortstack.graphs.spec import DType, ModelSpec


def whole_contract(spec: ModelSpec, dtype: DType, kv_cache: KVType = "float") -> GraphContract:
    """Return the inputs and outputs of the uncut graph, its caches under the numbers of their owners."""
    kv: CacheType = cache_type(dtype, kv_cache)
    owners = producers(spec.kv_map, 0, spec.num_hidden_layers)
    caches = [(owner, part) for owner in owners for part in names.KV_PARTS]
    inputs = (
        Port(names.INPUT_IDS, "int64", ("batch", "seq")),
        Port(names.ATTENTION_MASK, "int64", ("batch", "total")),
        *(Port(names.past(owner, part), kv, cache_shape(spec, owner)) for owner, part in caches),
    )
    outputs = (
        Port(names.LOGITS, dtype, ("batch", "seq", spec.vocab_size)),
        *(Port(names.present(owner, part), kv, cache_shape(spec, owner)) for owner, part in caches),
    )
    return GraphContract(inputs, outputs)


def whole_model(
    spec: ModelSpec, plan: SplitPlan, dtype: DType, store: WeightStore, kv_cache: KVType = "float"
) -> ir.Model:
    """Build the uncut graph.

    Args:
        spec: The model.
        plan: Where the segments are cut: there the residual stream is added up here, too, before it is normalised.
        dtype: Type of activations and cache.
        store: The weights of the bundle.
        kv_cache: Type of the cache.

    Raises:
        UnsupportedError: A layer does not see its own position.
    """
    check_uncut(spec)
    contract = whole_contract(spec, dtype, kv_cache)
    g = GraphBuilder("all layers", store)
    inputs = {port.name: g.input(port) for port in contract.inputs}
    ids = inputs[names.INPUT_IDS]
    lengths = _lengths(g, inputs[names.ATTENTION_MASK])
    x = Residual(first_stream(g, spec, ids, lengths))
    layers = range(spec.num_hidden_layers)
    tokens = Tokens(ids, _embedded(g, spec, x, ids), spec.hidden_size) if spec.reads_tokens(layers) else None
    if Precision(store.formats, kv_cache).has_spare_row(dtype):
        lengths = with_spare_row(g, lengths)
    caches = Caches(g)
    for layer in layers:
        if layer in plan.boundaries:
            x = Residual(residual_sum(g, x, f"/model/layers.{layer}/stream"))
        x = decoder_layer(g, layer_site(spec, layer, kv_cache), x, lengths, caches, tokens=tokens)
    normed, _ = norm(g, spec.ends.final_norm, x, names.FINAL_NORM, "/lm_head/norm")
    outputs = {names.LOGITS: _logits(g, spec, normed)} | caches.presents()
    model = g.finish(contract, outputs, f"shortstack {__version__}")
    _renumber(model, spec)
    return model


def _embedded(g: GraphBuilder, spec: ModelSpec, x: Residual, ids: ir.Value) -> ir.Value:
    """Return the scaled embeddings: the first stream, unless positions were added to it."""
    return embed_tokens(g, spec, ids, "/model/embed_again") if spec.ends.learned_positions else x.stream


def _lengths(g: GraphBuilder, mask: ir.Value) -> Lengths:
    """Append what attention must know of a run: how many ones a row of the mask has, and how long it is."""
    node = "/model/attention_mask"
    to = int(ir.DataType.INT32)
    ones = g.op("ReduceSum", [mask, g.constant([1])], f"{node}/ReduceSum", keepdims=0)  # [batch]
    past_end = g.op("Cast", [g.op("Sub", [ones, g.constant(1)], f"{node}/Sub")], f"{node}/past_end", to=to)
    length = g.op("Squeeze", [g.op("Shape", [mask], f"{node}/Shape", start=1, end=2)], f"{node}/length")
    return Lengths(past_end, g.op("Cast", [length], f"{node}/total", to=to))


def _logits(g: GraphBuilder, spec: ModelSpec, normed: ir.Value) -> ir.Value:
    """Append the head of all positions, [batch, seq, hidden] -> [batch, seq, vocab]."""
    node = "/lm_head"
    batch_rows = g.op("Shape", [normed], f"{node}/batch_rows", start=0, end=2)
    flat = g.op("Reshape", [normed, g.constant([-1, spec.hidden_size])], f"{node}/flatten")  # [batch * seq, hidden]
    logits = logits_of(g, spec.ends, flat, full_head(spec), node)
    shape = g.op("Concat", [batch_rows, g.constant([spec.vocab_size])], f"{node}/logits_shape", axis=0)
    return g.op("Reshape", [logits, shape], f"{node}/logits")


def _renumber(model: ir.Model, spec: ModelSpec) -> None:
    """Number the caches from 0: onnxruntime-genai counts caches, and not layers."""
    owners = producers(spec.kv_map, 0, spec.num_hidden_layers)
    found = {value.name: value for value in (*model.graph.inputs, *model.graph.outputs)}
    for number, owner in enumerate(owners):
        for part in names.KV_PARTS:
            for name in (names.past, names.present):
                found[name(owner, part)].name = name(number, part)
