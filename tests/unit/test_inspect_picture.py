"""The picture of `shortstack inspect --html`: what is drawn where, read back from the paths."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import pytest

from helpers.inspect_bundles import MakeBundle, report_of, tiny_spec
from shortstack.graphs import names
from shortstack.graphs.kv_map import iterated_groups
from shortstack.graphs.plan import ExitSpec
from shortstack.graphs.precision import BlockFormat, Precision
from shortstack.runtime.inspection.picture import Picture, Rect, draw_stack

Point = tuple[float, float]
Stroke = tuple[Point, Point]

MIXED = Precision(
    {
        names.layer_weight(layer, part): BlockFormat(bits)
        for layer in range(40)
        for part, bits in (("attn.qkv_proj.weight", 8), ("attn.o_proj.weight", 4), ("mlp.down_proj.weight", 4))
    },
    kv_cache="int8",
)
SHARED = {
    "all below their producer": (0, 4, 4, 4, 4, 5),
    "bottom": (0, 1, 1, 1, 1, 1),
    "groups at the bottom": (0, 0, 2, 2, 4, 4),
    "on both sides": (1, 1, 1, 4, 4, 4),
    "interleaved": (0, 1, 0, 1, 0, 1),
}


def straight(d: str) -> tuple[list[Stroke], list[Point]]:
    """The horizontal and vertical strokes of a path, and the points where one ends in an arrow head."""
    strokes: list[Stroke] = []
    tips: list[Point] = []
    x = y = 0.0
    for command, arguments in re.findall("([MHVhml])([^MHVhml]*)", d):
        numbers = [float(number) for number in re.split("[ ,]+", arguments.strip())]
        if command == "m":
            tips.append((x, y))
        before = x, y
        if command in "Mml":
            dx, dy = numbers
            x, y = (dx, dy) if command == "M" else (x + dx, y + dy)
        else:
            x = {"H": numbers[0], "h": x + numbers[0], "V": x}[command]
            y = numbers[0] if command == "V" else y
            strokes.append((before, (x, y)))
    return strokes, tips


def is_on(point: Point, stroke: Stroke) -> bool:
    (x, y), (left, right), (top, bottom) = point, *(sorted(ends) for ends in zip(*stroke, strict=True))
    return left <= x <= right and top <= y <= bottom


def led_to(tip: Point, strokes: list[Stroke]) -> set[Point]:
    """The ends of all strokes that hang together with a point."""
    together: set[Stroke] = set()
    ends = {tip}
    while touching := {s for s in strokes if any(is_on(e, s) for e in ends) or ends & set(s)} - together:
        together |= touching
        ends |= {end for stroke in touching for end in stroke}
    return ends


def layer_rects(picture: Picture, layer: int) -> list[Rect]:
    return [rect for rect in picture.rects if rect.title.startswith(f"layer {layer}:")]


def cache_rect(picture: Picture, layer: int) -> Rect:
    [cache] = [rect for rect in picture.rects if rect.title.startswith(f"K,V cache of layer {layer}:")]
    return cache


def layer_at(picture: Picture, y: float, layers: int) -> int:
    [found] = [i for i in range(layers) if (rect := layer_rects(picture, i)[0]).y <= y <= rect.y + rect.height]
    return found


@pytest.mark.parametrize("kv_map", SHARED.values(), ids=SHARED)
def test_one_arrow_leads_to_each_consumer_from_its_producer(kv_map: tuple[int, ...], make_bundle: MakeBundle) -> None:
    layers = len(kv_map)
    picture = draw_stack(report_of(make_bundle(tiny_spec(layers, kv_map=kv_map))))
    found = []
    for line in picture.lines:
        if line.css != "share":
            continue
        strokes, tips = straight(line.d)
        for tip in tips:
            consumer = layer_at(picture, tip[1], layers)
            assert 0 < layer_rects(picture, consumer)[0].x - tip[0] <= 3  # ends where the layer begins
            caches = {layer: cache_rect(picture, layer) for layer in set(kv_map)}
            found += [
                (layer, consumer)
                for layer, cache in caches.items()
                if (cache.x, cache.y + cache.height / 2) in led_to(tip, strokes)
            ]
    assert sorted(found) == sorted((used, layer) for layer, used in enumerate(kv_map) if used != layer)


def test_lines_of_two_producers_do_not_run_on_top_of_each_other(make_bundle: MakeBundle) -> None:
    picture = draw_stack(report_of(make_bundle(tiny_spec(6, kv_map=SHARED["interleaved"]))))
    lanes = [
        {start[0] for start, end in straight(line.d)[0] if start[0] == end[0]}
        for line in picture.lines
        if line.css == "share"
    ]
    assert len(lanes) == 2
    assert not lanes[0] & lanes[1]


@pytest.mark.parametrize("kv_map", [(0, 4, 4, 4, 4, 5), (1, 1, 1, 4, 4, 4), (2, 2, 2, 5, 5, 5), (0, 1, 1, 1, 1, 1)])
def test_an_arrow_leads_from_the_top_of_an_iterated_group_to_its_bottom(
    kv_map: tuple[int, ...], make_bundle: MakeBundle
) -> None:
    picture = draw_stack(report_of(make_bundle(tiny_spec(6, kv_map=kv_map))))
    found = []
    for line in picture.lines:
        if line.css == "loop":
            [(first, _), *_], [tip] = straight(line.d)
            found.append((layer_at(picture, tip[1], 6), layer_at(picture, first[1], 6) + 1))
    groups = iterated_groups(kv_map)
    assert found == [(group.start, group.end) for group in groups]
    words = [label.text for label in picture.labels if label.text.endswith("run in passes")]
    assert len(words) == (1 if groups else 0)


def test_windows_and_masked_diagonals_are_marked_on_their_layers(make_bundle: MakeBundle) -> None:
    spec = tiny_spec(6, kv_map=(0, 4, 4, 4, 4, 5), windows=(16, 16, 0, 0, 1024, 0))
    picture = draw_stack(report_of(make_bundle(spec)))
    windows = {layer_at(picture, label.y, 6): label.text for label in picture.labels if "mark" in label.css.split()}
    assert windows == {0: "window 16", 1: "window 16", 4: "window 1,024"}
    masked = [float(line.d.split(" ")[0].split(",")[1]) for line in picture.marks if line.css == "diagonal"]
    assert sorted(layer_at(picture, y, 6) for y in masked) == [1, 2, 3]
    assert "sees the last 1,024 positions" in layer_rects(picture, 4)[0].title
    assert "cannot see its own position" in layer_rects(picture, 1)[0].title


def test_a_model_without_them_has_no_such_marks(make_bundle: MakeBundle) -> None:
    picture = draw_stack(report_of(make_bundle(tiny_spec(6), ExitSpec(2))))
    assert not [line for line in (*picture.lines, *picture.marks) if line.css in ("loop", "diagonal", "share")]
    assert not [label for label in picture.labels if "mark" in label.css.split() or "passes" in label.text]


def test_many_iterated_groups_are_counted_where_their_layers_do_not_fit(make_bundle: MakeBundle) -> None:
    kv_map = tuple(layer | 1 for layer in range(20))
    picture = draw_stack(report_of(make_bundle(tiny_spec(20, kv_map=kv_map))))
    assert "10 groups of layers run in passes" in [label.text for label in picture.labels]


@pytest.mark.parametrize("exits", [(3,), (1, 3), (3, 5)])
def test_lines_of_text_next_to_the_column_do_not_overlap(exits: tuple[int, ...], make_bundle: MakeBundle) -> None:
    spec = tiny_spec(8, kv_map=(0, 2, 2, 4, 4, 7, 7, 7))
    picture = draw_stack(report_of(make_bundle(spec, *map(ExitSpec, exits))))
    right = next(label.x for label in picture.labels if label.text.startswith("exit after"))
    baselines = sorted(label.y for label in picture.labels if label.x == right)
    assert len(baselines) >= 3 * len(exits) + 2
    assert all(below - above >= 13 for above, below in pairwise(baselines))


def area(rects: list[Rect]) -> float:
    return sum(rect.width * rect.height for rect in rects)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", [Precision(), MIXED], ids=["float", "mixed formats"])
def test_areas_in_the_column_follow_bytes(tied: bool, precision: Precision, make_bundle: MakeBundle) -> None:
    spec = tiny_spec(40, kv_map=(*range(39), 0), tied=tied)
    report = report_of(make_bundle(spec, precision=precision))
    picture = draw_stack(report)
    per_byte = area(layer_rects(picture, 1)) / report.layers[1].weight_bytes
    for layer in report.layers:
        drawn = layer_rects(picture, layer.layer)
        parts = layer.part_bytes
        assert area(drawn) == pytest.approx(per_byte * layer.weight_bytes)
        assert [area([rect]) / per_byte for rect in drawn] == pytest.approx(
            [parts.qkv, parts.o, parts.mlp + parts.norms]
        )
    [embedding] = [rect for rect in picture.rects if rect.title.startswith("token embedding")]
    assert area([embedding]) == pytest.approx(per_byte * report.weights.embedding)
    [head] = [rect for rect in picture.rects if rect.title.startswith("final norm and LM head")]
    assert area([head]) == pytest.approx(per_byte * report.segments[-1].head.weight_bytes)
    assert not [line for line in picture.marks if line.css == "break"]


def test_a_block_that_is_too_high_is_cut_short_and_marked(make_bundle: MakeBundle) -> None:
    picture = draw_stack(report_of(make_bundle(replace(tiny_spec(4), vocab_size=4000))))
    assert len([line for line in picture.marks if line.css == "break"]) == 2
    tables = [rect for rect in picture.rects if rect.css.startswith("table")]
    assert all("cut short: to scale it is 5.3 times this height" in rect.title for rect in tables)


def test_names_of_blocks_that_are_too_low_for_text_stand_next_to_them(make_bundle: MakeBundle) -> None:
    picture = draw_stack(report_of(make_bundle(tiny_spec(40))))
    low = [rect for rect in picture.rects if rect.css.startswith("table")]
    names = [label for label in picture.labels if label.text.startswith(("embedding", "LM head"))]
    assert len(low) == len(names) == 2
    assert {rect.height < 34 for rect in low} == {True}
    assert all(label.x > rect.x + rect.width for label in names for rect in low)


def test_trimmed_heads_are_drawn_as_wide_as_their_rows(make_bundle: MakeBundle) -> None:
    picture = draw_stack(report_of(make_bundle(tiny_spec(), ExitSpec(1, 25), ExitSpec(2, 50), ExitSpec(3))))
    assert [rect.width for rect in picture.rects if rect.css.endswith("exit")] == [200, 100, 50]  # top to bottom


def test_everything_drawn_lies_within_the_picture(make_bundle: MakeBundle) -> None:
    kv_map = (*range(20), *range(20))  # twenty lanes
    picture = draw_stack(report_of(make_bundle(tiny_spec(40, kv_map=kv_map), ExitSpec(1), ExitSpec(20, 10))))
    for rect in picture.rects:
        assert rect.x >= 0
        assert rect.x + rect.width <= picture.width
        assert rect.y >= 0
        assert rect.y + rect.height <= picture.height
    owners = [rect for rect in picture.rects if rect.css == "kv"]
    assert len(owners) == len([line for line in picture.lines if line.css == "share"]) == 20
