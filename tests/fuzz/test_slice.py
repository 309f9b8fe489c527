"""A fixed slice of ``python -m tests.fuzz``: no damaged input ends in a fault, and neither are all refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

INPUTS = 90  # five for each target


def test_damaged_inputs_are_refused_in_one_line_or_right(repository: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--inputs", str(INPUTS), "--seed", "1", "--json"]
    finished = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    report = json.loads(finished.stdout)
    assert report["faults"] == []
    assert finished.returncode == 0, finished.stderr
    ends = [
        verdict for counted in report["counts"].values() for verdict, count in counted.items() for _ in range(count)
    ]
    assert len(ends) == INPUTS
    assert ends.count("refused") > INPUTS // 5
    assert ends.count("right") > INPUTS // 5
