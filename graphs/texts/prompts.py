"""The prompts that ship with shortstack, written for it: short, of several kinds. For parity checks and benchmarks."""

from __future__ import annotations

import json

from shortstack.graphs.texts import PROMPTS_FILE


def prompts(count: int | None = None) -> list[str]:
    """Return the first ``count`` prompts, taking the kinds in turn; None returns all."""
    by_kind: dict[str, list[str]] = {}
    for line in PROMPTS_FILE.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by_kind.setdefault(row["kind"], []).append(row["prompt"])
    longest = max(map(len, by_kind.values()))
    mixed = [kind[index] for index in range(longest) for kind in by_kind.values() if index < len(kind)]
    return mixed[:count]
