"""The report as one HTML page that loads nothing: style and charts are inline, no script.

The page is ``exit_report.html.jinja`` next to this file. A model's text is hostile: jinja2 escapes every value, and
characters that would steer the page's own text (directions, controls) are written out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import jinja2

from shortstack.graphs.errors import RequestError
from shortstack.graphs.write_file import write_whole
from shortstack.runtime.commands.exit_report import drawing
from shortstack.runtime.commands.exit_report.report import BUCKETS, ExitReport, ReportToken, spread_of
from shortstack.runtime.commands.exit_report.spread import Spread, speed_words
from shortstack.runtime.commands.show import FinishedRun
from shortstack.runtime.decode.step import Stats
from shortstack.runtime.early_exit.policy import KVPolicy, Verify
from shortstack.runtime.inspection.words import layers as range_words
from shortstack.runtime.inspection.words import printable, short_hash

_TEMPLATE = "exit_report.html.jinja"
_NONE = "-"
_VERIFY_WORDS: dict[Verify, str] = {
    "none": "a token that leaves is final",
    "rollback": "the whole model sees each token before it is final",
    "exact": "the whole model decides each token",
}
_KV_WORDS: dict[KVPolicy, str] = {
    "flush": "fill their cache in one run over all waiting tokens",
    "pipeline": "fill their cache on threads of their own",
    "auto": "fill their cache in one run or on threads of their own, whichever is faster",
    "recompute": "fill their cache in a run that repeats the layers below",
}
_JOINERS = re.compile("([\u200c\u200d])")  # they shape the letters next to them, and move nothing


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
        "speed": speed_words,
        "times": _times,
        "range_times": lambda spread: spread.range_words(_times),
        "range_speed": lambda spread: spread.range_words(speed_words),
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
        circumstances=circumstances(report),
    )


def write_page(report: ExitReport, path: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        RequestError: The file cannot be written.
    """
    write_whole(path, render_page(report).encode(), RequestError, f"--report {path}")


def visible(text: str) -> str:
    """Return a model's text with controls and directions written out; tabs and letter joiners stay."""
    parts = _JOINERS.split(text)
    return "".join(part if _JOINERS.fullmatch(part) else "\t".join(map(printable, part.split("\t"))) for part in parts)


def tip(report: ExitReport, marked: ReportToken) -> str:
    """Return what the page shows about a token on hover."""
    token = marked.token
    depth = f"after {token.exit_layer} of {report.layers} layers"
    if token.exit_layer == report.layers:
        depth = f"by the whole model, {report.layers} layers"
    lines = [f"“{printable(token.text)}” {depth}", f"confidence {token.confidence:.3f} · {token.pending} pending"]
    lines.append(f"token {marked.position}, id {token.id}" + ("" if token.text else ", no text of its own"))
    if not marked.is_shared:
        lines.append("not in the other text")
    return "\n".join(lines)


def _times(value: float) -> str:
    return f"{value:.2f}x"


def _hundredths(value: float) -> str:
    return f"{value:.2f}"


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure; ``between`` is the range over the runs, empty where all give the same."""

    value: str
    between: str = ""

    @classmethod
    def of(cls, spread: Spread, number: Callable[[float], str]) -> Cell:
        """Put what varies between runs into words."""
        return cls(number(spread.median), spread.range_words(number))


def figures(report: ExitReport) -> list[tuple[str, Cell, Cell]]:
    """Return the table of figures: what, with early exit, plainly."""
    early, plain = report.early, report.plain
    lowest, highest, layers = report.exit_layers[0], report.exit_layers[-1], report.layers
    none = Cell("-")

    def same(label: str, figure: Callable[[FinishedRun], str]) -> tuple[str, Cell, Cell]:
        return label, Cell(figure(early[0])), Cell(figure(plain[0]))

    def varying(label: str, figure: Callable[[Stats], float], number: Callable[[float], str]) -> tuple[str, Cell, Cell]:
        return label, Cell.of(spread_of(early, figure), number), Cell.of(spread_of(plain, figure), number)

    def seconds(runs: Sequence[FinishedRun], figure: Callable[[Stats], float]) -> Cell:
        return Cell.of(spread_of(runs, figure), _hundredths)

    return [
        same("tokens", lambda run: str(run.stats.emitted)),
        same("ended by", lambda run: run.finish_reason),
        varying("tokens/s", lambda stats: stats.tokens_per_s, speed_words),
        ("time to first token, ms", _first_token(early), _first_token(plain)),
        same("mean layers before the decision", lambda run: f"{run.stats.mean_exit_layer:.2f}"),
        same("left early", lambda run: f"{run.exited_share:.1%}"),
        same(f"runs of {range_words(highest, layers)}", lambda run: str(run.stats.verify_runs)),
        (f"seconds in {range_words(0, lowest)}", seconds(early, lambda stats: stats.draft_s), none),
        (f"seconds in {range_words(lowest, layers)}", seconds(early, lambda stats: stats.verify_s), none),
        ("seconds in all layers at once", none, seconds(plain, lambda stats: stats.draft_s + stats.verify_s)),
    ]


def _first_token(runs: Sequence[FinishedRun]) -> Cell:
    """Return the time to the first token; runs that found their prompt in the cache do not count."""
    fresh = [run for run in runs if not run.stats.reused]
    if not fresh:
        return Cell("-")
    return Cell.of(spread_of(fresh, lambda stats: stats.first_token_s * 1e3), lambda value: f"{value:.0f}")


def settings(report: ExitReport) -> list[tuple[str, str]]:
    """Return how tokens left, in words."""
    policy, profile = report.policy, report.profile
    below = (
        f"; what it gives a probability below {policy.takes_back_below:g} is taken back"
        if policy.verify == "rollback"
        else ""
    )
    rows = [
        ("a token leaves", f"at the first exit where {policy.criterion}"),
        ("exits", f"after {', '.join(map(str, report.exit_layers))} of {report.layers} layers"),
        ("verification", f"{policy.verify}: {_VERIFY_WORDS[policy.verify]}{below}"),
        ("the layers above", f"{policy.kv_policy}: {_KV_WORDS[policy.kv_policy]}"),
        ("waiting for them", "as many tokens as measured costs suggest" if policy.max_pending is None
         else f"at most {policy.max_pending} tokens"),
        ("prompt", "may leave early" if policy.prefill_exit else "runs through all layers"),
    ]  # fmt: skip
    if profile is not None:
        rows.append(
            (
                "calibrated",
                f"{profile.name}: mean {profile.loss} loss at most {profile.delta:g} with probability "
                f"{1 - profile.epsilon:g}, over {profile.prompts} prompts",
            )
        )
    return rows


def circumstances(report: ExitReport) -> list[tuple[str, str]]:
    """Return when, where and with what the figures were measured."""
    found = report.circumstances
    return [
        ("date", f"{found.made_at:%Y-%m-%d %H:%M} UTC"),
        ("processor", found.processor),
        ("threads", "a pool for each graph" if found.threads is None else str(found.threads)),
        ("system", found.system),
        ("versions", ", ".join(f"{name} {version}" for name, version in found.versions.items())),
        ("bundle", f"{report.source_name}; {found.precision}"),
        ("weights", f"sha256 {short_hash(found.weights_sha256)}"),
        ("prompts", "1, decoded greedily"),
        ("runs", f"{len(report.early)} with early exit and {len(report.plain)} plain, in turns"),
    ]
