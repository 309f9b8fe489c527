"""The packed form of a segment's graph: rows of several sequences in one run.

A bundle holds each graph in two forms over the same weights, one for a single sequence and the packed one. In the
packed form the rows of all sequences lie side by side, and every product runs over all of them at once. Only attention
sees sequences. Each has a *slot* of the cache, and a chunk of rows that is padded to the longest one::

    rows       a0 a1 a2 | b0 | d0 d1          ids, hidden states, heads: [1, seq]
    to_slots   0 1 2                          int64 [slots, chunk]: the row at each place; 0 where there is none
               3 0 0
               0 0 0                          a slot without rows in this run
               4 5 0
    to_rows    0 1 2  3  9 10                 int64 [1, seq]: the place of each row, counted through all slots
    query_seqlens  3 1 0 2                    int32 [slots]: places that hold rows
    seqlens_k      past + rows - 1            int32 [slots]; 0 where there are no rows

======================  =================================  ===========================================================
port                    dtype, shape                       differs from the form of one sequence
======================  =================================  ===========================================================
query_seqlens           int32 [slots]                      new
to_slots, to_rows       int64 [slots, chunk], [1, seq]     new
row_positions           int64 [1, seq]                     new; where a model reads the position of a row itself
seqlens_k               int32 [slots]                      one for each slot
past, present, shared   [slots, kv_heads, capacity, ...]   past + chunk <= capacity in every slot, also an idle one
present {consumer}      as its producer's                  new: a consumer writes its producer's rows once more, the
                                                           same values; bound to the producer's buffer
new_rows {j} key/value  float [1, seq, kv_heads * dim]     new: the rows that producer j below the cut has written
======================  =================================  ===========================================================

The caller decides whether attention sees a spare row behind a sequence's own (:meth:`Precision.has_spare_row`): a place
counted in ``query_seqlens`` and ``seqlens_k``, which ``to_rows`` does not name. A run with ``past`` positions cached
writes from ``past`` on.

onnxruntime has attention over chunks of different lengths from 1.32 on, on the CPU. Layers that use keys and values of
layers above them, and layers that do not see their own position, run one sequence at a time: their models have no
packed form.
"""

from __future__ import annotations

from shortstack.graphs.spec import ModelSpec

LEAST_ONNXRUNTIME = (1, 32)
"""The first version of onnxruntime that runs the packed form."""


def can_pack(spec: ModelSpec) -> bool:
    """Return whether a model's graphs have a packed form."""
    return all(spec.sees_itself(layer) for layer in range(spec.num_hidden_layers))
