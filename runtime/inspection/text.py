"""The report of `shortstack inspect` on a terminal, or as plain text in a file or pipe."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shortstack.runtime.inspection.report import Report
from shortstack.runtime.inspection.words import (
    facts,
    head_words,
    kv_lines,
    kv_owned_words,
    port_lines,
    precision_note,
    quantity,
    ranges,
    size,
)

_PIPE_WIDTH = 160  # nobody wraps a pipe; wide enough that no cell is folded
_COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red")


def print_report(report: Report, console: Console | None = None) -> None:
    """Print a report.

    Args:
        report: What to print.
        console: Where to; None is stdout.
    """
    console = console or Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, _PIPE_WIDTH)
    console.print(Text(report.folder, style="bold"), soft_wrap=True)
    console.print(_facts(report))
    sections = [
        ("Segments, bottom to top", _segments(report)),
        ("Exits (f: one draft step in plain steps, predicted from weight bytes read, not measured)", _exits(report)),
        ("Keys and values", _kv(report)),
        ("Inputs and outputs", _ports(report)),
        ("Files", _files(report)),
    ]
    for title, table in sections:
        if table.row_count:
            console.print()
            console.print(Text(title, style="bold"), soft_wrap=True)  # a table's own title is folded to its width
            console.print(table)
    note = precision_note(report)
    if note:
        console.print()
        console.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)


def _table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(
            column,
            header_style="dim",
            justify="right" if column in right else "left",
            no_wrap=column in ("file", "graph", "name"),  # what tells the rows apart stays whole
        )
    return table


def _facts(report: Report) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in facts(report):
        table.add_row(label, Text(value))
    return table


def _segments(report: Report) -> Table:
    right = ("parameters", "share", "graph", "cache/token")
    columns = ("file", "layers", "ends in", "KV owned", "KV borrowed", *right)
    table = _table(*columns, right=right)
    for segment in report.segments:
        table.add_row(
            Text(segment.file, style=_colour(segment.index)),
            ranges(range(segment.start, segment.end)),
            head_words(segment.head, report.spec.vocab_size),
            kv_owned_words(segment),
            ranges(segment.kv_borrowed),
            quantity(segment.parameters),
            f"{segment.parameter_share:.1%}",
            size(segment.graph_bytes),
            size(segment.cache_bytes_per_token),
        )
    return table


def _exits(report: Report) -> Table:
    right = ("layers run", "head rows", "head", "draft cost f")
    table = _table(*right, "stored as", "KV above", right=right)
    for head in report.exits:
        table.add_row(
            str(head.exit_layer),
            f"{head.rows:,}",
            size(head.weight_bytes),
            f"{head.draft_cost:.3f}",
            head.stored_as if head.owns_weights else f"the final head: {head.stored_as}",
            "none: KV-complete" if head.kv_complete else "filled by the segments above",
        )
    return table


def _kv(report: Report) -> Table:
    table = _table("owner", "in", "used by layers", "in")
    for line in kv_lines(report):
        table.add_row(
            line.words,
            Text(report.segments[line.segment].file, style=_colour(line.segment)),
            ranges(line.consumers) if line.consumers else "itself only" if len(line.owners) <= 1 else "each its own",
            ", ".join(report.segments[i].file for i in sorted({report.layers[j].segment for j in line.consumers})),
        )
    return table


def _ports(report: Report) -> Table:
    table = _table("graph", "", "name", "dtype", "shape")
    for segment in report.segments:
        file = segment.file
        for side, ports in (("in", segment.inputs), ("out", segment.outputs)):
            for label, line in zip([side] + [""] * len(ports), port_lines(ports), strict=False):
                table.add_row(Text(file, style=_colour(segment.index)), label, line.name, line.dtype, line.shape)
                file = ""
    return table


def _files(report: Report) -> Table:
    table = _table("name", "bytes", "", right=("bytes", ""))
    for name, count in report.files.items():
        table.add_row(Text(name), f"{count:,}", size(count))
    table.add_row(Text("total", style="bold"), f"{report.total_bytes:,}", Text(size(report.total_bytes), style="bold"))
    return table


def _colour(segment: int) -> str:
    return _COLOURS[segment % len(_COLOURS)]
