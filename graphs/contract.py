"""The graph contract: which tensors cross each graph's border, and what they look like.

The exporter builds graphs from it, the bundle stores it, the runtime checks its sessions against it. Dimension names
are the legend of :mod:`shortstack.graphs.spec`; tensor names are those of :mod:`shortstack.graphs.names`, {j} being the
layer's number in the full model.

======================  ===========  ================================  =========================================
tensor                  graph        dtype, shape                      meaning
======================  ===========  ================================  =========================================
input_ids               first, token int64 [batch, seq]                also where the exit sees the token
hidden_states           all but      float [batch, seq, hidden]        residual stream at the lower boundary
                        first
seqlens_k               all          int32 [batch]                     past + seq - 1; rolling back is passing a
                                                                       smaller value
total_sequence_length   all          int32 []                          past + seq
num_rows                all          int64 []                          the head sees the last rows only; 0 skips
                                                                       it
exit_state              exits that   float [batch, rows, hidden]       states of the positions before the rows
                        see states
past {j} key/value      producers    float or int8 [batch, kv_heads,   bound as past *and* present; {j} is
                        inside       capacity, head_dim]               ``exits.E`` for the block of an exit
present {j} key/value   producers    same                              the same buffer, updated in place
                        inside
shared {j} key/value    consumers    same                              read only: a producer below the cut
hidden_states_out       all but      float [batch, seq, hidden]        residual stream at the upper boundary,
                        last                                           before any norm
token                   all          int64 [batch, rows]               arg max; ties go to the lower row
top_prob                all          float [batch, rows]               probability of ``token``
margin                  all          float [batch, rows]               top-1 minus top-2 probability
entropy                 all          float [batch, rows]               in nats
logits                  all          float [batch, rows, vocab]        fetched only when sampling asks
gate                    exits with   float [batch, rows]               the gate's confidence, 0..1
                        a gate
exit_state_out          exits that   float [batch, rows, hidden]       the exit's guess of the rows' own states
                        see states
final_state             last, if an  float [batch, rows, hidden]       the rows' true states
                        exit sees
                        states
======================  ===========  ================================  =========================================

Where weights are in blocks and the cache is float32, attention sees one empty row behind the run's own
(:meth:`Precision.has_spare_row`): ``capacity`` is at least total + 1 then, and so are the rows of the rotary tables.

An int8 cache holds ``round(value / scale)`` per channel; the scales are weights of the producer's graph, and every
consumer of its cache uses the same ones.

The *state* of a position is the residual stream after all layers, divided by its root mean square.

A trimmed head's ``logits`` are [batch, rows, draft_vocab]; its ``token`` is already a full-vocabulary id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shortstack.graphs import names
from shortstack.graphs.drafter_spec import DrafterSpec
from shortstack.graphs.errors import ContractError
from shortstack.graphs.kv_map import borrowed, lenders, producers
from shortstack.graphs.plan import ExitSpec, Segment, SplitPlan
from shortstack.graphs.precision import KVType
from shortstack.graphs.spec import DType, ModelSpec

PortType = Literal["int64", "int32", "int8", "float32", "float16"]
CacheType = Literal["float32", "float16", "int8"]


@dataclass(frozen=True, slots=True)
class Port:
    """One tensor on a graph's border.

    Attributes:
        name: Its name, from :mod:`shortstack.graphs.names`.
        dtype: Element type.
        shape: An int is fixed, a str is a dimension of the legend.
    """

    name: str
    dtype: PortType
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(str(d) for d in self.shape)}]"


@dataclass(frozen=True, slots=True)
class GraphContract:
    """All inputs and outputs of one segment's graph, in order."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def cache_type(dtype: DType, kv_cache: KVType) -> CacheType:
    """Return the element type of the cache buffers."""
    return "int8" if kv_cache == "int8" else dtype


def cache_types(
    spec: ModelSpec, segment: Segment, exit_spec: ExitSpec | None, dtype: DType, kv_cache: KVType = "float"
) -> dict[names.CacheOwner, CacheType]:
    """Return the element types of the caches that a segment writes, by owner; arguments as :func:`segment_contract`.

    The cache of an exit's block is never int8: it is one layer's, and has no calibrated scales.
    """
    kv = cache_type(dtype, kv_cache)
    types: dict[names.CacheOwner, CacheType] = dict.fromkeys(producers(spec.kv_map, segment.start, segment.end), kv)
    if exit_spec is not None and exit_spec.branch == "block":
        types[names.exit_block(exit_spec.exit_layer)] = cache_type(dtype, "float")
    return types


def cache_shape(spec: ModelSpec, owner: names.CacheOwner) -> tuple[int | str, ...]:
    """Return the shape of the keys of an owner, and of its values: heads may differ from layer to layer."""
    kv_heads, head_dim = cache_heads(spec, owner)
    return "batch", kv_heads, "capacity", head_dim


def cache_heads(spec: ModelSpec, owner: names.CacheOwner) -> tuple[int, int]:
    """Return how many heads an owner's keys have, and how wide each is in the cache."""
    attention = spec.cache_attention(owner)
    return attention.kv_heads, attention.cache_head_dim


def segment_contract(
    spec: ModelSpec,
    plan: SplitPlan,
    segment: Segment,
    dtype: DType,
    kv_cache: KVType = "float",
    *,
    is_packed: bool = False,
    rewrites: bool = True,
) -> GraphContract:
    """Return the contract of one segment.

    Args:
        spec: The model.
        plan: Where it is cut, and what drafts for it.
        segment: Which segment.
        dtype: Type of activations.
        kv_cache: Type of the cache.
        is_packed: The form of several sequences, see :mod:`shortstack.graphs.packing`.
        rewrites: Layers that use another one's int8 cache have a present for it, see :attr:`Manifest.rewrites`.
    """
    exit_spec = plan.exit_of(segment)
    hidden = ("batch", "seq", spec.hidden_size)
    state = ("batch", "rows", spec.hidden_size)
    sees_token = (exit_spec is not None and exit_spec.sees_token) or spec.reads_tokens(
        range(segment.start, segment.end)
    )
    sees_state = exit_spec is not None and exit_spec.sees_state
    vocab = spec.vocab_size if exit_spec is None or exit_spec.draft_vocab is None else exit_spec.draft_vocab
    kv = cache_type(dtype, kv_cache)
    owned = cache_types(spec, segment, exit_spec, dtype, kv_cache)
    first = (
        Port(names.INPUT_IDS, "int64", ("batch", "seq"))
        if segment.is_first
        else Port(names.HIDDEN_STATES, dtype, hidden)
    )
    lent = borrowed(spec.kv_map, segment.start, segment.end)
    inputs = [
        first,
        *([Port(names.INPUT_IDS, "int64", ("batch", "seq"))] if sees_token and not segment.is_first else []),
        Port(names.SEQLENS_K, "int32", ("slots" if is_packed else "batch",)),
        Port(names.TOTAL_SEQUENCE_LENGTH, "int32", ()),
        Port(names.NUM_ROWS, "int64", ()),
        *(_packing_inputs(spec, segment) if is_packed else []),
        *([Port(names.EXIT_STATE, dtype, state)] if sees_state else []),
        *(Port(names.past(j, part), own, cache_shape(spec, j)) for j, own in owned.items() for part in names.KV_PARTS),
        *(Port(names.shared(j, part), kv, cache_shape(spec, j)) for j in lent for part in names.KV_PARTS),
        *(_new_rows(spec, lent, dtype) if is_packed else []),
    ]
    outputs = [] if segment.is_last else [Port(names.HIDDEN_STATES_OUT, dtype, hidden)]
    outputs += [
        Port(names.TOKEN, "int64", ("batch", "rows")),
        Port(names.TOP_PROB, dtype, ("batch", "rows")),
        Port(names.MARGIN, dtype, ("batch", "rows")),
        Port(names.ENTROPY, dtype, ("batch", "rows")),
        Port(names.LOGITS, dtype, ("batch", "rows", vocab)),
        *([Port(names.GATE, dtype, ("batch", "rows"))] if exit_spec is not None and exit_spec.has_gate else []),
        *([Port(names.EXIT_STATE_OUT, dtype, state)] if sees_state else []),
        *([Port(names.FINAL_STATE, dtype, state)] if segment.is_last and plan.has_state else []),
        *(
            Port(names.present(j, part), own, cache_shape(spec, j))
            for j, own in owned.items()
            for part in names.KV_PARTS
        ),
    ]
    outputs += [Port(names.feature(depth), dtype, hidden) for depth in plan.features_of(segment)]
    if plan.gives_state(segment):
        outputs.append(Port(names.DRAFT_STATE, dtype, hidden))
    if is_packed or (rewrites and kv == "int8"):
        outputs += [
            Port(names.present(j, part), kv, cache_shape(spec, spec.kv_map[j]))
            for j in range(segment.start, segment.end)
            if spec.kv_map[j] != j
            for part in names.KV_PARTS
        ]
    if is_packed:
        outputs += _new_rows(spec, lenders(spec.kv_map, segment.start, segment.end), dtype)
    return GraphContract(tuple(inputs), tuple(outputs))


def drafter_contract(spec: ModelSpec, drafter: DrafterSpec, dtype: DType, stage: int = 0) -> GraphContract:
    """Return the contract of the graph of a drafter's layers and head. It runs rows of one sequence.

    Row r of a run is the pair of the token ``input_ids[r]`` and the state ``draft_state[r]`` of the position before.
    Where each layer drafts one token, there is such a graph for each ``stage``; all but the last one give the states of
    all rows, which the next one reads.
    """
    state = ("batch", "seq", drafter.hidden_size)
    vocab = spec.vocab_size if drafter.draft_vocab is None else drafter.draft_vocab
    caches = [
        (names.drafter_layer(layer), ("batch", own.attention.kv_heads, "capacity", own.attention.cache_head_dim))
        for layer, own in enumerate(drafter.layers)
        if layer == stage or not drafter.layer_per_draft
    ]
    states = "seq" if stage < drafter.stages - 1 else "rows"
    inputs = [
        Port(names.INPUT_IDS, "int64", ("batch", "seq")),
        Port(names.DRAFT_STATE, dtype, state),
        Port(names.SEQLENS_K, "int32", ("batch",)),
        Port(names.TOTAL_SEQUENCE_LENGTH, "int32", ()),
        Port(names.NUM_ROWS, "int64", ()),
        *(Port(names.past(owner, part), dtype, shape) for owner, shape in caches for part in names.KV_PARTS),
    ]
    outputs = [
        Port(names.TOKEN, "int64", ("batch", "rows")),
        Port(names.TOP_PROB, dtype, ("batch", "rows")),
        Port(names.MARGIN, dtype, ("batch", "rows")),
        Port(names.ENTROPY, dtype, ("batch", "rows")),
        Port(names.LOGITS, dtype, ("batch", "rows", vocab)),
        Port(names.DRAFT_STATE_OUT, dtype, ("batch", states, drafter.hidden_size)),
        *(Port(names.present(owner, part), dtype, shape) for owner, shape in caches for part in names.KV_PARTS),
    ]
    return GraphContract(tuple(inputs), tuple(outputs))


def fuse_contract(spec: ModelSpec, drafter: DrafterSpec, dtype: DType) -> GraphContract:
    """Return the contract of the graph that makes a drafter's states from depths of the model's residual stream."""
    hidden = ("batch", "seq", spec.hidden_size)
    inputs = tuple(Port(names.feature(depth), dtype, hidden) for depth in drafter.features)
    return GraphContract(inputs, (Port(names.DRAFT_STATE, dtype, ("batch", "seq", drafter.hidden_size)),))


def _packing_inputs(spec: ModelSpec, segment: Segment) -> list[Port]:
    return [
        Port(names.QUERY_SEQLENS, "int32", ("slots",)),
        Port(names.TO_SLOTS, "int64", ("slots", "chunk")),
        Port(names.TO_ROWS, "int64", ("batch", "seq")),
        *([Port(names.ROW_POSITIONS, "int64", ("batch", "seq"))] if reads_positions(spec, segment) else []),
    ]


def reads_positions(spec: ModelSpec, segment: Segment) -> bool:
    """Return whether something besides the attention kernel reads the positions of a segment's rows."""
    if spec.ends.learned_positions and segment.is_first:
        return True
    layers = spec.layers[segment.start : segment.end]
    return any(layer.attention.qk_norm_after_rope or layer.attention.query_scale is not None for layer in layers)


def _new_rows(spec: ModelSpec, owners: tuple[int, ...], dtype: DType) -> list[Port]:
    found = []
    for owner in owners:
        kv_heads, head_dim = cache_heads(spec, owner)
        found += [
            Port(names.new_rows(owner, part), dtype, ("batch", "seq", kv_heads * head_dim)) for part in names.KV_PARTS
        ]
    return found


def check_ports(where: str, found: GraphContract, expected: GraphContract) -> None:
    """Compare a graph's border with its contract.

    Args:
        where: The graph, for the message.
        found: What the graph has.
        expected: What the contract says.

    Raises:
        ContractError: Listing every missing, extra and differing port.
    """
    differences: list[str] = []
    for side, ours, theirs in (
        ("input", expected.inputs, found.inputs),
        ("output", expected.outputs, found.outputs),
    ):
        want = {port.name: port for port in ours}
        have = {port.name: port for port in theirs}
        differences += [f"missing {side} {want[name]}" for name in want.keys() - have.keys()]
        differences += [f"extra {side} {have[name]}" for name in have.keys() - want.keys()]
        differences += [
            f"{side} {have[name]} should be {want[name]}"
            for name in want.keys() & have.keys()
            if not _same_port(have[name], want[name])
        ]
    if differences:
        raise ContractError(
            f"{where} does not match its contract: {'; '.join(sorted(differences))}",
            remedy="re-export the bundle, or check that all its files come from one export",
        )


def _same_port(have: Port, want: Port) -> bool:
    """Compare types, ranks and fixed dimensions; symbolic ones may carry any name."""
    return (
        have.dtype == want.dtype
        and len(have.shape) == len(want.shape)
        and all(
            not (isinstance(h, int) and isinstance(w, int)) or h == w
            for h, w in zip(have.shape, want.shape, strict=True)
        )
    )
