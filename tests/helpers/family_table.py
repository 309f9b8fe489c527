"""The table of docs/families.md: which check passes for which family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

PAGE = Path("docs/families.md")
PASSES, FAILS = "yes", "no"
_BEGIN, _END = "<!-- the table, written by python -m tests.families -->", "<!-- the end of the table -->"


def read_table(repository: Path) -> dict[str, dict[str, str]]:
    """Return the cells of each row, by what people call the family and then by the heading of the column."""
    lines = _parts(repository)[1].strip().splitlines()
    headings = _cells(lines[0])
    rows = [dict(zip(headings, _cells(line), strict=True)) for line in lines[2:]]
    return {row["family"]: row for row in rows}


def write_table(repository: Path, rows: Mapping[tuple[str, str], Mapping[str, bool]]) -> None:
    """Write the table.

    Args:
        repository: The root of the checkout.
        rows: Which check passes, by its heading, for each family: what people call it, and its model_type.
    """
    before, _, after = _parts(repository)
    headings = ["family", "`model_type`", *next(iter(rows.values()))]
    lines = [_line(headings), _line(["---"] * len(headings))]
    for (name, model_type), passes in rows.items():
        lines.append(_line([name, f"`{model_type}`", *(PASSES if passed else FAILS for passed in passes.values())]))
    table = "\n".join(lines)
    (repository / PAGE).write_text(f"{before}{_BEGIN}\n\n{table}\n\n{_END}{after}", encoding="utf-8")


def _parts(repository: Path) -> tuple[str, str, str]:
    before, rest = (repository / PAGE).read_text(encoding="utf-8").split(_BEGIN)
    table, after = rest.split(_END)
    return before, table, after


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
