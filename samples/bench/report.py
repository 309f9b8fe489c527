"""The one table: what was measured, what came out, what was aimed at; and the machine it was measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shortstack import __version__

_MIN_WIDTH = 140


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        what: What was measured.
        value: The median the goal is about; None when the line is text only.
        shown: The value as it is printed.
        goal: What it should be, such as ``>= 1.0``; empty without one.
        is_met: Whether it is; None without a goal.
    """

    what: str
    shown: str
    value: float | None = None
    goal: str = ""
    is_met: bool | None = None


def at_least(what: str, value: float, shown: str, bound: float) -> Row:
    """Return a row whose value should not be below the bound."""
    return Row(what, shown, value, f">= {bound:g}", value >= bound)


def at_most(what: str, value: float, shown: str, bound: float) -> Row:
    """Return a row whose value should not be above the bound."""
    return Row(what, shown, value, f"<= {bound:g}", value <= bound)


@dataclass(frozen=True, slots=True)
class Section:
    """Rows under one heading."""

    title: str
    rows: tuple[Row, ...]


def progress(what: str) -> None:
    """Say on stderr what runs now."""
    click.echo(f"measuring {what} ...", err=True)


def machine() -> dict[str, Any]:
    """Return what the numbers were measured on: CPU, cores, load when the benchmark started, versions."""
    packages = ("onnxruntime", "numpy", "tokenizers", "onnx-ir")
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "shortstack": __version__,
        **{name: _version(name) for name in packages},
    }


def print_report(facts: Mapping[str, Any], sections: Sequence[Section]) -> None:
    """Print facts and table on stdout."""
    console = Console(highlight=False)
    console.width = max(console.width, _MIN_WIDTH)  # a pipe has none of its own
    for name, value in facts.items():
        console.print(Text(f"{name.replace('_', ' ')}: ", "dim"), Text(str(value)), sep="", soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column()
    table.add_column("median [quartiles]", justify="right")
    table.add_column("goal", justify="right")
    table.add_column()
    for section in sections:
        table.add_row(Text(section.title, "bold"))
        for row in section.rows:
            verdict = {None: Text(), True: Text("yes", "green"), False: Text("NO", "red")}[row.is_met]
            table.add_row(f"  {row.what}", row.shown, row.goal, verdict)
    console.print(table)


def to_json(facts: Mapping[str, Any], sections: Sequence[Section]) -> dict[str, Any]:
    """Return facts and table as JSON-ready data."""
    return {**facts, "sections": [asdict(section) for section in sections]}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
