"""Which layer's keys and values each layer attends to.

``kv_map`` is a tuple of L ints: ``kv_map[i]`` is the layer whose K,V layer ``i`` uses, both from 0. A *producer* owns a
cache and maps to itself; a *consumer* maps to a producer. A model without sharing has the identity map.

Nine *placements* make a map of L layers from its number l of producers (A Systematic Study of Cross-Layer KV Sharing,
https://arxiv.org/abs/2410.14442, section 3): a partition of the layers into l groups, and a target in each group::

    L = 9, l = 3        bottom                middle                top
    pizza               0 1 2 2 2 2 2 2 2     0 1 5 5 5 5 5 5 5     0 1 8 8 8 8 8 8 8
    sandwich            0 1 1 1 1 1 1 1 8     0 4 4 4 4 4 4 4 8     0 7 7 7 7 7 7 7 8
    lasagna             0 0 0 3 3 3 6 6 6     1 1 1 4 4 4 7 7 7     2 2 2 5 5 5 8 8 8

A layer that uses the K,V of a layer *above* it cannot see its own position, since those depend on its output: it
attends to the positions before only. The layers from the lowest of these up to their producer are an *iterated group*:
over several positions at once they run until their K,V no longer change, over one position once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from shortstack.graphs.errors import RequestError

Partition = Literal["pizza", "sandwich", "lasagna"]
Position = Literal["bottom", "middle", "top"]
_LAYER_TYPE = re.compile(r"(\d{1,4})(s?)")


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


def placement(partition: Partition, position: Position, num_layers: int, num_producers: int) -> tuple[int, ...]:
    """Return the map of one of the nine placements.

    Lasagna's groups differ by one layer at most where ``num_producers`` does not divide ``num_layers``; the larger ones
    lie at the bottom. (The paper does not say.)

    Args:
        partition: ``pizza`` (single layers below, one group above), ``sandwich`` (single layers at both ends, one more
            below than above where they cannot be even) or ``lasagna`` (groups of one size).
        position: Of the target in its group; ``middle`` is the lower one of two.
        num_layers: L.
        num_producers: l.

    Raises:
        RequestError: An unknown placement, or l outside 1..L.
    """
    if partition not in get_args(Partition) or position not in get_args(Position):
        raise RequestError(
            "K,V placement",
            found=f"{partition}-{position}",
            expected=f"one of {', '.join(get_args(Partition))} with one of {', '.join(get_args(Position))}",
        )
    if not 1 <= num_producers <= num_layers:
        raise RequestError("number of K,V producers", found=num_producers, expected=f"1..{num_layers}, the layers")
    kv_map: list[int] = []
    for start, end in _groups(partition, num_layers, num_producers):
        target = {"bottom": start, "middle": start + (end - start - 1) // 2, "top": end - 1}[position]
        kv_map += [target] * (end - start)
    return tuple(kv_map)


def _groups(partition: Partition, num_layers: int, num_producers: int) -> list[tuple[int, int]]:
    """Return the groups of layers as ``[start, end)``."""
    if partition == "lasagna":
        size, larger = divmod(num_layers, num_producers)
        edges = [i * size + min(i, larger) for i in range(num_producers + 1)]
        return list(pairwise(edges))
    below = num_producers - 1 if partition == "pizza" else num_producers // 2  # ceil((l - 1) / 2)
    above = num_producers - 1 - below
    singles_below = [(layer, layer + 1) for layer in range(below)]
    singles_above = [(layer, layer + 1) for layer in range(num_layers - above, num_layers)]
    return [*singles_below, (below, num_layers - above), *singles_above]


def parse_kv_map(text: str, num_layers: int) -> tuple[int, ...]:
    """Return the map that a name, or a list of layers, describes for a model.

    ::

        pizza-bottom:5  sandwich-top:3 ...    a placement with so many producers
        cla:2                                 cross-layer attention over groups of two: lasagna-bottom with L / 2
                                              producers (https://arxiv.org/abs/2405.12981)
        lckv:2                                layer-condensed K,V with two warm-up layers: sandwich-top with three
                                              producers (https://arxiv.org/abs/2405.10637)
        yoco                                  a self-decoder of L / 2 layers: pizza-bottom with L / 2 + 1 producers
                                              (https://arxiv.org/abs/2405.05254); its lower layers' windows are separate
        none                                  every layer its own
        0,0,2,2  or  0_0_2_2                  any map, by layer, from 0

    Raises:
        RequestError: It describes none.
    """
    name, _, count = text.strip().lower().partition(":")
    if name == "none" and not count:
        return identity_kv_map(num_layers)
    if name == "yoco" and not count:
        return placement("pizza", "bottom", num_layers, num_layers // 2 + 1 if num_layers > 1 else 1)
    if count.isdecimal():
        number = int(count)
        if name == "cla":
            if not 1 <= number <= num_layers:
                raise RequestError("K,V map cla: layers in a group", found=number, expected=f"1..{num_layers}")
            return placement("lasagna", "bottom", num_layers, -(-num_layers // number))
        if name == "lckv":
            if number % 2 or not 0 <= number < num_layers:
                raise RequestError("K,V map lckv: warm-up layers", found=number, expected=f"even, below {num_layers}")
            return placement("sandwich", "top", num_layers, number + 1)
        partition, _, position = name.partition("-")
        if partition in get_args(Partition) and position in get_args(Position):
            return placement(partition, position, num_layers, number)  # type: ignore[arg-type]
    layers = re.split("[,_ ]+", text.strip())
    if all(layer.isdecimal() for layer in layers):
        kv_map = tuple(int(layer) for layer in layers)
        try:
            validate_kv_map(kv_map, num_layers)
        except ValueError as error:
            raise RequestError(f"K,V map {text!r}: {error}") from None
        return kv_map
    raise RequestError(
        f"K,V map {text!r} is not known",
        expected="a placement such as pizza-bottom:5, cla:2, lckv:2, yoco, none, or one layer for each such as 0,0,2,2",
    )


def parse_layer_types(text: str, num_layers: int) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Read the ``layer_types`` string of an LCKV checkpoint, such as ``0_1s_1_3``.

    Returns:
        The map, and which layers see a sliding window only (those marked ``s``).

    Raises:
        ValueError: It is no such string, or its map is not sound.
    """
    matches = [_LAYER_TYPE.fullmatch(part) for part in text.split("_")]
    if not all(matches):
        raise ValueError(f"layer_types {text!r} is not a list of layers such as 0_1s_1_3")
    kv_map = tuple(int(match[1]) for match in matches if match)
    validate_kv_map(kv_map, num_layers)
    return kv_map, tuple(bool(match[2]) for match in matches if match)


def producers(kv_map: tuple[int, ...], start: int, end: int) -> tuple[int, ...]:
    """Return the layers in ``[start, end)`` that own a cache."""
    return tuple(layer for layer in range(start, end) if kv_map[layer] == layer)


def consumers(kv_map: tuple[int, ...], producer: int) -> tuple[int, ...]:
    """Return the layers that use a producer's K,V, itself left out."""
    return tuple(layer for layer, used in enumerate(kv_map) if used == producer != layer)


def borrowed(kv_map: tuple[int, ...], start: int, end: int) -> tuple[int, ...]:
    """Return the producers outside ``[start, end)`` whose K,V a layer inside attends to, ascending."""
    return tuple(sorted({kv_map[layer] for layer in range(start, end)} - set(range(start, end))))


def lenders(kv_map: tuple[int, ...], start: int, end: int) -> tuple[int, ...]:
    """Return the producers in ``[start, end)`` whose K,V a layer above ``end`` attends to, ascending."""
    return tuple(sorted(set(kv_map[end:]) & set(range(start, end))))


def looks_up(kv_map: tuple[int, ...], layer: int) -> bool:
    """Return whether a layer uses the K,V of a layer above it, so that it cannot see its own position."""
    return kv_map[layer] > layer


@dataclass(frozen=True, slots=True)
class IteratedGroup:
    """Layers ``[start, end)`` that run until their K,V no longer change; the last one is a producer."""

    start: int
    end: int


def iterated_groups(kv_map: tuple[int, ...]) -> tuple[IteratedGroup, ...]:
    """Return the groups, bottom to top: from a lowest layer that looks up to its producer, overlapping ones joined."""
    groups: list[IteratedGroup] = []
    for layer, producer in enumerate(kv_map):
        if producer > layer:
            if groups and layer < groups[-1].end:
                groups[-1] = IteratedGroup(groups[-1].start, max(groups[-1].end, producer + 1))
            else:
                groups.append(IteratedGroup(layer, producer + 1))
    return tuple(groups)


def groups_within(kv_map: tuple[int, ...], start: int, end: int) -> tuple[IteratedGroup, ...]:
    """Return the iterated groups that lie in ``[start, end)``, bottom to top."""
    return tuple(group for group in iterated_groups(kv_map) if start <= group.start and group.end <= end)


def targets(kv_map: tuple[int, ...], group: IteratedGroup) -> tuple[int, ...]:
    """Return the producers of an iterated group whose K,V a layer below uses, ascending."""
    return tuple(sorted({kv_map[layer] for layer in range(group.start, group.end) if looks_up(kv_map, layer)}))


def complete_from(kv_map: tuple[int, ...]) -> int:
    """Return the smallest KV-complete depth: nothing from there on owns a cache."""
    return max(kv_map) + 1


def is_kv_complete(kv_map: tuple[int, ...], exit_layer: int) -> bool:
    """Return whether nothing above ``exit_layer`` owns a cache, so that leaving there leaves no hole."""
    return complete_from(kv_map) <= exit_layer


def check_boundaries(kv_map: tuple[int, ...], boundaries: Sequence[int]) -> None:
    """Check that no boundary cuts an iterated group.

    Raises:
        RequestError: One does: the layers on both sides of it would need each other.
    """
    for group in iterated_groups(kv_map):
        for boundary in boundaries:
            if group.start < boundary < group.end:
                raise RequestError(
                    f"an exit after {boundary} layers cuts layers {group.start}..{group.end - 1} apart, which run "
                    "together: some of them use keys and values of layers above them",
                    expected=f"an exit after at most {group.start} or at least {group.end} layers",
                )
