"""``training.png``: losses on the left, what was measured on the right, over tokens seen."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from shortstack.samples.recipes.training.loop import History


def draw(history: History, file: Path, title: str) -> None:
    """Draw a run.

    Args:
        history: The run.
        file: The PNG to write, beside and then renamed.
        title: Above the picture.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    _lines(left, history.losses)
    left.set_ylabel("loss (nats per token)")
    left.set_title("training")
    _lines(right, history.measures, marker="o")
    right.set_ylabel("part of held-out tokens")
    right.set_ylim(0, 1)
    right.set_title("held-out text")
    for axes in (left, right):
        axes.set_xlabel("tokens seen (thousands)")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    figure.suptitle(title)
    partial = file.with_suffix(".partial")
    figure.savefig(partial, format="png", dpi=110)
    plt.close(figure)
    os.replace(partial, file)


def _lines(axes: Any, entries: list[dict[str, float]], marker: str = "") -> None:
    names = list(dict.fromkeys(name for entry in entries for name in entry if name not in ("step", "tokens")))
    for name in names:
        points = [(entry["tokens"] / 1000, entry[name]) for entry in entries if name in entry]
        axes.plot(*zip(*points, strict=True), label=name, marker=marker)
