"""How a generation looks in a terminal: streamed text with accepted drafts coloured, and one table of figures."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shortstack.runtime.step import Stats
from shortstack.runtime.stream import FinishReason, Stream

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

ACCEPTED_COLOUR = "green"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


@dataclass(frozen=True, slots=True)
class Shown:
    """One finished generation and what to say about it.

    Attributes:
        strategy: How it was decoded.
        text: The text.
        token_ids: Its token ids.
        finish_reason: Why it ended.
        stats: Counts and times.
        peak_rss_bytes: Largest resident memory of the process so far.
    """

    strategy: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats
    peak_rss_bytes: int

    @property
    def is_cancelled(self) -> bool:
        """Whether it was ended from outside, so that its length says nothing."""
        return self.finish_reason == "cancelled"

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        return {
            "strategy": self.strategy,
            "text": self.text,
            "tokens": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "stats": self.stats.to_json(),
            "peak_rss_bytes": self.peak_rss_bytes,
        }


def peak_rss_bytes() -> int:
    """Return the process's largest resident memory so far; 0 where the system does not tell."""
    with contextlib.suppress(OSError):  # Linux; what getrusage says there starts at the size of the parent process
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def show_stream(strategy: str, stream: Stream, *, is_quiet: bool, has_title: bool) -> Shown:
    """Run a generation to its end, printing text as it becomes certain; Ctrl-C ends it and keeps what there is."""
    if has_title and not is_quiet:
        legend = click.style(" (drafted and accepted)", fg=ACCEPTED_COLOUR) if strategy != "plain" else ""
        click.echo(click.style(strategy, bold=True) + legend)
    try:
        for token in stream:
            if token.text and not is_quiet:
                _print_piece(token.text, token.from_draft)
    except KeyboardInterrupt:
        stream.close()
    if not is_quiet:
        click.echo("\n" if has_title else "")
    assert stream.finish_reason is not None
    return Shown(strategy, stream.text, tuple(stream.token_ids), stream.finish_reason, stream.stats, peak_rss_bytes())


def _print_piece(text: str, from_draft: bool) -> None:
    """Print text to a file as it is; to a terminal in colour, without control characters that would steer it."""
    if not sys.stdout.isatty():
        click.echo(text, nl=False)
        return
    safe = _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
    is_coloured = from_draft and not os.environ.get("NO_COLOR")
    click.echo(click.style(safe, fg=ACCEPTED_COLOUR) if is_coloured else safe, nl=False)
    sys.stdout.flush()


def print_summary(shown: Shown) -> None:
    """Print one line of figures on stderr."""
    stats = shown.stats
    parts = [
        f"{stats.emitted} tokens ({shown.finish_reason})",
        f"{stats.tokens_per_s:.1f} tokens/s",
        f"first token {stats.first_token_s * 1e3:.0f} ms",
    ]
    if stats.drafted:
        parts.append(f"acceptance {stats.acceptance:.0%} of {stats.drafted} drafted")
        parts.append(f"{stats.tokens_per_round:.2f} tokens/round")
    parts.append(f"peak RSS {shown.peak_rss_bytes / 1e6:.0f} MB")
    Console(stderr=True, highlight=False).print(Text(" · ".join(parts), "dim"), soft_wrap=True)


def print_comparison(shown: Sequence[Shown], *, is_greedy: bool) -> None:
    """Print the table that sets the strategies side by side, and whether they said the same."""
    table = Table(title=None, box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for one in shown:
        table.add_column(one.strategy, justify="right")
    for label, cells in _rows(shown):
        table.add_row(label, *cells)
    if is_greedy:
        is_same = len({one.token_ids for one in shown}) == 1
        verdict = Text("yes", "bold green") if is_same else Text("NO", "bold red")
        table.add_row("identical output", *[""] * (len(shown) - 1), verdict)
    console = Console(highlight=False)
    console.print(table)
    for one in shown:
        stats = one.stats
        if 0 < stats.predicted_gain < 1 and stats.plain > stats.rounds:
            console.print(
                f"drafting was mostly off: at an alpha of {stats.alpha:.2f} and the measured costs it is predicted "
                f"to run at {stats.predicted_gain:.2f}x the speed of plain decoding",
                style="dim",
                soft_wrap=True,
            )


def _rows(shown: Sequence[Shown]) -> list[tuple[str, list[str]]]:
    def row(label: str, value: Any) -> tuple[str, list[str]]:
        return label, [value(one.stats) for one in shown]

    def ms(seconds: float, runs: int) -> str:
        return f"{seconds / runs * 1e3:.1f}" if runs else "-"

    def if_drafted(format_value: Any) -> Any:
        return lambda stats: format_value(stats) if stats.drafted else "-"

    return [
        row("tokens", lambda s: str(s.emitted)),
        row("tokens/s", lambda s: f"{s.tokens_per_s:.1f}"),
        row("time to first token, ms", lambda s: f"{s.first_token_s * 1e3:.0f}"),
        row("acceptance (accepted/drafted)", if_drafted(lambda s: f"{s.acceptance:.0%} ({s.accepted}/{s.drafted})")),
        row("tokens per round", lambda s: f"{s.tokens_per_round:.2f}"),
        row("plain steps : drafted rounds", lambda s: f"{s.plain} : {s.rounds}"),
        row("ms per draft row", if_drafted(lambda s: ms(s.draft_s, s.draft_runs))),
        row("ms per verify (plain: per step)", lambda s: ms(s.verify_s, s.verify_runs)),
        ("peak RSS so far, MB", [f"{one.peak_rss_bytes / 1e6:.0f}" for one in shown]),
    ]
