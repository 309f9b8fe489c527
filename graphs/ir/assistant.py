"""The graph of an assistant: a drafter whose layers read the keys and values of the model's layers.

::

    input_ids ─ model's embedding ─┐                 ┌─ the model's caches, read only
                                   ├─ product ─ layers ─ norm ─┬─ head ───── token, ...
    draft_state ───────────────────┘                           └─ product ── draft_state_out

Each run is one row, at the position of the text's newest token, whatever it drafts: attention sees all positions before
that one and not itself, as a layer of the model that masks its diagonal does. A head with centroids::

    y ─ product with centroids ─ TopK ─ rows of these groups ─ Gather from the head ─ product with y ─ logits
                                              └─ Gather of their token ids ───────────────────────── logit_ids

Its rows are stored group by group, so that each look-up reads memory in one piece.
"""

from __future__ import annotations

import onnx_ir as ir

from shortstack import __version__
from shortstack.graphs import names
from shortstack.graphs.assistant_contract import assistant_contract
from shortstack.graphs.drafter_spec import DrafterSpec
from shortstack.graphs.drafter_weights import (
    CENTROIDS,
    EMBED_TOKENS,
    FINAL_NORM,
    HEAD,
    HEAD_IDS,
    INPUT,
    INPUT_BIAS,
    OUTPUT,
    STATE_NORM,
    TOKEN_NORM,
)
from shortstack.graphs.ir.attention import Caches, LayerSite
from shortstack.graphs.ir.builder import GraphBuilder
from shortstack.graphs.ir.exit import full_head
from shortstack.graphs.ir.head import head, readings
from shortstack.graphs.ir.layer import Residual, decoder_layer, residual_sum
from shortstack.graphs.ir.lengths import Lengths
from shortstack.graphs.ir.matrix import embed, project
from shortstack.graphs.ir.norm import norm_op
from shortstack.graphs.ir.weights import WeightStore
from shortstack.graphs.layer_spec import Ends
from shortstack.graphs.precision import KVType
from shortstack.graphs.spec import DType, ModelSpec

_NODE = "/drafter"


def assistant_model(
    spec: ModelSpec, drafter: DrafterSpec, dtype: DType, store: WeightStore, kv_cache: KVType = "float"
) -> ir.Model:
    """Build the graph.

    Args:
        spec: The model.
        drafter: A drafter whose layers read the model's keys and values.
        dtype: Type of activations; the stored weights have it already.
        store: The weights, under the names of :mod:`shortstack.graphs.drafter_weights`, and the model's.
        kv_cache: Type of the model's cache.
    """
    contract = assistant_contract(spec, drafter, dtype, kv_cache)
    g = GraphBuilder("drafter", store)
    inputs = {port.name: g.input(port) for port in contract.inputs}
    lengths = Lengths(inputs[names.SEQLENS_K], inputs[names.TOTAL_SEQUENCE_LENGTH])
    x = Residual(_first_stream(g, drafter, inputs))
    caches = Caches(g)
    for layer, own in enumerate(drafter.layers):
        owner = drafter.shared[layer]
        scales = tuple(names.kv_scale(owner, part) for part in names.KV_PARTS) if kv_cache == "int8" else ()
        site = LayerSite(
            layer=own,
            weights=names.drafter_weight(f"layers.{layer}"),
            node=f"{_NODE}/layers.{layer}",
            owner=owner,
            owns_kv=False,
            sees_itself=False,
            kv_scales=scales,
            number=layer,
        )
        x = decoder_layer(g, site, x, lengths, caches)
    read = residual_sum(g, x, f"{_NODE}/stream")  # [batch, 1, hidden]
    stream = read
    if drafter.has_final_norm:
        read = norm_op(g, drafter.norm, stream, names.drafter_weight(FINAL_NORM), f"{_NODE}/norm")
    state = read if drafter.feedback == "normed" else stream
    if drafter.feedback == "projected":
        state = project(g, read, names.drafter_weight(OUTPUT), f"{_NODE}/output")  # [batch, 1, state]
    outputs = _head(g, spec, drafter, read, state)
    outputs[names.DRAFT_STATE_OUT] = g.op("Identity", [state], f"{_NODE}/draft_state_out")
    for number, presents in caches.rewritten.items():
        owner_name = names.drafter_layer(int(number))
        outputs |= {names.present(owner_name, p): value for p, value in zip(names.KV_PARTS, presents, strict=True)}
    return g.finish(contract, outputs, f"shortstack {__version__}")


def _first_stream(g: GraphBuilder, drafter: DrafterSpec, inputs: dict[str, ir.Value]) -> ir.Value:
    """Append the projection of token and state; returns [batch, 1, hidden]."""
    own = names.drafter_weight(EMBED_TOKENS) if drafter.has_own_embedding else names.EMBED_TOKENS
    token = embed(g, inputs[names.INPUT_IDS], own, f"{_NODE}/embed_tokens")
    if drafter.embed_scale != 1.0:
        token = g.scaled(token, drafter.embed_scale, f"{_NODE}/embed_tokens/scale")
    if drafter.has_token_norm:
        token = norm_op(g, drafter.norm, token, names.drafter_weight(TOKEN_NORM), f"{_NODE}/token_norm")
    state = inputs[names.DRAFT_STATE]
    if drafter.has_state_norm:
        state = norm_op(g, drafter.norm, state, names.drafter_weight(STATE_NORM), f"{_NODE}/state_norm")
    pair = g.op("Concat", [state, token] if drafter.state_first else [token, state], f"{_NODE}/pair", axis=-1)
    x = project(g, pair, names.drafter_weight(INPUT), f"{_NODE}/input")
    return (
        g.op("Add", [x, g.weight(names.drafter_weight(INPUT_BIAS))], f"{_NODE}/input/Add") if drafter.input_bias else x
    )


def _head(
    g: GraphBuilder, spec: ModelSpec, drafter: DrafterSpec, read: ir.Value, state: ir.Value
) -> dict[str, ir.Value]:
    """Append the head; the model's own reads the state, which is as wide as the model's."""
    node = f"{_NODE}/head"
    if drafter.centroids:
        return _centroid_head(g, spec, drafter, read, node)
    if not drafter.has_own_head:
        return head(g, state, drafter.state_width, spec.ends, node, weight=full_head(spec), id_map=None)
    id_map = None if drafter.draft_vocab is None else names.drafter_weight(HEAD_IDS)
    own = names.drafter_weight(HEAD)
    return head(g, read, drafter.hidden_size, Ends(drafter.norm), node, weight=own, id_map=id_map)


def _centroid_head(
    g: GraphBuilder, spec: ModelSpec, drafter: DrafterSpec, read: ir.Value, node: str
) -> dict[str, ir.Value]:
    """Append a head that computes the rows of the likeliest groups alone."""
    size, top = spec.vocab_size // drafter.centroids, drafter.top_centroids
    batch_rows = g.op("Shape", [read], f"{node}/batch_rows", start=0, end=2)
    flat = g.op("Reshape", [read, g.constant([-1, drafter.hidden_size])], f"{node}/flatten")  # [rows, hidden]
    scores = project(g, read, names.drafter_weight(CENTROIDS), f"{node}/centroids")  # [batch, rows, centroids]
    scores = g.op("Reshape", [scores, g.constant([-1, drafter.centroids])], f"{node}/scores")  # [rows, centroids]
    _, groups = g.ops("TopK", [scores, g.constant([top])], f"{node}/groups", ("/values", "/indices"), axis=-1)
    first = g.op(
        "Unsqueeze", [g.op("Mul", [groups, g.constant(size)], f"{node}/first"), g.constant([-1])], f"{node}/up"
    )
    within = g.op("Range", [g.constant(0), g.constant(size), g.constant(1)], f"{node}/within")  # [size]
    places = g.op("Add", [first, within], f"{node}/places")  # [rows, top, size]
    places = g.op("Reshape", [places, g.constant([-1, top * size])], f"{node}/flat_places")
    vectors = embed(g, places, names.drafter_weight(HEAD), f"{node}/rows")  # [rows, top * size, hidden]
    column = g.op("Unsqueeze", [flat, g.constant([-1])], f"{node}/column")  # [rows, hidden, 1]
    product = g.op("MatMul", [vectors, column], f"{node}/MatMul")
    logits = g.op("Squeeze", [product, g.constant([-1])], f"{node}/product")  # [rows, top * size]
    ids = g.op("Gather", [g.weight(names.drafter_weight(HEAD_IDS)), places], f"{node}/ids")

    def token_of(column_of: ir.Value) -> ir.Value:
        wide = g.op("Unsqueeze", [column_of, g.constant([-1])], f"{node}/best_column")
        found = g.op("GatherElements", [ids, wide], f"{node}/best_id", axis=1)
        return g.op("Squeeze", [found, g.constant([-1])], f"{node}/token_id")

    outputs = readings(g, logits, batch_rows, node, token_of)
    count = g.constant([top * size])
    shape = g.op("Concat", [batch_rows, count], f"{node}/ids_shape", axis=0)
    return outputs | {names.LOGIT_IDS: g.op("Reshape", [ids, shape], f"{node}/logit_ids")}
