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

from shortstack.graphs.manifest import Manifest
from shortstack.runtime.engine.open_graphs import OpenGraphs
from shortstack.runtime.engine.packed_segment import PackedSegment
from shortstack.runtime.engine.slot import Slot
from shortstack.runtime.engine.whole_text import run_text

_TOKENS = (1, 2, 3)  # any will do: a different order of addition shows in nearly every value


def fewest_rows(graphs: OpenGraphs) -> int:
    """Return the fewest rows that a run must have so that no result depends on the number of rows: 1 or 2.

    Bundles without codes of less than 8 bits are not measured, since no such dependence is known for their products.
    """
    if not _may_depend(graphs.bundle.manifest):
        return 1
    spec = graphs.bundle.manifest.spec
    # If a layer does not see its own position, the first position runs separately, and the second is measured.
    sees_itself = all(spec.sees_itself(layer) for layer in range(spec.num_hidden_layers))
    alone = 1 if sees_itself else 2
    short, long = run_text(graphs, _TOKENS[:alone]), run_text(graphs, _TOKENS[: alone + 1])
    row = alone - 1
    is_same = all(np.array_equal(short.heads[depth][row], long.heads[depth][row]) for depth in short.heads)
    return 1 if is_same else 2


def fewest_packed_rows(graphs: OpenGraphs) -> int:
    """Return the same for graphs in the packed form."""
    if not _may_depend(graphs.bundle.manifest):
        return 1
    alone, among = _packed_logits(graphs, 1), _packed_logits(graphs, 2)
    return 1 if all(np.array_equal(*both) for both in zip(alone, among, strict=True)) else 2


def _may_depend(manifest: Manifest) -> bool:
    is_fine = not any(block_format.bits < 8 for block_format in manifest.precision.weights.values())
    is_tiny = manifest.max_length <= len(_TOKENS) or manifest.spec.vocab_size <= max(_TOKENS)  # as only tests have them
    return not (is_fine or is_tiny)


def _packed_logits(graphs: OpenGraphs, rows: int) -> list[np.ndarray]:
    """Return the logits of every head in the first of some rows that run together."""
    manifest = graphs.bundle.manifest
    slot = Slot(graphs, 0, manifest.plan.boundaries)
    cache = graphs.new_slots(1, rows)
    for row in range(rows):
        slot.put(row, _TOKENS[row])
    for segment in range(len(manifest.plan.segments)):
        part = slot.part(segment, range(rows), 0, rows, with_logits=True)
        PackedSegment(graphs, segment, cache, fewest_rows=1).run([part])
    return [head.logits[0] for head in slot.heads]
