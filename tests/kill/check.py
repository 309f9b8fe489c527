"""What must hold after a kill: what has its final name is whole, and a second run ends as the first would have."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container
from pathlib import Path

from safetensors import safe_open

from shortstack.graphs.bundle import open_bundle


def half_written(folder: Path) -> list[str]:
    """Return what is wrong with the files of a folder that have their final names; hidden ones are not finished."""
    wrong: list[str] = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts):
            continue
        try:
            if path.name == "bundle.json":
                open_bundle(path.parent, verify_hashes=True)
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="np") as file:
                    list(file.keys())
            elif path.name == "weights.data" and not (path.parent / "bundle.json").is_file():
                wrong.append(f"{relative} without bundle.json")
        except Exception as error:
            wrong.append(f"{relative}: {error}")
    return wrong


def snapshot(folder: Path, volatile: Container[str]) -> dict[str, str]:
    """Return the hash of every file, hidden ones included; of volatile ones only that they are there."""
    return {
        str(path.relative_to(folder)): "" if path.name in volatile else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def differences(found: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """Return how two snapshots differ."""
    return [
        *(f"{name} is missing" for name in wanted.keys() - found.keys()),
        *(f"{name} is left over" for name in found.keys() - wanted.keys()),
        *(f"{name} has other bytes" for name in found.keys() & wanted.keys() if found[name] != wanted[name]),
    ]
