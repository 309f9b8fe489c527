"""``table.png``: what maps are worth, seed by seed, above what they cost."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

_RATIO_TICKS = (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)


def draw_table(table: Mapping[str, Any], file: Path) -> None:
    """Draw the table.

    Args:
        table: As in ``table.json``.
        file: The PNG to write, beside and then renamed.
    """
    maps: Mapping[str, Any] = table["maps"]
    figure, ((worth, probes), (prefill, drafts)) = plt.subplots(2, 2, figsize=(11, 8), constrained_layout=True)
    _seeds(worth, {name: [one["perplexity"] for one in entry["quality"]] for name, entry in maps.items()})
    worth.set_title("perplexity on held-out rows (a dot is a seed)")
    worth.set_ylim(bottom=1)
    for offset, (kind, part) in zip((-0.2, 0.2), (("recall", "texts"), ("copy", "tokens")), strict=True):
        values = {name: [100 * one[kind][part] for one in entry["quality"]] for name, entry in maps.items()}
        _seeds(probes, values, offset, 0.38, f"{kind}: {part}")
    probes.set_title("completed right, %")
    probes.set_ylim(0, 115)  # room for the legend
    probes.legend(frameon=False, ncols=2, loc="upper center")
    plain = next(iter(maps))
    for index, (name, entry) in enumerate(maps.items()):
        times = entry["speed"]["prefill"]
        points = [(int(length), of["times_reference"]) for length, of in times.items()]
        prefill.plot(*zip(*points, strict=True), marker="o", color=f"C{index}", label=name)
    for depth, measured in table["complete_exits"].items():
        for name in measured.keys() - {plain}:
            points = [(int(length), of["times_reference"]) for length, of in measured[name]["prefill"].items()]
            color = f"C{list(maps).index(name)}"
            label = f"{name}, cut after {depth}: KV-complete"
            prefill.plot(*zip(*points, strict=True), "--", marker="o", color=color, label=label)
    prefill.set_xscale("log", base=2)
    prefill.set_yscale("log", base=2)
    lengths = [int(length) for length in maps[plain]["speed"]["prefill"]]
    for axis, ticks in ((prefill.xaxis, lengths), (prefill.yaxis, _RATIO_TICKS)):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    prefill.set_xlabel("tokens of the prompt")
    prefill.set_title(f"time to the first token, times that of {plain}")
    prefill.grid(alpha=0.3)
    prefill.legend(frameon=False, fontsize=8)
    speculation = {name: entry["speed"]["self_speculation"] for name, entry in maps.items()}
    _bars(drafts, {name: of["speed_up"] for name, of in speculation.items()})
    drafts.axhline(1, color="0.4", linewidth=0.8)
    drafts.set_title(f"self-speculation from layer {table['settings']['exit_layer']}: speed-up, drafts accepted")
    for place, of in enumerate(speculation.values()):
        drafts.annotate(f"{100 * of['alpha']:.0f}%", (place, 0), (0, 6), textcoords="offset points",
                        ha="center", color="white")  # fmt: skip
    bytes_per_token = [f"{name}\n{entry['speed']['kv_bytes_per_token']:.0f} bytes" for name, entry in maps.items()]
    for axes in (worth, probes, drafts):
        axes.set_xticks(range(len(maps)), bytes_per_token, fontsize=8)
    figure.suptitle("layers that share keys and values; below each name its K,V bytes per token")
    partial = file.with_suffix(".partial")
    figure.savefig(partial, format="png", dpi=110)
    plt.close(figure)
    os.replace(partial, file)


def _seeds(
    axes: Any, values: Mapping[str, list[float]], offset: float = 0.0, width: float = 0.7, label: str | None = None
) -> None:
    """Draw a bar for each mean, and a dot for each value."""
    places = [place + offset for place in range(len(values))]
    axes.bar(places, [sum(found) / len(found) for found in values.values()], width, alpha=0.6, label=label)
    for place, found in zip(places, values.values(), strict=True):
        axes.plot([place] * len(found), found, "o", color="0.2", markersize=4)


def _bars(axes: Any, values: Mapping[str, float]) -> None:
    axes.bar(range(len(values)), list(values.values()), 0.7, alpha=0.8)
