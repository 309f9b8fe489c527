"""Measures whether, on this machine, a row that runs alone is rounded in the same way as in a longer run.

Verifying drafts in one run equals decoding them one by one only if a row's result does not depend on the number of
rows in its run. On some processors onnxruntime's 4-bit products treat runs of one row and runs of two or more
differently: they add up in a different order (seen with AVX2 and without AVX-512, onnxruntime 1.32.0). On such a
machine a stack never runs a row alone. It appends a spare row, whose result is not read. Two rows of a 4-bit product
cost about as much as one.

This differs by processor and by version, so it is measured with the bundle's own graphs when the bundle is loaded.
``shortstack doctor`` measures longer runs as well.
"""

from __future__ import annotations

import numpy as np

from shortstack.runtime.engine.open_graphs import OpenGraphs
from shortstack.runtime.engine.whole_text import run_text

_TOKENS = (1, 2, 3)  # any will do: a different order of addition shows in nearly every value


def fewest_rows(graphs: OpenGraphs) -> int:
    """Return the fewest rows that a run must have so that no result depends on the number of rows: 1 or 2.

    Bundles without codes of less than 8 bits are not measured, since no such dependence is known for their products.
    """
    manifest = graphs.bundle.manifest
    spec = manifest.spec
    if not any(block_format.bits < 8 for block_format in manifest.precision.weights.values()):
        return 1
    if manifest.max_length <= len(_TOKENS) or spec.vocab_size <= max(_TOKENS):
        return 1  # only tests have models this small
    # If a layer does not see its own position, the first position runs separately, and the second is measured.
    sees_itself = all(spec.sees_itself(layer) for layer in range(spec.num_hidden_layers))
    alone = 1 if sees_itself else 2
    short, long = run_text(graphs, _TOKENS[:alone]), run_text(graphs, _TOKENS[: alone + 1])
    row = alone - 1
    is_same = all(np.array_equal(short.heads[depth][row], long.heads[depth][row]) for depth in short.heads)
    return 1 if is_same else 2
