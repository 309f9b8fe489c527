"""Where each bar, point and label of the report's charts is drawn. Knows no SVG; the shapes are those of `inspect`.

Units are those of the view box, y grows downwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shortstack.runtime.commands.exit_report.report import ExitReport
from shortstack.runtime.commands.exit_report.spread import Spread, speed_words
from shortstack.runtime.inspection.picture import Label, Line, Picture, Rect

_WIDTH = 480.0
_BAR_X, _BAR_WIDTH, _ROW, _BAR_HEIGHT, _BAR_TOP = 124.0, 168.0, 28.0, 18.0, 26.0
_LEFT, _RIGHT, _TOP, _HEIGHT = 50.0, 466.0, 46.0, 190.0
_BOTTOM = _TOP + _HEIGHT
_CIRCLE = 4.0
_TITLE_Y = 14.0  # baseline of the text above a chart


@dataclass(frozen=True, slots=True)
class Axis:
    """A scale along one side of a chart, from 0.

    Attributes:
        end: Its largest value.
        step: Between two ticks.
        words: What it shows, with its unit.
        suffix: After each number.
    """

    end: float
    step: float
    words: str
    suffix: str = ""

    def ticks(self) -> list[float]:
        """Return where numbers stand."""
        return [index * self.step for index in range(int(self.end / self.step + 1e-6) + 1)]

    def share(self, value: float) -> float:
        """Return where a value lies, 0..1."""
        return min(max(value / self.end, 0.0), 1.0)


@dataclass(frozen=True, slots=True)
class Dot:
    """One point of a curve; ``low`` and ``high`` are the range of x where it varies."""

    x: float
    y: float
    title: str
    words: str = ""
    is_chosen: bool = False
    low: float | None = None
    high: float | None = None


def draw_histogram(report: ExitReport) -> Picture:
    """Draw how many tokens were decided at each depth, each bar as long as its tokens are many."""
    picture = Picture(_WIDTH)
    counts = report.counts
    most = max(count.tokens for count in counts) or 1
    total = len(report.shown.tokens) or 1
    picture.labels.append(Label(_BAR_X - 8, _TITLE_Y, "decided", "end muted"))
    picture.labels.append(Label(_BAR_X, _TITLE_Y, "tokens · share · mean confidence", "muted"))
    for row, count in enumerate(counts):
        y = _BAR_TOP + row * _ROW
        middle = y + _BAR_HEIGHT / 2 + 4.5
        words = f"all {count.depth} layers" if count.depth == report.layers else f"after {count.depth}"
        title = f"{words}: {count.tokens} tokens, {count.tokens / total:.1%}"
        title += f", mean confidence {count.mean_confidence:.2f}" if count.tokens else ""
        width = _BAR_WIDTH * count.tokens / most
        picture.labels.append(Label(_BAR_X - 8, middle, words, "end"))
        if count.tokens:
            picture.rects.append(Rect(_BAR_X, y, width, _BAR_HEIGHT, report.css(count.depth), title))
        figures = f"{count.tokens} · {count.tokens / total:.0%} · {count.mean_confidence:.2f}" if count.tokens else "0"
        picture.labels.append(Label(_BAR_X + width + 6, middle, figures, "muted"))
    picture.height = _BAR_TOP + len(counts) * _ROW
    return picture


def draw_depths(report: ExitReport) -> Picture:
    """Draw how deep each token went, in the order of the text."""
    picture = Picture(_WIDTH)
    tokens = report.tokens
    depth_axis = Axis(report.layers, _round_step(report.layers, 5), "layers before the decision")
    position_axis = Axis(max(len(tokens), 1), _round_step(len(tokens), 8), "position in the text, tokens")
    _axes(picture, position_axis, depth_axis)
    pitch = (_RIGHT - _LEFT) / max(len(tokens), 1)
    gap = 1.0 if pitch > 3 else 0.0
    for each in tokens:
        height = _HEIGHT * depth_axis.share(each.token.exit_layer)
        title = f"token {each.position}: {each.token.exit_layer} of {report.layers} layers"
        x = _LEFT + each.position * pitch
        picture.rects.append(Rect(x, _BOTTOM - height, pitch - gap, height, each.css, title))
    mean = report.shown.stats.mean_exit_layer
    y = _BOTTOM - _HEIGHT * depth_axis.share(mean)
    picture.marks.append(Line(f"M{_LEFT:g},{y:g} H{_RIGHT:g}", "mean", f"mean depth {mean:.1f}"))
    picture.labels.append(Label(_RIGHT, _TITLE_Y, f"dashed: mean {mean:.1f}", "end muted"))
    return picture


def draw_depth_curve(report: ExitReport) -> Picture:
    """Draw agreement over mean depth, which is the same at every run; with the calibration's curve, if there is one."""
    axis = Axis(report.layers, _round_step(report.layers, 6), "mean layers before the decision")
    picture = Picture(_WIDTH)
    _axes(picture, axis, _agreement_axis())
    calibrated = [
        Dot(p.mean_exit_layer, 1 - p.mean_loss, f"calibration at {p.threshold:g}: loss {p.mean_loss:.3f}")
        for p in report.curve
    ]
    _curve(picture, axis, calibrated, "calibrated")
    dots = [_dot(report, index, Spread((point.mean_exit_layer,))) for index, point in enumerate(report.sweep)]
    _curve(picture, axis, dots, "sweep")
    _plain(picture, axis, report.layers)
    return picture


def draw_speed_curve(report: ExitReport) -> Picture:
    """Draw agreement over speed in units of plain decoding, with a bar from the slowest run to the fastest."""
    speeds = [report.times_plain(point.tokens_per_s) for point in report.sweep]
    fastest = max([1.0, *(speed.high for speed in speeds)])
    axis = Axis(fastest * 1.08, 0.5 if fastest < 4 else 1.0, "speed, times that of plain decoding", "x")
    picture = Picture(_WIDTH)
    _axes(picture, axis, _agreement_axis())
    _curve(picture, axis, [_dot(report, index, speed) for index, speed in enumerate(speeds)], "sweep")
    _plain(picture, axis, 1.0)
    return picture


def _agreement_axis() -> Axis:
    return Axis(1.0, 0.25, "agreement with plain decoding")


def _dot(report: ExitReport, index: int, x: Spread) -> Dot:
    """Return a point of the sweep at its place on the x axis; the first, the last and the chosen one are named."""
    point = report.sweep[index]
    is_named = point.is_chosen or index in (0, len(report.sweep) - 1)
    title = (
        f"{report.measure} {point.threshold:g}: agreement {point.similarity:.3f}, mean depth "
        f"{point.mean_exit_layer:.1f}, {point.exited_share:.0%} left early, "
        f"{point.tokens_per_s.words(speed_words)} tokens/s"
    )
    words = f"{point.threshold:g}" if is_named else ""
    return Dot(x.median, point.similarity, title, words, point.is_chosen, x.low, x.high)


def _curve(picture: Picture, axis: Axis, dots: Sequence[Dot], css: str) -> None:
    if not dots:
        return

    def place(x: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * axis.share(x)

    places = [(place(dot.x), _BOTTOM - _HEIGHT * dot.y) for dot in dots]
    picture.lines.append(Line("M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in places), css))
    pairs = sorted(zip(dots, places, strict=True), key=lambda each: each[0].is_chosen)  # the chosen one on top
    for dot, (_, y) in pairs:
        if dot.low is not None and dot.high is not None and dot.high > dot.low:
            whisker = f"M{place(dot.low):.1f},{y:.1f} H{place(dot.high):.1f}"
            picture.marks.append(Line(whisker, f"whisker {css}{' chosen' if dot.is_chosen else ''}", dot.title))
    for dot, (x, y) in pairs:
        r = _CIRCLE * 1.6 if dot.is_chosen else _CIRCLE
        d = f"M{x - r:.1f},{y:.1f} a{r:g},{r:g} 0 1,0 {2 * r:g},0 a{r:g},{r:g} 0 1,0 {-2 * r:g},0"
        picture.marks.append(Line(d, f"dot {css}{' chosen' if dot.is_chosen else ''}", dot.title))
    labelled: list[tuple[float, float]] = []
    for dot, (x, y) in reversed(pairs):
        if dot.words and not any(abs(x - a) < 34 and abs(y - b) < 16 for a, b in labelled):
            labelled.append((x, y))
            picture.labels.append(Label(x, y - 11, dot.words, "middle strong halo" if dot.is_chosen else "middle halo"))


def _plain(picture: Picture, axis: Axis, x: float) -> None:
    """Mark plain decoding, which agrees with itself."""
    at = _LEFT + (_RIGHT - _LEFT) * axis.share(x)
    picture.lines.append(Line(f"M{at:g},{_TOP:g} V{_BOTTOM:g}", "plain", "plain decoding"))
    picture.labels.append(Label(at - 5, _BOTTOM - 8, "plain", "end muted halo"))


def _axes(picture: Picture, x_axis: Axis, y_axis: Axis) -> None:
    for value in y_axis.ticks():
        y = _BOTTOM - _HEIGHT * y_axis.share(value)
        picture.lines.append(Line(f"M{_LEFT:g},{y:g} H{_RIGHT:g}", "grid"))
        picture.labels.append(Label(_LEFT - 8, y + 4.5, f"{value:g}{y_axis.suffix}", "end muted"))
    for value in x_axis.ticks():
        x = _LEFT + (_RIGHT - _LEFT) * x_axis.share(value)
        picture.labels.append(Label(x, _BOTTOM + 19, f"{value:g}{x_axis.suffix}", "middle muted"))
    picture.labels.append(Label((_LEFT + _RIGHT) / 2, _BOTTOM + 41, x_axis.words, "middle muted"))
    picture.labels.append(Label(2, _TITLE_Y, y_axis.words, "muted"))
    picture.height = _BOTTOM + 50


def _round_step(end: float, most: int) -> float:
    """Return a round distance between ticks that makes no more than so many of them."""
    steps = (scale * step for scale in (1, 10, 100, 1000, 10000) for step in (1, 2, 5))
    return next(float(step) for step in steps if end / step <= most)
