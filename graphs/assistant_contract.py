"""The graph contract of an assistant, a drafter that reads the model's own keys and values.

One run is one draft: the token that is newest so far, and a state of the position before it. The lengths count that
token, so its position is ``seqlens_k``. Keys and values of all positions before it are in the model's cache.

==========================  ================================  =================================================
tensor                      dtype, shape                      meaning
==========================  ================================  =================================================
input_ids                   int64 [batch, 1]
draft_state                 float [batch, 1, state]           the model's normalised final state, or the last
                                                              run's draft_state_out
seqlens_k                   int32 [batch]                     the position of the text's newest token, in all
                                                              runs of a round
total_sequence_length       int32 []                          that position + 1
shared {j} key/value        float or int8 [batch, kv_heads,   the model's cache, read only
                            capacity, head_dim]
token, top_prob, margin,    [batch, 1]                        as of any head
entropy
logits                      float [batch, 1, n]               of the tokens that the head computes
logit_ids                   int64 [batch, 1, n]               of a head with centroids: these tokens, all different,
                                                              in no order
draft_state_out             float [batch, 1, state]
present drafter.{i}         as shared                         beside an int8 cache: the same buffer, which does not
key/value                                                     change
==========================  ================================  =================================================
"""

from __future__ import annotations

from shortstack.graphs import names
from shortstack.graphs.contract import GraphContract, Port, cache_shape, cache_type
from shortstack.graphs.drafter_spec import DrafterSpec
from shortstack.graphs.precision import KVType
from shortstack.graphs.spec import DType, ModelSpec


def assistant_contract(spec: ModelSpec, drafter: DrafterSpec, dtype: DType, kv_cache: KVType) -> GraphContract:
    """Return the contract of a drafter that reads the model's keys and values.

    Args:
        spec: The model.
        drafter: The drafter.
        dtype: Type of activations.
        kv_cache: Type of the model's cache.
    """
    state, row = ("batch", 1, drafter.state_width), ("batch", 1)
    kv, count = cache_type(dtype, kv_cache), computed_logits(spec, drafter)
    inputs = [
        Port(names.INPUT_IDS, "int64", row),
        Port(names.DRAFT_STATE, dtype, state),
        Port(names.SEQLENS_K, "int32", ("batch",)),
        Port(names.TOTAL_SEQUENCE_LENGTH, "int32", ()),
        *(
            Port(names.shared(owner, part), kv, cache_shape(spec, owner))
            for owner in sorted(set(drafter.shared))
            for part in names.KV_PARTS
        ),
    ]
    outputs = [
        Port(names.TOKEN, "int64", row),
        Port(names.TOP_PROB, dtype, row),
        Port(names.MARGIN, dtype, row),
        Port(names.ENTROPY, dtype, row),
        Port(names.LOGITS, dtype, (*row, count)),
        *([Port(names.LOGIT_IDS, "int64", (*row, count))] if drafter.centroids else []),
        Port(names.DRAFT_STATE_OUT, dtype, state),
    ]
    if kv == "int8":
        outputs += [
            Port(names.present(names.drafter_layer(layer), part), kv, cache_shape(spec, owner))
            for layer, owner in enumerate(drafter.shared)
            for part in names.KV_PARTS
        ]
    return GraphContract(tuple(inputs), tuple(outputs))


def computed_logits(spec: ModelSpec, drafter: DrafterSpec) -> int:
    """Return how many logits a draft has."""
    if drafter.centroids:
        return spec.vocab_size // drafter.centroids * drafter.top_centroids
    return spec.vocab_size if drafter.draft_vocab is None else drafter.draft_vocab
