"""Runs of the recipes on a task that a tiny model learns in a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

from shortstack.export.twin.folder import load_twin
from shortstack.samples.recipes.training import loop

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


def stopped_and_resumed(
    command: click.Command, checkpoint: Path, folder: Path, kill_at: int, *arguments: object
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a recipe to its end in ``folder/whole``; kill another run right after it saved step ``kill_at``, and go on.

    Returns:
        Both reports; the other run is in ``folder/stopped``.
    """
    whole = call(command, checkpoint, folder / "whole", *arguments)
    save = loop.save_state

    def killed(file: Path, step: int, *rest: Any) -> None:
        save(file, step, *rest)
        if step == kill_at:
            raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_state", killed)
        with pytest.raises(KilledError):
            call(command, checkpoint, folder / "stopped", *arguments)
    assert not (folder / "stopped" / "report.json").exists()
    return whole, call(command, checkpoint, folder / "stopped", *arguments)


def assert_resumes(command: click.Command, checkpoint: Path, folder: Path, kill_at: int, *arguments: object) -> None:
    """A run that is killed right after it saved step ``kill_at`` goes on to the weights of one that was not."""
    stopped_and_resumed(command, checkpoint, folder, kill_at, *arguments)
    whole, stopped = (load_twin(str(folder / name / "model")).state_dict() for name in ("whole", "stopped"))
    for name, value in whole.items():
        assert torch.equal(value, stopped[name]), name


def options(data: Path, steps: int = 6) -> list[object]:
    """Return the options of a short run."""
    templates = ["--prompt", "{say}\\n", "--completion", "{said}"]
    return ["--data", data, *templates, "--steps", steps, "--batch-size", 8, "--held-out-rows", 6, "--lr", 1e-3]
