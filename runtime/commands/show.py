"""How a generation looks in a terminal: streamed text with what exits named coloured, and one table of figures."""

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

from shortstack.runtime.commands.agreement import Agreement
from shortstack.runtime.commands.show_exits import DepthMarks
from shortstack.runtime.decode.step import Stats
from shortstack.runtime.decode.stream import FinishReason, Stream, Token

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

EXIT_COLOUR = "green"  # of what an exit named
_LEGENDS = {"self-speculative": "drafted and accepted", "early-exit": "left early"}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """One finished generation and what to say about it.

    Attributes:
        strategy: How it was decoded.
        text: The text.
        tokens: Its tokens.
        layers: Layers of the whole model.
        finish_reason: Why it ended.
        stats: Counts and times.
        peak_rss_bytes: Largest resident memory of the process so far.
    """

    strategy: str
    text: str
    tokens: tuple[Token, ...]
    layers: int
    finish_reason: FinishReason
    stats: Stats
    peak_rss_bytes: int

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The ids of the tokens."""
        return tuple(token.id for token in self.tokens)

    @property
    def exited_share(self) -> float:
        """Share of the tokens that an exit named."""
        early = sum(token.exit_layer < self.layers for token in self.tokens)
        return early / len(self.tokens) if self.tokens else 0.0

    @property
    def is_cancelled(self) -> bool:
        """Whether it was ended from outside, so that its length says nothing."""
        return self.finish_reason == "cancelled"

    def to_json(self, *, with_exits: bool = False) -> dict[str, Any]:
        """Return it as JSON-ready data; ``with_exits`` adds where each token was decided."""
        data = {
            "strategy": self.strategy,
            "text": self.text,
            "tokens": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "stats": self.stats.to_json(),
            "peak_rss_bytes": self.peak_rss_bytes,
        }
        if with_exits:
            data["exits"] = [
                {"token": t.id, "exit_layer": t.exit_layer, "confidence": t.confidence, "pending": t.pending}
                for t in self.tokens
            ]
        return data


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


def show_stream(
    strategy: str,
    stream: Stream,
    layers: int,
    *,
    exit_layers: tuple[int, ...] = (),
    is_quiet: bool,
    has_title: bool,
    shows_exits: bool = False,
) -> FinishedRun:
    """Run a generation to its end, printing text as it becomes certain; Ctrl-C ends it and keeps what there is.

    Args:
        strategy: How it decodes.
        stream: The generation.
        layers: Layers of the whole model.
        exit_layers: The bundle's exits.
        is_quiet: Print nothing.
        has_title: Print a title before the text, and keep a distance from what follows.
        shows_exits: Mark each token by the depth of the head that named it, and print a legend.
    """
    marks = DepthMarks(exit_layers, layers, _has_colours()) if shows_exits else None
    if has_title and not is_quiet:
        words = _LEGENDS.get(strategy) if marks is None else None
        legend = click.style(f" ({words})", fg=EXIT_COLOUR) if words else ""
        click.echo(click.style(strategy, bold=True) + legend)
    tokens: list[Token] = []
    try:
        for token in stream:
            tokens.append(token)
            if token.text and not is_quiet:
                _print_piece(token, layers, marks)
    except KeyboardInterrupt:
        stream.close()
    if not is_quiet:
        click.echo("\n" if has_title else "")
        if marks is not None and tokens:
            click.echo(marks.legend(tokens) + ("\n" if has_title else ""))
    assert stream.finish_reason is not None
    return FinishedRun(
        strategy, stream.text, tuple(tokens), layers, stream.finish_reason, stream.stats, peak_rss_bytes()
    )


def _has_colours() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _print_piece(token: Token, layers: int, marks: DepthMarks | None) -> None:
    """Print text to a file as it is; to a terminal in colour, without control characters that would steer it."""
    text = token.text
    if sys.stdout.isatty():
        text = _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
    if marks is not None:
        text = marks.mark(text, token.exit_layer)
    elif token.exit_layer < layers and _has_colours():
        text = click.style(text, fg=EXIT_COLOUR)
    click.echo(text, nl=False)
    if sys.stdout.isatty():
        sys.stdout.flush()


def print_summary(shown: FinishedRun, *, shows_exits: bool = False) -> None:
    """Print one line of figures on stderr; ``shows_exits`` adds exit depths where they are not the point anyway."""
    stats = shown.stats
    parts = [
        f"{stats.emitted} tokens ({shown.finish_reason})",
        f"{stats.tokens_per_s:.1f} tokens/s",
        f"first token {stats.first_token_s * 1e3:.0f} ms",
    ]
    if stats.drafted:
        parts.append(f"accepted {stats.acceptance:.0%} of {stats.drafted} drafted")
        if len(stats.drafted_by) > 1:
            parts.append(f"by source: {', '.join(_by_source(stats))}")
        parts.append(f"{stats.tokens_per_round:.2f} tokens/round")
    if shows_exits or shown.strategy == "early-exit":
        parts.append(f"mean exit depth {stats.mean_exit_layer:.1f} of {shown.layers} layers")
        parts.append(f"exited {shown.exited_share:.0%}")
    parts.append(f"peak RSS {shown.peak_rss_bytes / 1e6:.0f} MB")
    Console(stderr=True, highlight=False).print(Text(" · ".join(parts), "dim"), soft_wrap=True)


def print_comparison(
    shown: Sequence[FinishedRun], *, is_greedy: bool, is_lossy: bool = False, agreement: Agreement | None = None
) -> None:
    """Print the table that sets the strategies side by side, and whether they said the same.

    Args:
        shown: The generations, plain decoding first.
        is_greedy: Whether they were greedy, so that they can be compared.
        is_lossy: Whether early exit may say something else; then that is no defect.
        agreement: Between early exit and plain decoding.
    """
    table = Table(title=None, box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for one in shown:
        table.add_column(one.strategy, justify="right")
    for label, cells in _rows(shown):
        table.add_row(label, *cells)
    if is_greedy:
        table.add_row("identical output", "", *(_verdict(one, shown[0], is_lossy) for one in shown[1:]))
    console = Console(highlight=False)
    console.print(table)
    if agreement is not None and not agreement.is_exact:
        console.print(f"early exit agrees with plain decoding in the {agreement.words()}", soft_wrap=True)
    for one in shown:
        stats = one.stats
        if 0 < stats.predicted_gain < 1 and stats.plain > stats.rounds:
            console.print(
                f"drafting was mostly off: at an alpha (accepted / judged) of {stats.alpha:.2f} and the measured costs "
                f"it is predicted to run at {stats.predicted_gain:.2f}x the speed of plain decoding",
                style="dim",
                soft_wrap=True,
            )


def _verdict(one: FinishedRun, plain: FinishedRun, is_lossy: bool) -> Text:
    if one.token_ids == plain.token_ids:
        return Text("yes", "bold green")
    return Text("no", "yellow") if is_lossy and one.strategy == "early-exit" else Text("NO", "bold red")


def _by_source(stats: Stats) -> list[str]:
    """Return what was accepted of each source's drafts."""
    return [f"{name} {stats.accepted_by[name]}/{drafted}" for name, drafted in sorted(stats.drafted_by.items())]


def _rows(shown: Sequence[FinishedRun]) -> list[tuple[str, list[str]]]:
    def row(label: str, value: Any) -> tuple[str, list[str]]:
        return label, [value(one.stats) for one in shown]

    def ms(seconds: float, runs: int) -> str:
        return f"{seconds / runs * 1e3:.1f}" if runs else "-"

    def if_drafted(format_value: Any) -> Any:
        return lambda stats: format_value(stats) if stats.drafted else "-"

    def by_source(stats: Stats) -> str:
        return ", ".join(_by_source(stats)) or "-"

    def if_split(format_value: Any) -> Any:
        return lambda stats: format_value(stats) if stats.drafted or stats.exited else "-"

    return [
        row("tokens", lambda s: str(s.emitted)),
        row("tokens/s", lambda s: f"{s.tokens_per_s:.1f}"),
        row("time to first token, ms", lambda s: f"{s.first_token_s * 1e3:.0f}"),
        row("acceptance (accepted/drafted)", if_drafted(lambda s: f"{s.acceptance:.0%} ({s.accepted}/{s.drafted})")),
        *(
            [row("accepted by source", by_source)]
            if len({name for one in shown for name in one.stats.drafted_by}) > 1
            else []
        ),
        row("tokens per round", lambda s: f"{s.tokens_per_round:.2f}"),
        row("plain steps : drafted rounds", lambda s: f"{s.plain} : {s.rounds}"),
        ("mean exit depth", [f"{one.stats.mean_exit_layer:.1f} of {one.layers}" for one in shown]),
        ("exited early", [f"{one.exited_share:.0%}" if one.strategy != "plain" else "-" for one in shown]),
        row("ms per draft row", if_split(lambda s: ms(s.draft_s, s.draft_runs))),
        row("ms per verify (plain: per step)", lambda s: ms(s.verify_s, s.verify_runs)),
        ("peak RSS so far, MB", [f"{one.peak_rss_bytes / 1e6:.0f}" for one in shown]),
    ]
