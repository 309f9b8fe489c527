"""Types and functions that the tests of bad input share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Refused = Callable[..., str]
MAX_LENGTH = 64


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
