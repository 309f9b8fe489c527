"""``curve.png``: alpha of the first draft against the cost of a draft, over lines of equal predicted speed-up."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from shortstack.runtime.decode.speed_up import expected_tokens
from shortstack.samples.recipes.training.draft_cost import Costs

_LEVELS = (1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6)
_MOST_DRAFTS = 6
_TOP = 0.95  # of the alpha axis, unless an entry lies above it


def draw_curve(entries: Sequence[Mapping[str, Any]], costs: Costs, file: Path) -> None:
    """Draw the exits.

    Args:
        entries: Of ``curve.json``.
        costs: What judging costs, for the lines of equal speed-up.
        file: The PNG to write, under another name first.
    """
    figure, axes = plt.subplots(figsize=(11, 5.5), constrained_layout=True)
    right = max(entry["draft_cost"] for entry in entries) * 1.05
    top = max(_TOP, *(min(1.0, entry["alphas"][0] + 0.02) for entry in entries))
    f, alpha = np.meshgrid(np.linspace(0.01, right, 160), np.linspace(0.0, min(top, 0.99), 160))
    lines = axes.contour(f, alpha, fastest(f, alpha, costs), levels=_LEVELS, colors="0.75", linewidths=0.8)
    axes.clabel(lines, fmt="%.2fx", fontsize=8)
    curves: dict[tuple[str, int | None], list[Mapping[str, Any]]] = {}
    for entry in entries:
        curves.setdefault((entry["kind"], entry["spec"]["draft_vocab"]), []).append(entry)
    kinds = list(dict.fromkeys(kind for kind, _ in curves))
    vocabs = sorted({vocab or 0 for _, vocab in curves})
    markers = dict(zip(vocabs, "osD^vP*X", strict=False))
    for (kind, vocab), points in curves.items():
        points.sort(key=lambda entry: int(entry["spec"]["exit_layer"]))
        axes.plot(
            [entry["draft_cost"] for entry in points],
            [entry["alphas"][0] for entry in points],
            color=f"C{kinds.index(kind) % 10}",
            marker=markers.get(vocab or 0, "o"),
            markersize=8 if kind.startswith("trained") else 4,
            label=f"{kind}; {f'{vocab:,}' if vocab else 'all'} rows",
        )
        for entry in points:
            place = (entry["draft_cost"], entry["alphas"][0])
            axes.annotate(str(entry["spec"]["exit_layer"]), place, (6, 4), textcoords="offset points", fontsize=7)
    axes.set_xlabel("cost of a draft, in plain steps (number at a point: layers before the exit)")
    axes.set_ylabel("alpha of the first draft (accepted / judged), 0 to 1")
    axes.set_title(
        "Draft sources. Grey: equal speed-up, predicted as if every draft were accepted like the first", fontsize=11
    )
    axes.set_xlim(0, right)
    axes.set_ylim(0, top)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    partial = file.with_suffix(".partial")
    figure.savefig(partial, format="png", dpi=110)
    plt.close(figure)
    os.replace(partial, file)


def fastest(f: Any, alpha: Any, costs: Costs) -> Any:
    """Return the speed-up of the best draft length where each draft costs ``f`` and is accepted with ``alpha``."""
    speeds = [expected_tokens(alpha, k + 1) / (k * f + costs.judging(k + 1)) for k in range(1, _MOST_DRAFTS + 1)]
    return np.max(speeds, axis=0)
