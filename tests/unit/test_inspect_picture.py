"""The picture of `shortstack inspect --html`: what is drawn where, read back from the paths."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from helpers.inspect_bundles import MakeBundle, report_of, tiny_spec
from shortstack.graphs.kv_map import iterated_groups
from shortstack.graphs.plan import ExitSpec
from shortstack.runtime.inspection.picture import Picture, Rect, draw_stack

Point = tuple[float, float]
Stroke = tuple[Point, Point]

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
def test_lines_of_text_beside_the_column_do_not_overlap(exits: tuple[int, ...], make_bundle: MakeBundle) -> None:
    spec = tiny_spec(8, kv_map=(0, 2, 2, 4, 4, 7, 7, 7))
    picture = draw_stack(report_of(make_bundle(spec, *map(ExitSpec, exits))))
    beside = next(label.x for label in picture.labels if label.text.startswith("exit after"))
    baselines = sorted(label.y for label in picture.labels if label.x == beside)
    assert len(baselines) >= 3 * len(exits) + 2
    assert all(below - above >= 13 for above, below in pairwise(baselines))


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
