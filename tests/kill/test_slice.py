"""A fixed slice of ``python -m tests.kill``: commands that are killed leave nothing half-written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def test_killed_commands_leave_nothing_half_written_and_run_again_to_the_same_bytes(repository: Path) -> None:
    chosen = ["--command", "export --overwrite", "--command", "calibrate", "--command", "self_data"]
    command = [sys.executable, "-m", "tests.kill", "--kills", "3", "--seed", "1", *chosen]
    finished = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    kills = [int(count) for count in re.findall(r"(\d+) kills in", finished.stdout)]
    assert len(kills) == 3
    assert sum(kills) > 3, "most of them ended before they were killed"
    assert finished.stdout.endswith("0 faults, seed 1\n")
