"""Maps of K,V sharing: the tables of the papers, degenerate cases, what follows from a map, and what is refused."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.scripted_texts import examples
from shortstack.graphs.errors import RequestError
from shortstack.graphs.kv_map import (
    IteratedGroup,
    borrowed,
    check_boundaries,
    complete_from,
    consumers,
    identity_kv_map,
    is_kv_complete,
    iterated_groups,
    looks_up,
    parse_kv_map,
    parse_layer_types,
    placement,
    producers,
    validate_kv_map,
)

PARTITIONS = ("pizza", "sandwich", "lasagna")
POSITIONS = ("bottom", "middle", "top")
PLACEMENTS = list(product(PARTITIONS, POSITIONS))

# L = 9, l = 3, layers numbered from 1 as in the paper; then the smallest KV-complete exit.
TABLE = {
    ("pizza", "bottom"): ((1, 2, 3, 3, 3, 3, 3, 3, 3), 3),
    ("pizza", "middle"): ((1, 2, 6, 6, 6, 6, 6, 6, 6), 6),
    ("pizza", "top"): ((1, 2, 9, 9, 9, 9, 9, 9, 9), 9),
    ("sandwich", "bottom"): ((1, 2, 2, 2, 2, 2, 2, 2, 9), 9),
    ("sandwich", "middle"): ((1, 5, 5, 5, 5, 5, 5, 5, 9), 9),
    ("sandwich", "top"): ((1, 8, 8, 8, 8, 8, 8, 8, 9), 9),
    ("lasagna", "bottom"): ((1, 1, 1, 4, 4, 4, 7, 7, 7), 7),
    ("lasagna", "middle"): ((2, 2, 2, 5, 5, 5, 8, 8, 8), 8),
    ("lasagna", "top"): ((3, 3, 3, 6, 6, 6, 9, 9, 9), 9),
}


def repeated(*parts: str) -> str:
    """Expand ``0_20x20_21`` to 0, then twenty times 20, then 21."""
    return "_".join("_".join([part.split("x")[1]] * int(part.split("x")[0])) if "x" in part else part for part in parts)


@pytest.mark.parametrize(("partition", "position"), PLACEMENTS)
def test_maps_of_nine_layers_and_three_producers_equal_the_papers(partition: str, position: str) -> None:
    numbered_from_1, complete = TABLE[partition, position]
    kv_map = placement(partition, position, 9, 3)
    assert kv_map == tuple(layer - 1 for layer in numbered_from_1)
    assert complete_from(kv_map) == complete
    assert is_kv_complete(kv_map, complete)
    assert not is_kv_complete(kv_map, complete - 1)


@pytest.mark.parametrize(
    ("text", "layers", "published"),
    [
        ("sandwich-top:3", 22, repeated("0", "20x20", "21")),
        ("lckv:2", 22, repeated("0", "20x20", "21")),
        ("sandwich-middle:3", 22, repeated("0", "20x10", "21")),
        ("cla:2", 22, repeated(*(f"2x{layer}" for layer in range(0, 22, 2)))),
        ("lasagna-bottom:11", 22, repeated(*(f"2x{layer}" for layer in range(0, 22, 2)))),
        ("lckv:10", 22, repeated(*map(str, range(5)), "12x16", *map(str, range(17, 22)))),
        ("yoco", 22, repeated(*map(str, range(11)), "11x11")),
        ("lckv:2", 12, repeated("0", "10x10", "11")),
        ("lckv:2", 8, repeated("0", "6x6", "7")),
    ],
)
def test_names_give_the_strings_of_published_checkpoints(text: str, layers: int, published: str) -> None:
    assert parse_kv_map(text, layers) == parse_layer_types(published, layers)[0] == parse_kv_map(published, layers)


def test_sliding_layers_of_a_published_string_are_marked() -> None:
    text = "0_1s_1s_3s_3s_3s_0_7s_7s_9s_9s_9s_12_13s_13s_15s_15s_15s_12_19s_19s_19s"  # MixAttention
    kv_map, sliding = parse_layer_types(text, 22)
    assert kv_map == (0, 1, 1, 3, 3, 3, 0, 7, 7, 9, 9, 9, 12, 13, 13, 15, 15, 15, 12, 19, 19, 19)
    assert [layer for layer, is_sliding in enumerate(sliding) if not is_sliding] == [0, 6, 12, 18]


def test_the_published_yoco_string_slides_below_the_shared_layer() -> None:
    text = "_".join([*(f"{layer}s" for layer in range(11)), *["11"] * 11])  # with sliding_window 1024
    kv_map, sliding = parse_layer_types(text, 22)
    assert kv_map == parse_kv_map("yoco", 22)
    assert sliding == (True,) * 11 + (False,) * 11


@pytest.mark.parametrize("layers", [1, 2, 7, 9, 12])
def test_placements_agree_at_degenerate_numbers_of_producers(layers: int) -> None:
    for position in POSITIONS:
        one = {placement(partition, position, layers, 1) for partition in PARTITIONS}
        assert len(one) == 1
        assert placement("sandwich", position, layers, min(2, layers)) == placement(
            "pizza", position, layers, min(2, layers)
        )
        for partition in PARTITIONS:
            assert placement(partition, position, layers, layers) == identity_kv_map(layers)
    if layers % 2 == 0:
        assert placement("lasagna", "middle", layers, layers // 2) == placement(
            "lasagna", "bottom", layers, layers // 2
        )


@examples(200)
@given(st.sampled_from(PLACEMENTS), st.integers(1, 40), st.integers(1, 40))
def test_every_placement_is_consistent(names: tuple[str, str], layers: int, count: int) -> None:
    count = min(count, layers)
    kv_map = placement(*names, layers, count)
    validate_kv_map(kv_map, layers)
    assert len(producers(kv_map, 0, layers)) == count
    assert sorted(layer for p in producers(kv_map, 0, layers) for layer in (p, *consumers(kv_map, p))) == list(
        range(layers)
    )
    if names[1] == "bottom":
        assert iterated_groups(kv_map) == ()
        assert not any(looks_up(kv_map, layer) for layer in range(layers))
    assert parse_kv_map(f"{names[0]}-{names[1]}:{count}", layers) == kv_map
    assert parse_kv_map(",".join(map(str, kv_map)), layers) == kv_map


@pytest.mark.parametrize(
    ("kv_map", "groups"),
    [
        ((0, 4, 4, 4, 4, 4, 4, 4, 8), ((1, 5),)),
        ((0, 7, 7, 7, 7, 7, 7, 7, 8), ((1, 8),)),
        ((1, 1, 1, 4, 4, 4, 7, 7, 7), ((0, 2), (3, 5), (6, 8))),
        ((2, 2, 2, 5, 5, 5), ((0, 3), (3, 6))),
        ((3, 4, 4, 3, 4), ((0, 5),)),  # two groups that overlap run as one
        ((0, 0, 2, 2), ()),
    ],
)
def test_layers_that_look_up_run_in_one_group_with_their_producer(
    kv_map: tuple[int, ...], groups: tuple[tuple[int, int], ...]
) -> None:
    validate_kv_map(kv_map, len(kv_map))
    assert iterated_groups(kv_map) == tuple(IteratedGroup(*group) for group in groups)


def test_a_boundary_inside_a_group_is_refused_with_the_reason() -> None:
    kv_map = placement("sandwich", "middle", 9, 3)  # layers 1..4 run together
    check_boundaries(kv_map, (1, 5, 8))
    for boundary in (2, 3, 4):
        with pytest.raises(RequestError, match=r"run together.*above them.*at most 1 or at least 5"):
            check_boundaries(kv_map, (boundary,))
    check_boundaries(placement("pizza", "bottom", 9, 3), range(1, 9))


def test_borrowed_producers_lie_outside_the_segment() -> None:
    kv_map = placement("lasagna", "bottom", 9, 3)
    assert borrowed(kv_map, 4, 9) == (3,)
    assert borrowed(kv_map, 3, 9) == ()
    assert producers(kv_map, 4, 9) == (6,)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("calzone-top:3", "is not known"),
        ("pizza-side:3", "is not known"),
        ("pizza-bottom", "is not known"),
        ("pizza-bottom:0", "number of K,V producers"),
        ("pizza-bottom:10", "number of K,V producers"),
        ("cla:0", "layers in a group"),
        ("lckv:3", "warm-up layers"),
        ("lckv:20", "warm-up layers"),
        ("0,0,1,1,4,4,4,4,4", r"kv_map\[2\] = 1, but layer 1 owns no K,V itself"),
        ("0,0,2", "3 entries for 9 layers"),
        ("0,0,0,0,0,0,0,0,9", "not a layer in 0..8"),
        ("", "is not known"),
        ("0;1", "is not known"),
    ],
)
def test_maps_that_are_not_valid_are_refused(text: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        parse_kv_map(text, 9)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "list of layers"),
        ("0_1i_1", "list of layers"),
        ("0__1", "list of layers"),
        ("0s_1ss_1", "list of layers"),
        ("99999_0_0", "list of layers"),
        ("0_2_1", "owns no K,V"),
        ("0_1", "2 entries"),
    ],
)
def test_strings_that_are_not_layer_types_are_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_layer_types(text, 3)
