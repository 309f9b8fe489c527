"""The definition of what a model computes: position by position, layer by layer, with explicit caches.

It is slow, and written independently of :mod:`shortstack.export.twin.model`, so that the two can be compared. They
share weights, norms, MLPs, wiring and the rotation. At position t::

    for each layer i, bottom to top:
        q = rotated query of the layer's input
        if i owns a cache: append its rotated key and its value
        attend to the cache of layer kv_map[i]:
            kv_map[i] <= i    positions up to t, since the producer has run
            kv_map[i] >  i    positions up to t-1, since the producer has not run yet
        but not to t itself if the model masks the diagonal, and not to positions before t - window + 1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shortstack.export.rope import rope_tables
from shortstack.export.twin.layer import Attention, KeyValue, Layer, Rotary, Tokens, soft_capped
from shortstack.export.twin.model import Twin


@dataclass(frozen=True, slots=True)
class Sequential:
    """The result of a run, and the caches to continue from.

    Attributes:
        logits: Logits of the positions fed, [batch, seq, vocab].
        hidden: The residual stream of the same positions after all layers, [batch, seq, hidden].
        caches: The rotated keys and the values of each producer, each [batch, kv_heads, total, head_dim].
    """

    logits: Tensor
    hidden: Tensor
    caches: dict[int, KeyValue]


def sequential(twin: Twin, input_ids: Tensor, caches: Mapping[int, KeyValue] | None = None) -> Sequential:
    """Run a model one position at a time.

    Args:
        twin: The model.
        input_ids: Token ids [batch, seq].
        caches: The :attr:`Sequential.caches` after the positions before these; None at the start of a text.
    """
    spec = twin.spec
    grown = dict(caches or {})
    past = next(iter(grown.values()))[0].shape[2] if grown else 0
    end = past + input_ids.shape[1]
    pairs = [rope_tables(rope, end, twin.rope_factors, end) for rope in spec.ropes]
    tables = [Rotary(torch.from_numpy(cos), torch.from_numpy(sin), torch.arange(end)) for cos, sin in pairs]
    states = []
    for position in range(past, past + input_ids.shape[1]):
        rotaries = [Rotary(*(part[position : position + 1].to(input_ids.device) for part in table)) for table in tables]
        x = twin.first_stream(input_ids[:, position - past, None], position)  # [batch, 1, hidden]
        here = input_ids[:, position - past, None]
        tokens = Tokens(here, twin.embedded(here)) if spec.reads_tokens(range(spec.num_hidden_layers)) else None
        for index, layer in enumerate(twin.model.layers):
            assert isinstance(layer, Layer)
            producer = spec.kv_map[index]
            normed = layer.input_layernorm(x)
            if producer == index:
                grown[index] = _appended(grown.get(index), layer.self_attn.key_value(normed, rotaries))
            last = position - 1 if producer > index or spec.masks_diagonal else position
            first = max(0, position - spec.window(index) + 1) if spec.window(index) else 0
            attended = _attended(layer.self_attn, normed, rotaries, grown.get(producer), first, last)
            _, x = layer.above(x, normed, attended, tokens)
        states.append(x)
    hidden = torch.cat(states, dim=1)
    return Sequential(twin.logits(hidden), hidden, grown)


def _appended(cache: KeyValue | None, new: KeyValue) -> KeyValue:
    if cache is None:
        return new
    return torch.cat((cache[0], new[0]), dim=2), torch.cat((cache[1], new[1]), dim=2)


def _attended(
    attention: Attention, x: Tensor, rotaries: Sequence[Rotary], cache: KeyValue | None, first: int, last: int
) -> Tensor:
    """Attend to positions ``first..last`` of a cache, which may be none of them, [batch, 1, hidden] -> the same."""
    batch, heads, size = len(x), attention.heads, attention.head_dim
    mixed = x.new_zeros(batch, heads, size)
    if cache is not None and first <= last:
        keys, values = (part[:, :, first : last + 1] for part in cache)
        query = attention.query(x, rotaries)[:, :, 0]
        for head in range(heads):
            shared = head * attention.kv_heads // heads  # the query heads of a group are neighbours
            scores = torch.einsum("bd,bsd->bs", query[:, head], keys[:, shared]) * attention.spec.score_scale
            scores = soft_capped(scores, attention.spec.softcap)
            mixed[:, head] = torch.einsum("bs,bsd->bd", scores.softmax(-1), values[:, shared])
    return attention.o_proj(mixed.flatten(1))[:, None]  # type: ignore[no-any-return]
