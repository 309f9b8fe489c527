"""Pictures of recipes and of the KV-sharing table: order of colours, smoothing, final values, bars equal to data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from shortstack.samples.recipes.training.curve_plot import draw_curve
from shortstack.samples.recipes.training.draft_cost import Costs
from shortstack.samples.recipes.training.loop import History
from shortstack.samples.recipes.training.plot import (
    Name,
    draw,
    ordered_colours,
    running_mean,
    spread_apart,
    training_figure,
)
from shortstack.samples.recipes.training.report import write_report
from shortstack.samples.showcase.kv_sharing_plot import draw_table

TABLE = Path(__file__).parents[2] / "samples" / "checkpoints" / "kv-sharing" / "table.json"
HISTORY = History(
    losses=[
        {"step": 10 * i, "tokens": 1000 * i, "exit 6": 20.0 / i, "last": 2.0 / i, "exit 2": 30.0 / i}
        for i in range(1, 61)
    ],
    measures=[
        {"step": 10 * i, "tokens": 1000 * i, "agreement at 6": 0.52, "accuracy of the last layer": i / 100,
         "agreement at 2": 0.5}
        for i in (20, 60)
    ],
    tokens=60_000,
    elapsed_s=90.0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


def luminance(colour: Any) -> float:
    """As the WCAG defines it."""
    red, green, blue = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in matplotlib.colors.to_rgb(colour)
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_deeper_exits_and_later_drafts_are_darker_and_the_last_layer_is_darkest() -> None:
    texts = ["last", "exit 10", "exit 2", "exit 4, draft 2", "agreement at 4", "accuracy of the last layer"]
    colours = ordered_colours([Name.of(text) for text in texts])
    order = [Name.of(text).place for text in ("exit 2", "agreement at 4", "exit 4, draft 2", "exit 10", "last")]
    shades = [luminance(colours[place]) for place in order]
    assert all(lighter > darker for lighter, darker in pairwise(shades))
    assert 1.05 / (max(shades) + 0.05) >= 3  # contrast to white
    assert colours[Name.of("accuracy of the last layer").place] == colours[Name.of("last").place]


def test_a_running_mean_is_centred_and_shorter_at_the_ends() -> None:
    assert running_mean([1.0, 2.0, 6.0, 3.0], 1) == [1.5, 3.0, 11 / 3, 4.5]
    assert running_mean([1.0, 2.0], 0) == [1.0, 2.0]


def test_labels_move_apart_and_keep_their_order() -> None:
    assert spread_apart([0.5, 0.1], 0.06) == [0.5, 0.1]
    moved = spread_apart([0.99, 0.98, 0.97, 0.2], 0.05)
    assert moved == pytest.approx([1.0, 0.95, 0.9, 0.2])
    assert spread_apart([], 0.05) == []


def test_each_line_ends_in_its_name_and_its_final_value() -> None:
    left, right = training_figure(HISTORY, "LayerSkip").axes
    smooth = {line.get_label(): line.get_ydata() for line in left.lines if not line.get_label().startswith("_")}
    assert list(smooth) == ["exit 2", "exit 6", "last"]  # in order, whichever was logged first
    finals = [f"{name}  {values[-1]:.{3 if values[-1] < 1 else 2}f}" for name, values in smooth.items()]
    assert [text.get_text() for text in left.texts] == finals
    assert smooth["last"][-1] == pytest.approx(sum(2.0 / i for i in (58, 59, 60)) / 3)
    assert [text.get_text() for text in right.texts] == [
        "agreement at 2  0.500", "agreement at 6  0.520", "accuracy of the last layer  0.600"
    ]  # fmt: skip
    low, high = sorted(text.xy[1] for text in right.texts[:2])
    assert high - low >= 0.06 - 1e-9


def test_the_title_says_how_much_was_seen_in_which_time() -> None:
    assert training_figure(HISTORY, "LayerSkip").get_suptitle() == "LayerSkip: 60 k tokens in 90 s"
    long = History([], [], 1_271_563, 3360.0)
    assert training_figure(long, "LayerSkip").get_suptitle() == "LayerSkip: 1.27 M tokens in 56 min"


def test_losses_are_shown_as_logged_and_smoothed_with_units() -> None:
    left, right = training_figure(HISTORY, "LayerSkip").axes
    raw = [line for line in left.lines if line.get_label().startswith("_")]
    assert [list(line.get_ydata()) for line in raw][2] == [entry["last"] for entry in HISTORY.losses]
    assert {line.get_alpha() for line in raw} == {0.25}
    assert (left.get_xlabel(), left.get_ylabel()) == ("tokens seen, thousands", "loss, nats per token, log scale")
    assert left.get_yscale() == "log"
    assert (right.get_ylabel(), right.get_ylim()) == ("share of held-out tokens", (0, 1))
    assert "mean over 5 entries" in left.get_title()


def test_a_short_run_is_drawn_as_logged(tmp_path: Path) -> None:
    history = History([{"step": 10, "tokens": 500, "last": 2.0}], [], 500, 1.0)
    left, _ = training_figure(history, "LayerSkip").axes
    assert (left.get_title(), left.get_yscale(), len(left.lines)) == ("training", "linear", 1)
    draw(history, tmp_path / "training.png", "LayerSkip")
    nothing = training_figure(History(), "Closed form")
    assert [[text.get_text() for text in axes.texts] for axes in nothing.axes] == [["nothing was logged"]] * 2
    draw(History(), tmp_path / "nothing.png", "Closed form")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["nothing.png", "training.png"]


def test_a_report_holds_all_that_its_picture_is_drawn_from(tmp_path: Path) -> None:
    write_report(tmp_path, "LayerSkip", {}, HISTORY, {}, {})
    report = json.loads((tmp_path / "report.json").read_text())
    again = History(report["losses"], report["measures"], report["tokens"], report["training_s"])
    assert again == HISTORY


def test_a_curve_shows_entries_above_its_usual_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plt, "close", drawn.append)
    entries = [
        {"kind": "trained", "spec": {"draft_vocab": vocab, "exit_layer": 4}, "draft_cost": 0.2, "alphas": [alpha]}
        for vocab, alpha in ((None, 0.97), (6144, 0.5))
    ]
    draw_curve(entries, Costs({1: 1.0, 2: 1.1, 4: 1.2, 8: 1.4}), tmp_path / "curve.png")
    [axes] = drawn[0].axes
    assert axes.get_ylim()[1] == pytest.approx(0.99)
    assert [text.get_text() for text in axes.get_legend().texts] == [
        "trained; all rows", "trained; 6,144 rows"
    ]  # fmt: skip


def test_the_bars_of_the_table_are_the_numbers_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plt, "close", drawn.append)
    table = json.loads(TABLE.read_text())
    draw_table(table, tmp_path / "table.png")
    worth, probes, prefill, drafts = drawn[0].axes
    maps = table["maps"].values()
    means = [sum(one["perplexity"] for one in entry["quality"]) / len(entry["quality"]) for entry in maps]
    assert [bar.get_height() + 0.0 for bar in worth.patches] == pytest.approx(means)
    speeds = [entry["speed"]["self_speculation"] for entry in maps]
    assert [bar.get_height() for bar in drafts.patches] == pytest.approx([of["speed_up"] for of in speeds])
    assert [text.get_text() for text in drafts.texts] == [
        f"{of['speed_up']:.2f}x\nalpha {of['alpha']:.2f}" for of in speeds
    ]
    colours = [bar.get_facecolor()[:3] for bar in drafts.patches]
    assert colours == [matplotlib.colors.to_rgb(line.get_color()) for line in prefill.lines[: len(speeds)]]
    assert all(axes.get_ylabel() for axes in (worth, probes, prefill, drafts))
    assert probes.get_ylim()[0] == drafts.get_ylim()[0] == 0
