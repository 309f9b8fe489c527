"""One text through every segment of a bundle at once, every head on every position: what comparisons of models read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shortstack.graphs import names
from shortstack.graphs.kv_map import borrowed, iterated_producers
from shortstack.graphs.spec import ModelSpec
from shortstack.runtime.engine.binding import Binding, Tensor
from shortstack.runtime.engine.cache import KVCache
from shortstack.runtime.engine.passes import run_passes
from shortstack.runtime.model import Model

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Teacher:
    """What one model computes for one text.

    Attributes:
        heads: Logits [seq, vocab] by depth: the final norm and LM head on what is left after that many layers.
        hidden: The residual stream [seq, hidden] by depth, before any norm.
        keys: Rotated keys [kv_heads, seq, head_dim] by layer, of a consumer those of its producer; empty where the
            cache holds int8 codes.
        values: Values [kv_heads, seq, head_dim] by layer; likewise.
    """

    heads: dict[int, Array]
    hidden: dict[int, Array]
    keys: list[Array]
    values: list[Array]


def teach(model: Model, tokens: Sequence[int], states: Array | None = None) -> Teacher:
    """Run one text, through buffers of its own; the model's cache and generation are left alone.

    Args:
        model: The bundle.
        tokens: The text.
        states: What exits that see states are fed, the states of the positions before, [seq, hidden]. None feeds them
            the model's own, as the first draft of a round is fed, and zeros at the first position; takes two runs.
    """
    if states is None and model.bundle.manifest.plan.has_state:
        shape = (len(tokens), model.bundle.manifest.spec.hidden_size)
        final = np.empty((1, *shape), model.bundle.manifest.dtype)
        _teach(model, tokens, np.zeros(shape, np.float32), final)
        states = np.concatenate([np.zeros((1, shape[1]), np.float32), final[0, :-1].astype(np.float32)])
    return _teach(model, tokens, states, None)


def _teach(
    model: Model, tokens: Sequence[int], states: Array | None, final_state: npt.NDArray[np.generic] | None
) -> Teacher:
    """Run one text; the model's states are written to ``final_state`` [1, seq, hidden]."""
    manifest, rows = model.bundle.manifest, len(tokens)
    spec, dtype = manifest.spec, np.dtype(manifest.dtype)
    owners = {
        owner: (cache_type, model.devices[segment.index])
        for segment in manifest.plan.segments
        for owner, cache_type in manifest.cache_types(segment).items()
    }
    cache = KVCache(owners, spec.num_key_value_heads, spec.cache_head_dim, rows)
    cache.reserve(rows, 0)
    heads: dict[int, npt.NDArray[np.generic]] = {}
    hidden: dict[int, npt.NDArray[np.generic]] = {}
    for segment in manifest.plan.segments:
        vocab = next(port.shape[-1] for port in manifest.contract(segment).outputs if port.name == names.LOGITS)
        assert isinstance(vocab, int)
        heads[segment.end] = np.empty((1, rows, vocab), dtype)
        if not segment.is_last:
            hidden[segment.end] = np.empty((1, rows, spec.hidden_size), dtype)
    ids = np.asarray([tokens], dtype=np.int64)
    fed = None if states is None else states[None].astype(dtype)
    # A layer that does not see its own position refuses to run on the first one together with others.
    is_first_alone = rows > 1 and not all(spec.sees_itself(layer) for layer in range(spec.num_hidden_layers))
    for start, end in ((0, 1), (1, rows)) if is_first_alone else ((0, rows),):
        lengths = np.array([end - 1], np.int32), np.array(end, np.int32)
        for segment, session in zip(manifest.plan.segments, model.sessions, strict=True):
            given: dict[str, Tensor] = {
                names.INPUT_IDS: ids[:, start:end],
                names.SEQLENS_K: lengths[0],
                names.TOTAL_SEQUENCE_LENGTH: lengths[1],
                names.NUM_ROWS: np.array(end - start, np.int64),
            }
            if not segment.is_first:
                given[names.HIDDEN_STATES] = hidden[segment.start][:, start:end]
            if fed is not None:
                given[names.EXIT_STATE] = fed[:, start:end]
            inputs = {port.name: given[port.name] for port in manifest.contract(segment).inputs if port.name in given}
            outputs: dict[str, Tensor] = {names.LOGITS: heads[segment.end][:, start:end]}
            for part in names.KV_PARTS:
                for owner in manifest.cache_types(segment):
                    inputs[names.past(owner, part)] = outputs[names.present(owner, part)] = cache.buffer(owner, part)
                for layer in borrowed(spec.kv_map, segment.start, segment.end):
                    inputs[names.shared(layer, part)] = cache.buffer(layer, part)
            if segment.is_last and final_state is not None:
                outputs[names.FINAL_STATE] = final_state[:, start:end]
            if not segment.is_last:
                outputs[names.HIDDEN_STATES_OUT] = hidden[segment.end][:, start:end]
            binding = Binding(session, inputs, outputs, model.devices[segment.index])
            iterated = iterated_producers(spec.kv_map, segment.start, segment.end)
            if iterated and end - start > 1:
                run_passes(binding.run, cache, iterated, (start, end), "converged")
            else:
                binding.run()
    found_heads = {depth: logits[0].astype(np.float32) for depth, logits in heads.items()}
    found_hidden = {depth: stream[0].astype(np.float32) for depth, stream in hidden.items()}
    if manifest.cache_type == "int8":
        return Teacher(found_heads, found_hidden, [], [])
    kv = {
        part: [_unpadded(cache.buffer(layer, part).numpy()[0, :, :rows], spec) for layer in spec.kv_map]
        for part in names.KV_PARTS
    }
    return Teacher(found_heads, found_hidden, kv["key"], kv["value"])


def _unpadded(array: Array, spec: ModelSpec) -> Array:
    """Drop the zero columns that pad each half of a head, [kv_heads, seq, cache_head_dim]."""
    halves = array.astype(np.float32).reshape(*array.shape[:-1], 2, spec.cache_head_dim // 2)
    return halves[..., : spec.head_dim // 2].reshape(*array.shape[:-1], spec.head_dim)
