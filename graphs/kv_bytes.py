"""How many bytes the keys and values of one position take; only producers of the map keep any."""

from __future__ import annotations

from shortstack.graphs.kv_map import producers
from shortstack.graphs.spec import ModelSpec


def kv_bytes_per_token(spec: ModelSpec, value_bytes: int, owners: int | None = None) -> int:
    """Return what one position takes in the caches, in bytes: ``2 * owners * kv_heads * head_dim * value_bytes``.

    The 2 are keys and values; ``head_dim`` is :attr:`ModelSpec.cache_head_dim`, the width that is stored.

    Args:
        spec: The model.
        value_bytes: Bytes of one number: 4 in float32, 2 in float16, 1 in int8.
        owners: How many caches; None is one for each producer of ``spec.kv_map``.
    """
    if owners is None:
        owners = len(producers(spec.kv_map, 0, spec.num_hidden_layers))
    return 2 * owners * spec.num_key_value_heads * spec.cache_head_dim * value_bytes
