"""Which layer's keys and values each layer attends to.

``kv_map`` is a tuple of L ints: ``kv_map[i]`` is the layer whose K,V layer ``i`` uses. A *producer* owns a cache and
maps to itself; a *consumer* maps to a producer below it. A model without sharing has the identity map.
"""

from __future__ import annotations


def identity_kv_map(num_layers: int) -> tuple[int, ...]:
    """Return the map of a model in which every layer owns its K,V."""
    return tuple(range(num_layers))


def validate_kv_map(kv_map: tuple[int, ...], num_layers: int) -> None:
    """Check the shape of a map.

    Raises:
        ValueError: The length is not ``num_layers``, or an entry is not a producer in ``0..num_layers-1``.
    """
    if len(kv_map) != num_layers:
        raise ValueError(f"kv_map has {len(kv_map)} entries for {num_layers} layers")
    for layer, producer in enumerate(kv_map):
        if not 0 <= producer < num_layers:
            raise ValueError(f"kv_map[{layer}] = {producer} is not a layer in 0..{num_layers - 1}")
        if kv_map[producer] != producer:
            raise ValueError(f"kv_map[{layer}] = {producer}, but layer {producer} owns no K,V itself")


def producers(kv_map: tuple[int, ...], start: int, end: int) -> tuple[int, ...]:
    """Return the layers in ``[start, end)`` that own a cache."""
    return tuple(layer for layer in range(start, end) if kv_map[layer] == layer)


def borrowed(kv_map: tuple[int, ...], start: int, end: int) -> tuple[int, ...]:
    """Return the producers outside ``[start, end)`` whose K,V a layer inside attends to, ascending."""
    return tuple(sorted({kv_map[layer] for layer in range(start, end)} - set(range(start, end))))


def is_kv_complete(kv_map: tuple[int, ...], exit_layer: int) -> bool:
    """Return whether nothing above ``exit_layer`` owns a cache, so that leaving there leaves no hole."""
    return max(kv_map) < exit_layer
