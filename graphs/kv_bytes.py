"""How many bytes the keys and values of one position take; only producers of the map keep any."""

from __future__ import annotations

from collections.abc import Iterable

from shortstack.graphs.kv_map import producers
from shortstack.graphs.names import CacheOwner
from shortstack.graphs.spec import ModelSpec


def kv_bytes_per_token(spec: ModelSpec, value_bytes: int, owners: Iterable[CacheOwner] | None = None) -> int:
    """Return what one position takes in the caches, in bytes: ``2 * kv_heads * head_dim * value_bytes`` per owner.

    The 2 are keys and values; ``head_dim`` is :attr:`Attention.cache_head_dim`, the width that is stored.

    Args:
        spec: The model.
        value_bytes: Bytes of one number: 4 in float32, 2 in float16, 1 in int8.
        owners: Whose caches; None is all producers of ``spec.kv_map``.
    """
    if owners is None:
        owners = producers(spec.kv_map, 0, spec.num_hidden_layers)
    heads = (spec.cache_attention(owner) for owner in owners)
    return sum(2 * attention.kv_heads * attention.cache_head_dim * value_bytes for attention in heads)
