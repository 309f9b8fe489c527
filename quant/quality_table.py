"""The quality report as a table for people."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import get_args

from rich.console import Console
from rich.table import Table

from shortstack.graphs.origins import RELATIVE_TO, ErrorOf
from shortstack.quant.quality import Quality
from shortstack.quant.record import QuantizationRecord


def print_quality(quality: Quality, console: Console | None = None) -> None:
    """Print the report."""
    console = console or Console()
    before, after = quality.source, quality.result
    table = Table(box=None, pad_edge=False)
    for heading, justify in (("", "left"), ("source", "right"), ("quantized", "right"), ("", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    table.add_row(
        "size on disk, MB",
        *(f"{s.disk_bytes / 1e6:.1f}" for s in (before, after)),
        _ratio(after.disk_bytes, before.disk_bytes),
    )
    table.add_row(
        "peak RSS, MB",
        *(f"{s.peak_rss_bytes / 1e6:.0f}" for s in (before, after)),
        _ratio(after.peak_rss_bytes, before.peak_rss_bytes),
    )
    table.add_row(
        "perplexity",
        *(f"{s.perplexity:.4f}" for s in (before, after)),
        f"{after.perplexity / before.perplexity - 1:+.2%}",
    )
    limit = "" if quality.max_kl is None else f"asked: at most {quality.max_kl:g}"
    table.add_row("KL divergence, nats", "0", f"{quality.kl:.5f}", limit or f"99th percentile {quality.kl_p99:.4f}")
    table.add_row("same most likely token", "100%", f"{quality.top1:.2%}", "")
    same, count = sorted(quality.divergence), quality.continuation_tokens
    if same:
        equal = sum(n >= count for n in same)
        table.add_row(
            "greedy tokens before a fork",
            str(count),
            f"{same[len(same) // 2]} (median)",
            f"{equal} of {len(same)} texts stay equal; least {same[0]}",
        )
    for exit_layer in after.acceptance:
        table.add_row(
            f"drafts accepted, exit {exit_layer}",
            *(f"{s.acceptance.get(exit_layer, 0):.1%}" for s in (before, after)),
            "teacher-forced " + ", ".join(f"{s.exit_agreement.get(exit_layer, 0):.1%}" for s in (before, after)),
        )
    if after.acceptance:
        table.add_row("self-speculative = plain", "", "yes" if quality.is_exact else "[red]NO[/red]", "")
    console.print(table)
    formats = "; ".join(f"{count} x {words}" for words, count in quality.formats.items())
    preset = "unknown preset" if quality.preset is None else f"preset {quality.preset} ({quality.method})"
    console.print(f"{preset}: {formats or 'no matrix in blocks'}", highlight=False, markup=False)
    calibrated = quality.calibration or ("nothing" if quality.preset is not None else "an unknown text, if any")
    console.print(f"calibrated on {calibrated}; judged on {quality.heldout}", highlight=False, markup=False)
    for fate, count in quality.tuning.items():
        console.print(f"fine-tuning: {fate} in {count} matrices", highlight=False, markup=False)
    if quality.worst:
        console.print(f"largest errors: {_worst(quality.worst)}", highlight=False, markup=False)


def error_lines(record: QuantizationRecord) -> list[str]:
    """Return how large the errors of rounding are, where there is no report: a sentence for each kind of error."""
    found = []
    for kind in get_args(ErrorOf):
        errors = {name: error for name, error in record.errors.items() if record.error_of(name) == kind}
        if errors:
            worst = sorted(errors.items(), key=lambda item: -item[1])[:3]
            middle = statistics.median(errors.values())
            count = "1 matrix" if len(errors) == 1 else f"{len(errors)} matrices"
            found.append(
                f"rounded {count} ({record.method}): {middle:.2%} off {RELATIVE_TO[kind]} in the middle; largest: "
                + ", ".join(f"{_short(name)} {error:.2%}" for name, error in worst)
            )
    return found


def _worst(worst: Sequence[tuple[str, float, ErrorOf | None]]) -> str:
    """Return errors by what they are of: ``lm_head 2.1% off the float outputs on ...; ...``."""
    kinds: dict[ErrorOf | None, list[str]] = {}
    for name, error, kind in worst:
        kinds.setdefault(kind, []).append(f"{_short(name)} {error:.2%}")
    return "; ".join(f"{', '.join(found)} off {RELATIVE_TO[kind]}" for kind, found in kinds.items())


def _short(name: str) -> str:
    return name.removesuffix(".weight")


def search_lines(record: QuantizationRecord) -> list[str]:
    """Return what the search of ``--max-kl`` reached and chose, in one sentence; nothing without a search."""
    if (found := record.search) is None:
        return []
    chosen = ", ".join(f"{count} {name}" for name, count in found.matrices.items())
    return [
        f"searched mix: KL divergence {found.kl:.2g} nats per token (asked: at most {record.max_kl:g}), on the last "
        f"{found.tokens} tokens of the calibration text; matrices: {chosen}"
    ]


def tuning_lines(tuning: Mapping[str, int]) -> list[str]:
    """Return what became of a fine-tuning that rounding would have erased, a sentence for each fate.

    Args:
        tuning: Number of matrices by fate.
    """
    found = []
    if kept := tuning.get("kept", 0):
        found.append(
            f"note: fine-tuned from a quantized file: side products of {kept} matrices keep what was changed, which "
            "rounding would have erased"
        )
    if risk := tuning.get("at risk", 0):
        found.append(
            f"warning: fine-tuned from a quantized file: in {risk} matrices changes smaller than half a step are in no "
            "side product; off the grid of the file they survive on average only: try the model on its own task, or "
            "take --preset int8"
        )
    return found


def _ratio(after: float, before: float) -> str:
    return f"{after / before:.3f}x" if before else ""
