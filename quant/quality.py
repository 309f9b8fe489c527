"""How a quantized bundle compares with its source: the figures, as they are stored in the bundle's quality.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from shortstack.graphs.origins import ErrorOf


@dataclass(frozen=True, slots=True)
class Side:
    """One bundle's figures.

    Attributes:
        weights_sha256: Of its weights.data: what was measured.
        disk_bytes: All its files but such a report.
        peak_rss_bytes: Largest resident memory of a fresh process that loads it and decodes some tokens; 0 where the
            system does not tell.
        perplexity: exp of the mean negative log likelihood of the held-out tokens, in nats.
        exit_agreement: By depth: share of held-out positions where the exit's most likely token is the final head's.
        acceptance: By depth: share of drafted tokens accepted, greedy self-speculation on the prompts.
    """

    weights_sha256: str
    disk_bytes: int
    peak_rss_bytes: int
    perplexity: float
    exit_agreement: Mapping[int, float]
    acceptance: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Quality:
    """The report.

    Attributes:
        preset: Its name; None where the bundle does not say how it was quantized.
        method: How weights were rounded; None where the bundle does not say.
        formats: Number of matrices by format.
        calibration: File and tokens; None without calibration.
        heldout: File and tokens.
        source: The bundle before.
        result: The bundle after.
        kl: Mean over held-out positions of KL(source || result), nats.
        kl_p99: Its 99th percentile.
        top1: Share of held-out positions with the same most likely token.
        divergence: For each prompt, how many greedy tokens are the same before the first that differs.
        continuation_tokens: Length of each greedy continuation.
        is_exact: Whether self-speculation through the result gave the tokens of plain decoding, all prompts and exits.
        worst: The matrices with the largest errors, worst first: name, error, and what it is of.
        max_kl: What ``--max-kl`` asked for; None without it.
        tuning: Number of matrices with a fine-tuning that rounding would have erased, by what became of it: ``kept`` in
            side products, or ``at risk``.
    """

    preset: str | None
    method: str | None
    formats: Mapping[str, int]
    calibration: str | None
    heldout: str
    source: Side
    result: Side
    kl: float
    kl_p99: float
    top1: float
    divergence: tuple[int, ...]
    continuation_tokens: int
    is_exact: bool
    worst: tuple[tuple[str, float, ErrorOf | None], ...]
    max_kl: float | None = None
    tuning: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-ready data; the preset stands under its older name, ``recipe``."""
        return {"recipe" if name == "preset" else name: value for name, value in asdict(self).items()}

    def content(self) -> bytes:
        """Return the content of quality.json."""
        return (json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n").encode()
