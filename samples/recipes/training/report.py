"""``report.json`` and ``training.png``: what a run cost and what it gave."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from shortstack import __version__
from shortstack.samples.recipes.training.loop import History
from shortstack.samples.recipes.training.measure import DepthQuality
from shortstack.samples.recipes.training.plot import draw


def write_report(
    out: Path,
    recipe: str,
    settings: Mapping[str, Any],
    history: History,
    before: Mapping[int, DepthQuality],
    after: Mapping[int, DepthQuality],
    extra: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Write both files.

    Args:
        out: The run's folder.
        recipe: Its name, for the picture.
        settings: What the run depended on.
        history: What happened.
        before: Quality by depth on held-out text before training.
        after: The same afterwards.
        extra: What only this recipe reports, by name, as JSON-ready data.

    Returns:
        The report.
    """
    report = {
        "recipe": recipe,
        "settings": dict(settings),
        "tokens": history.tokens,
        "training_s": round(history.elapsed_s, 1),
        "held_out_before": {str(depth): quality.to_json() for depth, quality in before.items()},
        "held_out_after": {str(depth): quality.to_json() for depth, quality in after.items()},
        "losses": history.losses,
        "measures": history.measures,
        **extra,
        "tools": {"shortstack": __version__, "torch": torch.__version__},
    }
    partial = out / ".report.partial"
    partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, out / "report.json")
    draw(history, out / "training.png", recipe)
    return report


def depth_lines(found: Mapping[int, DepthQuality], last: int) -> dict[str, float]:
    """Return what a picture shows of a measurement: each exit's agreement, and the accuracy of layer ``last``."""
    lines = {f"agreement at {depth}": quality.agreement for depth, quality in found.items() if depth != last}
    return lines | {"accuracy of the last layer": found[last].accuracy}
