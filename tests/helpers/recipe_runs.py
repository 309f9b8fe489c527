"""Runs of the recipes on a task that a tiny model learns in a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner

WORDS = ("red", "green", "blue", "stone", "river", "cloud")
TRAINED_LOGITS = 5e-4
"""Bundle against twin after training, float32; tiny models' logits reach 10. Measured: at most 4e-5."""


class KilledError(Exception):
    """Stands for a kill."""


def write_words(folder: Path) -> Path:
    """Write the task: say two words again, the second one first."""
    file = folder / "words.jsonl"
    rows = [{"say": f"{a} {b}", "said": f"[{b} {a}]"} for a in WORDS for b in WORDS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def call(command: click.Command, *arguments: object) -> dict[str, Any]:
    """Run a recipe and return its report."""
    result = CliRunner().invoke(command, [str(a) for a in arguments] + ["--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def options(data: Path, steps: int = 6) -> list[object]:
    """Return the options of a short run."""
    templates = ["--prompt", "{say}\\n", "--completion", "{said}"]
    return ["--data", data, *templates, "--steps", steps, "--batch-size", 8, "--held-out-rows", 6, "--lr", 1e-3]
