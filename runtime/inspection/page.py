"""The report of `shortstack inspect` as one HTML page that loads nothing: style and picture are inline, no script.

The page is ``page.html.jinja`` next to this file; every value is escaped by jinja2.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import jinja2

from shortstack.graphs.errors import RequestError
from shortstack.graphs.write_file import write_whole
from shortstack.runtime.inspection import words as words
from shortstack.runtime.inspection.picture import SEGMENT_COLOURS, draw_stack, segment_css
from shortstack.runtime.inspection.report import Report

_TEMPLATE = "page.html.jinja"


@dataclass(frozen=True, slots=True)
class Share:
    """One part of weights.data: a piece of the stacked bar."""

    label: str
    bytes: int
    css: str


def render_html(report: Report) -> str:
    """Return the page."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "size": words.size,
        "quantity": words.quantity,
        "ranges": words.ranges,
        "printable": words.printable,
        "port_lines": words.port_lines,
        "kv_lines": words.kv_lines,
        "kv_owned": words.kv_owned_words,
        "segment_css": segment_css,
        "coordinate": lambda value: f"{value:.2f}".rstrip("0").rstrip("."),
    }
    picture = draw_stack(report)
    source = resources.files("shortstack.runtime.inspection").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source).render(
        report=report,
        spec=report.spec,
        picture=picture,
        is_cut_short=any(mark.css == "break" for mark in picture.marks),
        facts=words.facts(report),
        shares=_shares(report),
        head_words=words.head_words,
        note=words.precision_note(report),
        shared_kv=[layer for layer in report.layers if layer.consumers],
        segment_colours=range(SEGMENT_COLOURS),
    )


def write_html(report: Report, path: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        RequestError: The file cannot be written.
    """
    write_whole(path, render_html(report).encode(), RequestError, f"--html {path}")


def _shares(report: Report) -> list[Share]:
    weights = report.weights
    layers = [
        Share(
            words.layers(segment.start, segment.end),
            sum(layer.weight_bytes for layer in report.layers[segment.start : segment.end]),
            segment_css(segment.index),
        )
        for segment in report.segments
    ]
    embedding = "embedding and LM head (tied)" if report.spec.tie_word_embeddings else "embedding"
    parts = [
        Share(embedding, weights.embedding, "table"),
        *layers,
        Share("LM head", weights.lm_head, "table"),
        Share("what exits have of their own", weights.draft_heads, "exit"),
        Share("a drafter", weights.drafter, "exit"),
        Share("rotary tables, final norm", weights.other, "other"),
    ]
    return [part for part in parts if part.bytes]
