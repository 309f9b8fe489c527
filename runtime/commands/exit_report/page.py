"""The report as one HTML page that loads nothing: style and charts are inline, no script.

The page is ``exit_report.html.jinja`` beside this file. A model's text is hostile: jinja2 escapes every value, and
characters that would steer the page's own text (directions, controls) are written out.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import jinja2

from shortstack.runtime.commands.exit_report import drawing
from shortstack.runtime.commands.exit_report.report import BUCKETS, ExitReport, ReportToken
from shortstack.runtime.inspection.whole_file import write_whole
from shortstack.runtime.inspection.words import printable

_TEMPLATE = "exit_report.html.jinja"
_JOINERS = re.compile("([\u200c\u200d])")  # they shape what stands beside them, and move nothing


def render_page(report: ExitReport) -> str:
    """Return the page."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "printable": printable,
        "visible": visible,
        "coordinate": lambda value: f"{value:.2f}".rstrip("0").rstrip("."),
        "percent": lambda share: f"{share:.0%}",
    }
    source = resources.files("shortstack.runtime.commands.exit_report").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source).render(
        report=report,
        buckets=range(BUCKETS),
        histogram=drawing.draw_histogram(report),
        depths=drawing.draw_depths(report),
        curves=[drawing.draw_depth_curve(report), drawing.draw_speed_curve(report)] if report.sweep else [],
        tip=lambda token: tip(report, token),
        figures=figures(report),
        settings=settings(report),
    )


def write_page(report: ExitReport, path: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        RequestError: The file cannot be written.
    """
    write_whole(render_page(report), path, "--report")


def visible(text: str) -> str:
    """Return a model's text with controls and directions written out; tabs and letter joiners stay."""
    parts = _JOINERS.split(text)
    return "".join(part if _JOINERS.fullmatch(part) else "\t".join(map(printable, part.split("\t"))) for part in parts)


def tip(report: ExitReport, marked: ReportToken) -> str:
    """Return what is said of a token on hover."""
    token = marked.token
    depth = f"after {token.exit_layer} of {report.layers} layers"
    if token.exit_layer == report.layers:
        depth = f"by the whole model, {report.layers} layers"
    lines = [f"“{printable(token.text)}” {depth}", f"confidence {token.confidence:.3f} · {token.pending} pending"]
    lines.append(f"token {marked.position}, id {token.id}" + ("" if token.text else ", no text of its own"))
    if not marked.is_shared:
        lines.append("not in the other text")
    return "\n".join(lines)


def figures(report: ExitReport) -> list[tuple[str, str, str]]:
    """Return the table of figures: what, with early exit, plainly."""
    early, plain = report.early, report.plain

    def row(label: str, *cells: str) -> tuple[str, str, str]:
        return label, cells[0], cells[1]

    pairs = [(one, one.stats) for one in (early, plain)]
    speeds = (report.early_tokens_per_s, report.plain_tokens_per_s)
    return [
        row("tokens", *(str(stats.emitted) for _, stats in pairs)),
        row("ended by", *(one.finish_reason for one, _ in pairs)),
        row("tokens/s", *(f"{speed:.1f}" for speed in speeds)),
        row("time to first token, ms", *(f"{stats.first_token_s * 1e3:.0f}" for _, stats in pairs)),
        row("mean exit depth, layers", *(f"{stats.mean_exit_layer:.2f}" for _, stats in pairs)),
        row("left early", *(f"{one.exited_share:.1%}" for one, _ in pairs)),
        row("runs of the highest segment", *(str(stats.verify_runs) for _, stats in pairs)),
        row(
            "seconds in the lowest segment",
            *(f"{one.stats.draft_s:.2f}" if one.exited_share else "-" for one, _ in pairs),
        ),
        row("seconds in those above", *(f"{stats.verify_s:.2f}" for _, stats in pairs)),
    ]


def settings(report: ExitReport) -> list[tuple[str, str]]:
    """Return how tokens left, in words."""
    policy, profile = report.policy, report.profile
    rows = [
        ("leaves where", str(policy.criterion)),
        ("exits", f"after {', '.join(map(str, report.exit_layers))} of {report.layers} layers"),
        ("verified", policy.verify + (f", below {policy.rollback_below:g}" if policy.verify == "rollback" else "")),
        ("caches filled by", policy.kv_policy),
        ("pending at most", "as measured costs say" if policy.max_pending is None else str(policy.max_pending)),
        ("prompt", "may leave early" if policy.prefill_exit else "runs through all layers"),
    ]
    if profile is not None:
        rows.append(
            (
                "calibrated",
                f"{profile.name}: mean {profile.loss} loss at most {profile.delta:g} with probability "
                f"{1 - profile.epsilon:g}, over {profile.prompts} prompts",
            )
        )
    return rows
