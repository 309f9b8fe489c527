"""Whether a run of a single row rounds as the same row does in a longer run, on this machine.

Verifying drafts in one run equals decoding them one by one only if no row's result depends on how many rows a run has.
On some processors onnxruntime's 4-bit products have two classes of runs, those of one row and those of two or more,
which add up in another order (seen with AVX2 and without AVX-512, onnxruntime 1.32.0). There a stack runs no row alone:
it appends a spare one, whose result nobody reads. Two rows of a 4-bit product cost about as much as one.

Which classes there are is measured through the bundle's own graphs when it is loaded, since it differs by processor and
by version. ``shortstack doctor`` measures longer runs as well.
"""

from __future__ import annotations

import numpy as np

from shortstack.runtime.engine.open_graphs import OpenGraphs
from shortstack.runtime.engine.whole_text import run_text

_TOKENS = (1, 2, 3)  # any will do: products that are added up in another order differ in nearly every value


def fewest_rows(graphs: OpenGraphs) -> int:
    """Return the least number of rows that a run must have so that rows do not depend on it: 1 or 2.

    Bundles without 4-bit weights are not measured: of their products, no such classes are known.
    """
    manifest = graphs.bundle.manifest
    spec = manifest.spec
    if not any(block_format.bits == 4 for block_format in manifest.precision.weights.values()):
        return 1
    if manifest.max_length <= len(_TOKENS) or spec.vocab_size <= max(_TOKENS):
        return 1  # a model of a test
    # The position before comes first, in a run of its own, where a layer does not see itself.
    sees_itself = all(spec.sees_itself(layer) for layer in range(spec.num_hidden_layers))
    alone = 1 if sees_itself else 2
    short, long = run_text(graphs, _TOKENS[:alone]), run_text(graphs, _TOKENS[: alone + 1])
    row = alone - 1
    is_same = all(np.array_equal(short.heads[depth][row], long.heads[depth][row]) for depth in short.heads)
    return 1 if is_same else 2
