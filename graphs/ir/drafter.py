"""The graphs of a trained drafter (:mod:`shortstack.graphs.drafter_spec`): one fuses features, one drafts.

::

    drafter-fuse.onnx   feature.{depth} ... ─ norms ─ Concat ─ product ────────────────────── draft_state
    drafter.onnx        input_ids ─ embedding ─ norm ┬─ product, or the attention ─ layers ┬─ draft_state_out
                        draft_state ────────── norm ─┘   of the first layer                └─ norm ─ head ─ token, ...

Where each layer drafts one token, there is a graph for each: drafter.onnx, drafter-1.onnx, ...

The layers keep keys and values of their own. Nothing that a drafter computes decides a token, so it has no spare row.
"""

from __future__ import annotations

import onnx_ir as ir

from shortstack import __version__
from shortstack.graphs import names
from shortstack.graphs.contract import drafter_contract, fuse_contract
from shortstack.graphs.drafter_spec import DrafterSpec
from shortstack.graphs.drafter_weights import (
    EMBED_TOKENS,
    FINAL_NORM,
    FUSE,
    HEAD,
    HEAD_IDS,
    INPUT,
    INPUT_BIAS,
    STATE_NORM,
    TOKEN_NORM,
    feature_norms,
    stage_part,
)
from shortstack.graphs.ir.assistant import assistant_model
from shortstack.graphs.ir.attention import Caches, LayerSite
from shortstack.graphs.ir.builder import GraphBuilder
from shortstack.graphs.ir.exit import full_head
from shortstack.graphs.ir.head import head, last_rows
from shortstack.graphs.ir.layer import Residual, decoder_layer, residual_sum
from shortstack.graphs.ir.lengths import Lengths
from shortstack.graphs.ir.matrix import embed, project
from shortstack.graphs.ir.norm import norm_op
from shortstack.graphs.ir.weights import WeightStore
from shortstack.graphs.layer_spec import Ends
from shortstack.graphs.precision import KVType
from shortstack.graphs.spec import DType, ModelSpec

_NODE = "/drafter"


def fuse_model(spec: ModelSpec, drafter: DrafterSpec, dtype: DType, store: WeightStore) -> ir.Model:
    """Build the graph that makes a drafter's states from features.

    Args:
        spec: The model.
        drafter: A drafter that reads features.
        dtype: Type of activations; the stored weights have it already.
        store: The weights, under the names of :mod:`shortstack.graphs.drafter_weights`.
    """
    contract = fuse_contract(spec, drafter, dtype)
    g = GraphBuilder("features of a drafter", store)
    features = [g.input(port) for port in contract.inputs]
    norms = [names.drafter_weight(part) for part in feature_norms(drafter)]
    node = f"{_NODE}/fuse"
    if drafter.feature_norm == "each":
        features = [
            norm_op(g, drafter.norm, feature, weight, f"{node}/{number}")
            for number, (feature, weight) in enumerate(zip(features, norms, strict=True))
        ]
    joined = features[0] if len(features) == 1 else g.op("Concat", features, f"{node}/Concat", axis=-1)
    if drafter.feature_norm == "all":
        joined = norm_op(g, drafter.norm, joined, norms[0], node)
    state = project(g, joined, names.drafter_weight(FUSE), node)
    return g.finish(contract, {names.DRAFT_STATE: state}, f"shortstack {__version__}")


def drafter_model(spec: ModelSpec, drafter: DrafterSpec, dtype: DType, store: WeightStore, stage: int = 0) -> ir.Model:
    """Build the graph of a drafter's layers and head, or of one of its stages; arguments as in :func:`fuse_model`."""
    contract = drafter_contract(spec, drafter, dtype, stage)
    g = GraphBuilder("drafter", store)
    inputs = {port.name: g.input(port) for port in contract.inputs}
    lengths = Lengths(inputs[names.SEQLENS_K], inputs[names.TOTAL_SEQUENCE_LENGTH])
    num_rows = inputs[names.NUM_ROWS]

    def own(part: str) -> str:
        return names.drafter_weight(stage_part(part, stage))

    table = own(EMBED_TOKENS) if drafter.has_own_embedding else names.EMBED_TOKENS
    token = embed(g, inputs[names.INPUT_IDS], table, f"{_NODE}/embed_tokens")
    if drafter.embed_scale != 1.0:
        token = g.scaled(token, drafter.embed_scale, f"{_NODE}/embed_tokens/scale")
    if drafter.has_token_norm:
        token = norm_op(g, drafter.norm, token, own(TOKEN_NORM), f"{_NODE}/token_norm")
    state = normed = inputs[names.DRAFT_STATE]
    if drafter.has_state_norm:
        normed = norm_op(g, drafter.norm, state, own(STATE_NORM), f"{_NODE}/state_norm")
    pair = g.op("Concat", [normed, token] if drafter.state_first else [token, normed], f"{_NODE}/pair", axis=-1)
    reads: ir.Value | None = None
    if drafter.is_stacked:
        x, reads = Residual(normed if drafter.normed_stream else state), pair
    else:
        bias = g.weight(own(INPUT_BIAS)) if drafter.input_bias else None
        x = Residual(project(g, pair, own(INPUT), f"{_NODE}/input"), bias=bias)
        x = Residual(residual_sum(g, x, f"{_NODE}/input"))
    layers = range(stage, stage + 1) if drafter.layer_per_draft else range(len(drafter.layers))
    caches, is_last = Caches(g), stage == drafter.stages - 1
    for layer in layers:
        site = LayerSite(
            layer=drafter.layers[layer],
            weights=names.drafter_weight(f"layers.{layer}"),
            node=f"{_NODE}/layers.{layer}",
            owner=names.drafter_layer(layer),
        )
        rows = num_rows if is_last and layer == layers[-1] else None
        x = decoder_layer(g, site, x, lengths, caches, rows, reads=reads if layer == 0 else None)
    stream = residual_sum(g, x, f"{_NODE}/stream")  # [batch, rows, hidden]; all rows below the last stage
    read = stream
    if drafter.has_final_norm:
        read = norm_op(g, drafter.norm, stream, own(FINAL_NORM), f"{_NODE}/norm")
    outputs = head(
        g,
        read if is_last else last_rows(g, read, num_rows, f"{_NODE}/head/last_rows"),
        drafter.hidden_size,
        Ends(drafter.norm) if drafter.has_own_head else spec.ends,
        f"{_NODE}/head",
        weight=own(HEAD) if drafter.has_own_head else full_head(spec),
        id_map=None if drafter.draft_vocab is None else names.drafter_weight(HEAD_IDS),
    )
    fed_back = read if drafter.feedback == "normed" else stream
    outputs[names.DRAFT_STATE_OUT] = g.op("Identity", [fed_back], f"{_NODE}/draft_state_out")
    return g.finish(contract, outputs | caches.presents(), f"shortstack {__version__}")


def drafter_models(
    spec: ModelSpec, drafter: DrafterSpec, dtype: DType, store: WeightStore, kv_cache: KVType = "float"
) -> dict[str, ir.Model]:
    """Return a drafter's graphs by their files; arguments as in :func:`fuse_model` and :func:`assistant_model`."""
    if drafter.shared:
        return {names.drafter_file(0): assistant_model(spec, drafter, dtype, store, kv_cache)}
    found = {
        names.drafter_file(stage): drafter_model(spec, drafter, dtype, store, stage) for stage in range(drafter.stages)
    }
    if drafter.features:
        found[names.FUSE_FILE] = fuse_model(spec, drafter, dtype, store)
    return found
