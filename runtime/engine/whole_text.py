"""Runs one text through every segment of a bundle, with every head on every position, for comparisons of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shortstack.graphs import names
from shortstack.graphs.layer_spec import Attention
from shortstack.graphs.manifest import Manifest
from shortstack.runtime.engine.binder import Rows, SegmentBinder
from shortstack.runtime.engine.cache import KVCache
from shortstack.runtime.engine.open_graphs import OpenGraphs
from shortstack.runtime.engine.passes import run_passes

Array = npt.NDArray[np.float32]
Stored = npt.NDArray[np.generic]  # of the bundle's own dtype


@dataclass(frozen=True, slots=True)
class Activations:
    """What one model computes for one text.

    Attributes:
        heads: Logits [seq, vocab] by depth: those of the head that follows that many layers.
        hidden: The residual stream [seq, hidden] by depth, before any norm.
        keys: Rotated keys [kv_heads, seq, head_dim] by layer; a consumer has those of its producer. Empty if the cache
            holds int8 codes.
        values: Values [kv_heads, seq, head_dim] by layer, as for ``keys``.
    """

    heads: dict[int, Array]
    hidden: dict[int, Array]
    keys: list[Array]
    values: list[Array]


def run_text(graphs: OpenGraphs, tokens: Sequence[int], states: Array | None = None) -> Activations:
    """Run one text through separate buffers, so that no generation is disturbed.

    Args:
        graphs: The bundle.
        tokens: The text.
        states: For exits that see states: the state of the position before each one, [seq, hidden]. With None they see
            the model's own states, as the first draft of a round does, and zeros at the first position. That takes
            two runs.
    """
    manifest = graphs.bundle.manifest
    if states is None and manifest.plan.has_state:
        shape = (len(tokens), manifest.spec.hidden_size)
        final = np.empty((1, *shape), manifest.dtype)
        _run(graphs, tokens, np.zeros(shape, np.float32), final)
        states = np.concatenate([np.zeros((1, shape[1]), np.float32), final[0, :-1].astype(np.float32)])
    return _run(graphs, tokens, states, None)


def run_for_drafter(graphs: OpenGraphs, tokens: Sequence[int]) -> tuple[dict[str, Stored], KVCache]:
    """Run one text as :func:`run_text` does.

    Returns:
        What the model leaves for a drafter, [1, seq, hidden] by port, and the keys and values of all positions.
    """
    manifest = graphs.bundle.manifest
    shape = (1, len(tokens), manifest.spec.hidden_size)
    plan = manifest.plan
    found = {port: np.empty(shape, manifest.dtype) for segment in plan.segments for port in plan.taps_of(segment)}
    states = np.zeros(shape[1:], np.float32) if plan.has_state else None
    cache = graphs.new_cache(len(tokens))
    _run(graphs, tokens, states, None, found, cache)
    return found, cache


def _run(
    graphs: OpenGraphs,
    tokens: Sequence[int],
    states: Array | None,
    final_state: Stored | None,
    taps: Mapping[str, Stored] | None = None,
    cache: KVCache | None = None,
) -> Activations:
    """Run one text; the head writes states to ``final_state``, segments write to ``taps``, [1, seq, hidden] each."""
    manifest, rows = graphs.bundle.manifest, len(tokens)
    spec = manifest.spec
    cache = graphs.new_cache(rows) if cache is None else cache
    cache.reserve(rows, 0)
    heads, hidden = _buffers(manifest, rows)
    ids = np.asarray([tokens], dtype=np.int64)
    fed = None if states is None else states[None].astype(manifest.dtype)
    binders = [SegmentBinder(graphs, segment.index, cache) for segment in manifest.plan.segments]
    # A layer that does not see its own position cannot run on the first one together with others.
    is_first_alone = rows > 1 and not all(spec.sees_itself(layer) for layer in range(spec.num_hidden_layers))
    for start, end in ((0, 1), (1, rows)) if is_first_alone else ((0, rows),):
        for segment, binder in zip(manifest.plan.segments, binders, strict=True):
            binder.set_lengths(start, end - start)
            binding = binder.bind(
                Rows(
                    ids=ids[:, start:end],
                    num_rows=np.array(end - start, np.int64),
                    hidden=None if segment.is_first else hidden[segment.start][:, start:end],
                    hidden_out=None if segment.is_last else hidden[segment.end][:, start:end],
                    head={names.LOGITS: heads[segment.end][:, start:end]},
                    exit_state=None if fed is None else fed[:, start:end],
                    final_state=None if final_state is None else final_state[:, start:end],
                    taps={} if taps is None else {p: taps[p][:, start:end] for p in manifest.plan.taps_of(segment)},
                )
            )
            if binder.groups and end - start > 1:
                run_passes(binding.run, cache, binder.groups, (start, end))
            else:
                binding.run()
    kv = {part: _kv(cache, part, manifest, rows) for part in names.KV_PARTS}
    return Activations(
        {depth: logits[0].astype(np.float32) for depth, logits in heads.items()},
        {depth: stream[0].astype(np.float32) for depth, stream in hidden.items()},
        kv["key"],
        kv["value"],
    )


def _buffers(manifest: Manifest, rows: int) -> tuple[dict[int, Stored], dict[int, Stored]]:
    """Allocate the logits of each head and the residual stream at each boundary, by depth."""
    heads: dict[int, Stored] = {}
    hidden: dict[int, Stored] = {}
    for segment in manifest.plan.segments:
        vocab = next(port.shape[-1] for port in manifest.contract(segment).outputs if port.name == names.LOGITS)
        assert isinstance(vocab, int)
        heads[segment.end] = np.empty((1, rows, vocab), manifest.dtype)
        if not segment.is_last:
            hidden[segment.end] = np.empty((1, rows, manifest.spec.hidden_size), manifest.dtype)
    return heads, hidden


def _kv(cache: KVCache, part: str, manifest: Manifest, rows: int) -> list[Array]:
    """Return the keys or values of each layer, [kv_heads, seq, head_dim]; an empty list if they are int8 codes."""
    if manifest.cache_type == "int8":
        return []
    spec = manifest.spec
    return [
        _unpadded(cache.buffer(layer, part).numpy()[0, :, :rows], spec.layers[layer].attention) for layer in spec.kv_map
    ]


def _unpadded(array: Stored, attention: Attention) -> Array:
    """Drop the zero columns that pad each half of a head, [kv_heads, seq, cache_head_dim]."""
    halves = array.astype(np.float32).reshape(*array.shape[:-1], 2, attention.cache_head_dim // 2)
    return halves[..., : attention.head_dim // 2].reshape(*array.shape[:-1], attention.head_dim)
