"""What a KV-complete exit gives: a map that is complete at half depth against the plain model, both cut there.

The models were trained with an exit above fewer layers. At this depth each gets a linear exit of its own, fitted in
closed form to what the model itself predicts on the task's rows, the model left as it is.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec
from shortstack.graphs.kv_map import complete_from
from shortstack.graphs.plan import ExitSpec
from shortstack.samples.recipes.training.draft_cost import ROW_COSTS, Costs
from shortstack.samples.recipes.training.exit_loss import ExitLossSpec
from shortstack.samples.recipes.training.exit_tuning import ExitWeights, TuningSpec, hold_out, tune
from shortstack.samples.recipes.training.source import open_source
from shortstack.samples.showcase.kv_sharing_runs import PLAIN, RunsSpec, task_rows
from shortstack.samples.showcase.kv_sharing_speed import SpeedSpec, measure_speed

_ROWS = 2000  # a linear map of some ten thousand numbers needs no more


def measure_complete_exits(
    out: Path, spec: RunsSpec, speed: SpeedSpec, text: list[int], questions: list[str]
) -> dict[str, dict[str, Any]]:
    """Fit exits, export and time the first seed's models that are KV-complete at half depth or below.

    Args:
        out: The folder, with its models.
        spec: What was trained.
        speed: What is timed.
        text: Token ids to cut prompts from.
        questions: Prompts for drafts.

    Returns:
        By depth, written as a string, by map what :func:`measure_speed` says, with the plain model cut there for
        reference; and ``agreement``: how often the exit's most likely token is that of the whole model.
    """
    found: dict[str, dict[str, Any]] = {}
    depths = {name: complete_from(kv_map) for name, kv_map in spec.maps().items()}
    for depth in sorted({depth for depth in depths.values() if depth <= spec.layers // 2}):
        names = [PLAIN, *(name for name, complete in depths.items() if complete == depth)]
        bundles, agreement = {}, {}
        for name in names:
            exits = out / "exits" / f"{name}-{depth}"
            agreement[name] = _fit(out, spec, name, depth, exits)
            bundles[name] = out / "bundles" / f"{name}-{depth}"
            model = str(out / "models" / f"{name}-0")
            export_bundle(ExportSpec(model, bundles[name], exits=exits, overwrite=True))
        found[str(depth)] = measured = measure_speed(bundles, text, questions, speed, PLAIN)
        for name in names:
            measured[name]["agreement"] = agreement[name]
    return found


def _fit(out: Path, spec: RunsSpec, name: str, depth: int, exits: Path) -> float:
    """Fit an exit; return how often it agrees with the model on rows that it was not fitted to."""
    torch.manual_seed(0)
    source = open_source(str(out / "models" / f"{name}-0"), from_scratch=False)
    rows = task_rows(out, spec, source.tokenizer, source.end)[:_ROWS]
    shutil.rmtree(exits, ignore_errors=True)
    recipe = TuningSpec(
        exits=(ExitSpec(depth, branch="linear", norm="final"),),
        start="copy",
        loss=ExitLossSpec(),
        weights=ExitWeights((1.0,), 1.0, 0, "linear"),
        batch_size=1,
        drafts=1,
        costs=Costs(ROW_COSTS),
    )
    report = tune(source, rows, hold_out(rows, out), recipe, None, exits, {"model": name, "depth": depth})
    shutil.rmtree(exits / "features")
    return float(report["held_out_after"][str(depth)]["agreement"])
