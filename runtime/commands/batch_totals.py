"""What `shortstack batch` counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Totals:
    """What a batch did.

    Attributes:
        answers: Lines that were answered.
        failed: Lines that were not.
        tokens: Tokens of all answers.
        drafted: Tokens drafted.
        accepted: Those of them that the whole model agreed with.
        drafted_by: Tokens drafted by each source.
        accepted_by: Those of them that the whole model agreed with.
        exits: Tokens by the number of layers run to predict them.
        elapsed_s: Seconds from the first prompt to the last token.
        rows_per_run: Rows in a run of the uppermost layers; None where sequences run one by one, or elsewhere.
    """

    answers: int = 0
    failed: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    drafted_by: dict[str, int] = field(default_factory=dict)
    accepted_by: dict[str, int] = field(default_factory=dict)
    exits: dict[int, int] = field(default_factory=dict)
    elapsed_s: float = 0.0
    rows_per_run: float | None = None

    def count(self, stats: Mapping[str, Any]) -> None:
        """Count one finished generation, by :meth:`Stats.to_json`, whose depths may have become text."""
        self.answers += 1
        self.tokens += stats["emitted"]
        self.drafted += stats["drafted"]
        self.accepted += stats["accepted"]
        for own, name in ((self.drafted_by, "drafted_by"), (self.accepted_by, "accepted_by")):
            for source, count in stats[name].items():
                own[source] = own.get(source, 0) + count
        for depth, count in stats["exits"].items():
            self.exits[int(depth)] = self.exits.get(int(depth), 0) + count

    def to_json(self) -> dict[str, Any]:
        """Return them as JSON-ready data."""
        return {
            "answers": self.answers,
            "failed": self.failed,
            "tokens": self.tokens,
            "elapsed_s": self.elapsed_s,
            "tokens_per_s": self.tokens / self.elapsed_s if self.elapsed_s else 0.0,
            "rows_per_run": self.rows_per_run,
            "acceptance": self.accepted / self.drafted if self.drafted else None,
            "drafted_by": self.drafted_by,
            "accepted_by": self.accepted_by,
            "exits": {str(depth): count for depth, count in sorted(self.exits.items())},
        }

    def line(self) -> str:
        """Return them as one line."""
        speed = self.tokens / self.elapsed_s if self.elapsed_s else 0.0
        parts = [f"{self.answers} answers, {self.tokens} tokens, {speed:.1f} tokens/s"]
        if self.rows_per_run:
            parts.append(f"{self.rows_per_run:.1f} rows per run")
        if self.drafted:
            parts.append(f"acceptance {self.accepted / self.drafted:.0%}")
        if len(self.exits) > 1:
            shares = ", ".join(f"{depth}: {count / self.tokens:.0%}" for depth, count in sorted(self.exits.items()))
            parts.append(f"decided after layers {shares}")
        if self.failed:
            parts.append(f"{self.failed} failed")
        return "; ".join(parts)
