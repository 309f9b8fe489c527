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
        file: The PNG to write, under another name first.
    """
    maps: Mapping[str, Any] = table["maps"]
    plain = next(iter(maps))
    colours = {name: f"C{index}" for index, name in enumerate(maps)}
    figure, ((worth, probes), (prefill, drafts)) = plt.subplots(2, 2, figsize=(12, 8.4), constrained_layout=True)
    _seeds(worth, {name: [one["perplexity"] for one in entry["quality"]] for name, entry in maps.items()}, colours)
    worth.set_title("perplexity on held-out rows, lower is better (a dot is a seed)", fontsize=11)
    worth.set_ylabel("perplexity; 1 is perfect")
    worth.set_ylim(bottom=1)
    for offset, alpha, kind, part in ((-0.2, 0.75, "recall", "texts"), (0.2, 0.35, "copy", "tokens")):
        values = {name: [100 * one[kind][part] for one in entry["quality"]] for name, entry in maps.items()}
        _seeds(probes, values, colours, offset, 0.38, alpha)
        probes.bar([0], [0], color="0.3", alpha=alpha, label=f"{kind}: {part}")  # the legend alone
    probes.set_title("completed right (a dot is a seed)", fontsize=11)
    probes.set_ylabel("share completed right, %")
    probes.set_ylim(0, 115)  # room for the legend
    probes.set_yticks(range(0, 101, 20))
    probes.legend(frameon=False, ncols=2, loc="upper center")
    _prefill(prefill, table, plain, colours)
    speculation = {name: entry["speed"]["self_speculation"] for name, entry in maps.items()}
    drafts.bar(
        range(len(maps)), [of["speed_up"] for of in speculation.values()], 0.7, color=list(colours.values()), alpha=0.75
    )
    drafts.axhline(1, color="0.4", linewidth=0.8)
    drafts.set_title(
        f"self-speculation from layer {table['settings']['exit_layer']} (alpha: judged drafts accepted, 0 to 1)",
        fontsize=11,
    )
    drafts.set_ylabel("times plain decoding of the same map")
    drafts.yaxis.set_major_formatter(StrMethodFormatter("{x:g}x"))
    for place, of in enumerate(speculation.values()):
        drafts.annotate(f"{of['speed_up']:.2f}x\nalpha {of['alpha']:.2f}", (place, 0), (0, 6),
                        textcoords="offset points", ha="center", fontsize=8)  # fmt: skip
    bytes_per_token = [f"{name}\n{entry['speed']['kv_bytes_per_token']:.0f} bytes" for name, entry in maps.items()]
    for axes in (worth, probes, drafts):
        axes.set_xticks(range(len(maps)), bytes_per_token, fontsize=8)
    for axes in (worth, probes, prefill, drafts):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Layers that share keys and values. Below each name: K,V bytes per token")
    partial = file.with_suffix(".partial")
    figure.savefig(partial, format="png", dpi=110)
    plt.close(figure)
    os.replace(partial, file)


def _prefill(axes: Any, table: Mapping[str, Any], plain: str, colours: Mapping[str, str]) -> None:
    """Draw the time to the first token over the length of the prompt, in times of plain's."""
    maps: Mapping[str, Any] = table["maps"]
    for index, (name, entry) in enumerate(maps.items()):
        times = entry["speed"]["prefill"]
        points = [(int(length), of["times_reference"]) for length, of in times.items()]
        width = 5.0 - 0.8 * index  # lines that lie on each other stay visible
        axes.plot(
            *zip(*points, strict=True), marker="o", color=colours[name], linewidth=width, markersize=4, label=name
        )
    for depth, measured in table["complete_exits"].items():
        for name in sorted(measured.keys() - {plain}):
            points = [(int(length), of["times_reference"]) for length, of in measured[name]["prefill"].items()]
            label = f"{name}, cut after {depth}: KV-complete"
            axes.plot(*zip(*points, strict=True), "--", marker="o", color=colours[name], markersize=4, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    lengths = [int(length) for length in maps[plain]["speed"]["prefill"]]
    for axis, ticks, form in ((axes.xaxis, lengths, "{x:g}"), (axes.yaxis, _RATIO_TICKS, "{x:g}x")):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(StrMethodFormatter(form))
    axes.set_xlabel("length of the prompt, tokens (log scale)")
    axes.set_ylabel(f"times that of {plain} (log scale)")
    axes.set_title("time to the first token, lower is better", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def _seeds(
    axes: Any, values: Mapping[str, list[float]], colours: Mapping[str, str], offset: float = 0.0, width: float = 0.7,
    alpha: float = 0.75,
) -> None:  # fmt: skip
    """Draw a bar for each mean, and a dot for each value."""
    places = [place + offset for place in range(len(values))]
    means = [sum(found) / len(found) for found in values.values()]
    axes.bar(places, means, width, color=[colours[name] for name in values], alpha=alpha)
    for place, found in zip(places, values.values(), strict=True):
        axes.plot([place] * len(found), found, "o", color="0.2", markersize=4)
