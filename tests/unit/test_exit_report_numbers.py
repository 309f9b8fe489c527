"""What the page of `generate --report` is made from: figures, charts, thresholds, and the same in a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from helpers.exit_reports import CIRCUMSTANCES, EXITS, LAYERS, PLAIN, POINTS, TOKENS, Page, report, shown
from helpers.inspect_bundles import MakeBundle, tiny_spec
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.plan import ExitSpec
from shortstack.runtime.commands.agreement import agreement_of
from shortstack.runtime.commands.exit_report import drawing
from shortstack.runtime.commands.exit_report.circumstances import find_circumstances
from shortstack.runtime.commands.exit_report.page import (
    circumstances,
    figures,
    render_page,
    settings,
)
from shortstack.runtime.commands.exit_report.report import build_report
from shortstack.runtime.commands.exit_report.spread import Spread
from shortstack.runtime.commands.exit_report.sweep import (
    grid_of,
    sweep,
    varied_bound,
    with_threshold,
)
from shortstack.runtime.commands.machine import processor
from shortstack.runtime.commands.show_exits import DepthMarks, bucket_of, count_depths
from shortstack.runtime.decode.stream import Token
from shortstack.runtime.early_exit.criteria import Criterion
from shortstack.runtime.early_exit.expression import parse_criterion
from shortstack.runtime.early_exit.policy import ExitPolicy

# The figures


def test_everything_drawn_lies_within_the_picture() -> None:
    made = report(TOKENS * 50, PLAIN * 50)
    for draw in (drawing.draw_histogram, drawing.draw_depths, drawing.draw_depth_curve, drawing.draw_speed_curve):
        picture = draw(made)
        for rect in picture.rects:
            assert 0 <= rect.x <= rect.x + rect.width <= picture.width
            assert 0 <= rect.y <= rect.y + rect.height <= picture.height + 1e-6
        for label in picture.labels:
            assert 0 <= label.x <= picture.width
            assert 0 < label.y <= picture.height


def test_a_setting_has_one_speed_on_the_whole_page() -> None:
    own = replace(POINTS[1], tokens_per_s=report().early_speed)
    made = report(points=(POINTS[0], own, POINTS[2]))
    page = Page(render_page(made))
    assert made.speed_up == 8.0 / 4.0
    assert (made.turns.low, made.turns.high) == (8 / 6, 12 / 3)
    assert re.findall(r"\d\.\d\dx", page.tiles[2]) == ["2.00x", "1.33x", "4.00x"]
    assert "8.0 against 4.0 tokens/s" in page.tiles[2]
    assert [row[1:] for row in page.rows if row[0] == "tokens/s"] == [["8.0 (6.0 to 12.0)", "4.0 (3.0 to 6.0)"]]
    assert [row[-1] for row in page.rows if "this text" in row[0]] == ["2.00x8.0 (6.0 to 12.0)"]


def test_identical_is_claimed_of_one_prompt_and_so_many_tokens() -> None:
    page = Page(render_page(report(plain=TOKENS)))
    assert page.tiles[3] == "identical to plain decoding, token for token: 7 tokens of 1 prompt"
    differs = Page(render_page(report()))
    assert "on 1 prompt; the first 3 of 7 tokens are the same" in differs.tiles[3]


def test_seconds_are_named_by_the_layers_that_took_them() -> None:
    rows = {label: (early, plain) for label, early, plain in figures(report())}
    assert [cell.value for cell in rows["seconds in layers 0..1"]] == ["0.25", "-"]
    assert [cell.value for cell in rows["seconds in layers 2..11"]] == ["0.50", "-"]
    assert [(cell.value, cell.between) for cell in rows["seconds in all layers at once"]] == [
        ("-", ""), ("1.50", "1.00 to 2.00")
    ]  # fmt: skip
    assert "runs of layers 8..11" in rows


def test_a_prompt_found_in_the_cache_does_not_count_as_a_time_to_the_first_token() -> None:
    early = (shown("early-exit", TOKENS), shown("early-exit", TOKENS, reused=5))
    early[1].stats.first_token_s = 0.001
    rows = {label: first for label, first, _ in figures(replace(report(), early=early, plain=early))}
    assert (rows["time to first token, ms"].value, rows["time to first token, ms"].between) == ("1000", "")
    reused = figures(replace(report(), early=early[1:], plain=early[1:]))
    assert ("time to first token, ms", "-") in [(label, cell.value) for label, cell, _ in reused]


def test_the_page_says_when_where_and_with_what_it_was_measured() -> None:
    text = Page(render_page(report())).text
    for words in ("2026-11-28 09:30 UTC", "Abacus 9000", "Linux x86_64", "onnxruntime 1.2.3", "sha256 abababababab"):
        assert words in text
    facts = dict(circumstances(report()))
    assert facts["threads"] == "2"
    assert facts["runs"] == "3 with early exit and 3 plain, in turns"
    own_pools = replace(report(), circumstances=replace(CIRCUMSTANCES, threads=None))
    assert dict(circumstances(own_pools))["threads"] == "a pool for each graph"


@pytest.mark.parametrize(
    ("policy", "label", "words"),
    [
        ({}, "verification", "none: a token that leaves is final"),
        ({"verify": "rollback", "rollback_below": 0.1}, "verification", "a probability below 0.1 is taken back"),
        ({"kv_policy": "pipeline"}, "the layers above", "pipeline: fill their cache on threads of their own"),
        ({"max_pending": 3}, "waiting for them", "at most 3 tokens"),
        ({"prefill_exit": True}, "prompt", "may leave early"),
    ],
)
def test_settings_are_explained(policy: dict[str, Any], label: str, words: str) -> None:
    made = report()
    assert words in dict(settings(replace(made, policy=replace(made.policy, **policy))))[label]


# The charts


def test_a_bar_is_as_long_as_its_tokens_are_many() -> None:
    picture = drawing.draw_histogram(report())
    widths = {rect.title.split(":")[0]: rect.width for rect in picture.rects}
    assert list(widths) == ["after 2", "after 4", "after 8", "all 12 layers"]
    assert [width / widths["after 4"] for width in widths.values()] == pytest.approx([3, 1, 1, 2])
    unused = drawing.draw_histogram(report(exits=(2, 4, 6, 8)))
    assert not [rect for rect in unused.rects if rect.title.startswith("after 6")]
    assert "0" in [label.text for label in unused.labels]


def test_a_tokens_column_is_as_high_as_it_is_deep() -> None:
    made = report()
    heights = [rect.height for rect in drawing.draw_depths(made).rects]
    deepest = heights[0] / LAYERS
    assert [height / deepest for height in heights] == pytest.approx([token.exit_layer for token in TOKENS])


def test_every_axis_has_a_title() -> None:
    made = report()
    titles = {
        drawing.draw_depths: ("layers before the decision", "position in the text, tokens"),
        drawing.draw_depth_curve: ("agreement with plain decoding", "mean layers before the decision"),
        drawing.draw_speed_curve: ("agreement with plain decoding", "speed, times that of plain decoding"),
    }
    for draw, words in titles.items():
        assert set(words) <= {label.text for label in draw(made).labels}


def test_speeds_are_drawn_with_their_range_and_the_chosen_one_on_top() -> None:
    picture = drawing.draw_speed_curve(report())
    classes = [line.css for line in picture.marks]
    assert [css for css in classes if css.startswith("whisker")] == ["whisker sweep"] * 2 + ["whisker sweep chosen"]
    assert classes[-1] == "dot sweep chosen"
    depths = drawing.draw_depth_curve(report())
    assert not [line for line in depths.marks if line.css.startswith("whisker")]  # the same at every run
    assert "20.0 (19.0 to 21.0) tokens/s" in picture.marks[-2].title


# What it is made from


def test_a_report_takes_its_own_point_of_the_curve_from_the_runs_it_shows(make_bundle: MakeBundle) -> None:
    manifest = open_bundle(make_bundle(tiny_spec(LAYERS), *map(ExitSpec, EXITS), source="folder/tiny")).manifest
    early, plain = report().early, report().plain
    policy = ExitPolicy(parse_criterion("top_prob >= 0.7"))
    made = build_report(manifest, "Say it.", policy, early, plain, sweep=POINTS[::2])
    assert [point.threshold for point in made.sweep] == [0.0, 0.7, 0.9][::-1]
    own = made.sweep[1]
    assert own.is_chosen
    assert own.tokens_per_s == made.early_speed == Spread((6.0, 12.0, 8.0))
    assert own.similarity == made.agreement.similarity
    assert made.source_name == "tiny"
    assert made.circumstances.weights_sha256 == manifest.weights_sha256
    assert build_report(manifest, "Say it.", policy, early, plain).sweep == ()


def test_circumstances_are_those_of_this_process(make_bundle: MakeBundle) -> None:
    found = find_circumstances(open_bundle(make_bundle(tiny_spec())).manifest)
    assert set(found.versions) == {"shortstack", "onnxruntime", "Python"}
    assert found.processor == processor()[0] != ""
    assert abs((datetime.now(UTC) - found.made_at).total_seconds()) < 60
    assert found.precision == "float32"


def test_thresholds_are_run_in_rounds_and_the_requests_own_is_not_run_again() -> None:
    tried: list[float] = []

    class Run:
        def __init__(self, policy: ExitPolicy) -> None:
            bound = varied_bound(policy.criterion)
            assert bound is not None
            tried.append(bound.threshold.value)
            self.stats = shown("early-exit", TOKENS, 1.0 + len(tried)).stats
            self.token_ids = [token.id for token in TOKENS]

        def __iter__(self) -> Iterator[Token]:
            return iter(TOKENS)

    policy = ExitPolicy(parse_criterion("top_prob >= 0.7"))
    points = sweep(policy, [token.id for token in PLAIN], LAYERS, Run)  # type: ignore[arg-type]
    others = [0.99, 0.95, 0.9, 0.8, 0.5, 0.3, 0.0]
    assert tried == others * 3
    assert [point.threshold for point in points] == others
    assert points[0].tokens_per_s.values == pytest.approx((6 / 1, 6 / 8, 6 / 15))
    assert {point.exited_share for point in points} == {5 / 7}
    assert not [point for point in points if point.is_chosen]


def test_agreement_counts_the_prefix_the_positions_and_the_edits() -> None:
    assert agreement_of([1, 2, 3], [1, 2, 3]).is_exact
    found = agreement_of([1, 2, 3, 4], [1, 9, 2, 3, 4])
    assert (found.tokens, found.first_difference, found.equal_share, found.similarity) == (5, 1, 0.2, 0.8)
    assert found.prefix_share == 0.2
    shorter = agreement_of([1, 2], [1, 2, 3, 4])
    assert (shorter.first_difference, shorter.equal_share) == (2, 0.5)
    assert agreement_of([], []).to_json() == {
        "is_exact": True, "tokens": 0, "first_difference": None, "equal_share": 1.0, "similarity": 1.0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "measure"),
    [
        ("top_prob >= 0.9", "top_prob"),
        ("margin >= 0.2 ~ 4.0", "margin"),
        ("(entropy <= 1.0 or patience >= 2) and votes >= 2", "entropy"),
        ("top_prob >= 0.9 [4: 0.8]", None),
        ("top_prob >= 0.9 and margin >= 0.2", None),
        ("patience >= 2", None),
        ("always", None),
    ],
)
def test_one_threshold_can_vary(rule: str, measure: str | None) -> None:
    criterion: Criterion = parse_criterion(rule)
    bound = varied_bound(criterion)
    assert (None if bound is None else bound.measure) == measure
    if bound is not None:
        value = bound.threshold.value
        assert str(with_threshold(criterion, value)) == str(criterion)
        assert str(with_threshold(criterion, 0.125)).replace("0.125", repr(value)) == str(criterion)


def test_the_grid_goes_from_cautious_to_bold_and_holds_the_own_threshold() -> None:
    falling, rising = varied_bound(parse_criterion("top_prob >= 0.91")), varied_bound(parse_criterion("entropy <= 1"))
    assert falling is not None
    assert rising is not None
    assert grid_of(falling) == (0.99, 0.95, 0.91, 0.8, 0.7, 0.5, 0.3, 0.0)  # 0.9 is too near
    assert grid_of(rising) == (0.02, 0.05, 0.1, 0.3, 0.6, 1.0, 2.0, 4.0)


def test_without_a_threshold_nothing_is_swept() -> None:
    def run(policy: ExitPolicy) -> None:
        raise AssertionError

    assert sweep(ExitPolicy(parse_criterion("always")), [1], LAYERS, run) == ()  # type: ignore[arg-type]


# The terminal


def test_depths_are_marked_by_colour_or_in_brackets() -> None:
    plain, coloured = DepthMarks(EXITS, LAYERS, False), DepthMarks(EXITS, LAYERS, True)
    assert [plain.mark(t.text, t.exit_layer) for t in TOKENS[:4]] == ["The", " cat[2]", " sat[4]", "[8]\n"]
    assert coloured.mark("The", LAYERS) == "The"
    assert coloured.mark(" cat", 2) == "\x1b[38;5;28m cat\x1b[0m"
    legend = plain.legend(TOKENS).splitlines()
    assert [line.split()[:4] for line in legend] == [
        ["after", "2", "layers", "3"], ["after", "4", "layers", "1"], ["after", "8", "layers", "1"],
        ["all", "12", "layers", "2"],
    ]  # fmt: skip
    assert "42.9%" in legend[0]
    assert "\x1b" not in "".join(legend)


def test_colours_follow_the_order_of_the_exits_however_many_there_are() -> None:
    assert [bucket_of(depth, EXITS) for depth in (*EXITS, LAYERS)] == [0, 1, 2, None]
    many = [bucket_of(depth, range(1, 30)) for depth in range(1, 30)]
    assert many[0] == 0
    assert many[-1] == 5
    assert many == sorted(b for b in many if b is not None)
    assert [(c.depth, c.tokens) for c in count_depths(TOKENS)] == [(2, 3), (4, 1), (8, 1), (12, 2)]
