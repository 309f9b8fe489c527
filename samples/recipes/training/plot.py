"""``training.png``: losses on the left, what was measured on the right, over tokens seen.

Depths have an order and so have their colours, from light (shallow) to dark; the last layer is black. A faint line is
what was logged, a strong one its running mean. Each line ends in its name and its final value.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter

if TYPE_CHECKING:
    from shortstack.samples.recipes.training.loop import History

Place = tuple[float, int]  # depth and draft
_WINDOW_SHARE = 0.05  # of all entries, in one running mean
_LOG_FROM = 10.0  # losses that span more than this factor are drawn on a log scale
_LABEL_GAP = 0.06  # of the height of the axes, between two names
_LIGHT, _DARK = 0.58, 0.0  # ends of the colour map that are used: its yellow cannot be read on white
_LAST_COLOUR = "0.1"


@dataclass(frozen=True, slots=True)
class Name:
    """What a logged value is of.

    Attributes:
        text: As it was logged: ``exit 4``, ``last``, ``agreement at 2``, ``exit 4, draft 2``.
        depth: The exit; infinite for the last layer.
        draft: Which draft of a round, from 1; 1 where drafts are not told apart.
    """

    text: str
    depth: float
    draft: int

    @property
    def place(self) -> Place:
        """Its place in the order of colours."""
        return self.depth, self.draft

    @classmethod
    def of(cls, text: str) -> Name:
        """Read a name."""
        numbers = [int(number) for number in re.findall(r"\d+", text)]
        return cls(text, numbers[0] if numbers else math.inf, numbers[1] if len(numbers) > 1 else 1)


def draw(history: History, file: Path, title: str) -> None:
    """Draw a run.

    Args:
        history: The run.
        file: The PNG to write, under another name first.
        title: Above the picture.
    """
    figure = training_figure(history, title)
    partial = file.with_suffix(".partial")
    figure.savefig(partial, format="png", dpi=110)
    plt.close(figure)
    os.replace(partial, file)


def training_figure(history: History, title: str) -> Any:
    """Return the picture, not yet written; who asks closes it."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), constrained_layout=True)
    half = round(len(history.losses) * _WINDOW_SHARE / 2)
    colours = ordered_colours([*_names(history.losses), *_names(history.measures)])
    is_log = _spans_decades(history.losses)
    left.set_yscale("log" if is_log else "linear")
    if is_log:
        left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        left.yaxis.set_minor_formatter(NullFormatter())
    right.set_ylim(0, 1)
    left_ends = _lines(left, history.losses, colours, half=half)
    right_ends = _lines(right, history.measures, colours, marker="o")
    left.set_ylabel(f"loss, nats per token{', log scale' if is_log else ''}")
    smooth = f"; faint: as logged, strong: mean over {2 * half + 1} entries" if half else ""
    left.set_title(f"training{smooth}", fontsize=11)
    right.set_ylabel("share of held-out tokens")
    right.set_title("held-out text", fontsize=11)
    for axes, ends in ((left, left_ends), (right, right_ends)):
        axes.set_xlabel("tokens seen, thousands")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if ends:
            _name_ends(axes, ends, colours)
        else:
            axes.text(0.5, 0.5, "nothing was logged", transform=axes.transAxes, ha="center", va="center", color="0.4")
    tokens, seconds = history.tokens, history.elapsed_s
    amount = f"{tokens / 1e6:.2f} M" if tokens >= 1e6 else f"{tokens / 1e3:.0f} k"
    duration = f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
    figure.suptitle(f"{title}: {amount} tokens in {duration}")
    return figure


def ordered_colours(names: Sequence[Name]) -> dict[Place, Any]:
    """Return a colour for each depth, and each draft of it, the darker the deeper; the last layer has its own."""
    places = sorted({name.place for name in names if name.depth != math.inf})
    shades = [_LIGHT - (_LIGHT - _DARK) * rank / max(len(places) - 1, 1) for rank in range(len(places))]
    colours = {place: plt.get_cmap("viridis")(shade) for place, shade in zip(places, shades, strict=True)}
    return colours | {name.place: _LAST_COLOUR for name in names if name.depth == math.inf}


def running_mean(values: Sequence[float], half: int) -> list[float]:
    """Return the mean of each value and ``half`` neighbours on either side; at the ends, of those that there are."""
    spans = (values[max(0, middle - half) : middle + half + 1] for middle in range(len(values)))
    return [sum(span) / len(span) for span in spans]


def spread_apart(places: Sequence[float], gap: float) -> list[float]:
    """Return places of labels, in the same order, at least so far apart and near where they were, within 0..1."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    for below, above in pairwise(order):
        moved[above] = max(moved[above], moved[below] + gap)
    if order and moved[order[-1]] > 1.0:
        moved[order[-1]] = 1.0
        for above, below in pairwise(reversed(order)):
            moved[below] = min(moved[below], moved[above] - gap)
    return moved


def _names(entries: list[dict[str, float]]) -> list[Name]:
    """Return what entries hold, shallow first."""
    texts = dict.fromkeys(name for entry in entries for name in entry if name not in ("step", "tokens"))
    return sorted(map(Name.of, texts), key=lambda name: (name.depth, name.draft, name.text))


def _spans_decades(entries: list[dict[str, float]]) -> bool:
    values = [entry[name.text] for name in _names(entries) for entry in entries if name.text in entry]
    return bool(values) and min(values) > 0 and max(values) / min(values) > _LOG_FROM


def _lines(
    axes: Any, entries: list[dict[str, float]], colours: dict[Place, Any], *, half: int = 0, marker: str = ""
) -> list[tuple[Name, float]]:
    """Draw a line for each name and return where it ends."""
    ends = []
    for name in _names(entries):
        points = [(entry["tokens"] / 1000, entry[name.text]) for entry in entries if name.text in entry]
        tokens, values = (list(each) for each in zip(*points, strict=True))
        smooth, colour = running_mean(values, half), colours[name.place]
        if half:
            axes.plot(tokens, values, color=colour, alpha=0.25, linewidth=0.8, label="_as logged")
        axes.plot(tokens, smooth, color=colour, marker=marker, markersize=4, label=name.text)
        ends.append((name, smooth[-1]))
    return ends


def _name_ends(axes: Any, ends: Sequence[tuple[Name, float]], colours: dict[Place, Any]) -> None:
    """Write each name and final value next to the end of its line; the limits of the axes are settled by then."""
    axes.get_ylim()
    scale = axes.transData + axes.transAxes.inverted()
    places = [float(scale.transform((1, value))[1]) for _, value in ends]
    for (name, value), place in zip(ends, spread_apart(places, _LABEL_GAP), strict=True):
        axes.annotate(
            f"{name.text}  {value:.{3 if value < 1 else 2}f}", (1.01, place), xycoords="axes fraction",
            color=colours[name.place], va="center", fontsize=9, annotation_clip=False,
        )  # fmt: skip
