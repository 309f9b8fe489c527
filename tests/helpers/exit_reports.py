"""Reports of early exit for tests: seven tokens whose figures are done by hand, and a strict parser of the page."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser

from shortstack.runtime.calibration.profile import Profile
from shortstack.runtime.commands.agreement import agreement_of
from shortstack.runtime.commands.exit_report.circumstances import Circumstances
from shortstack.runtime.commands.exit_report.report import ExitReport
from shortstack.runtime.commands.exit_report.spread import Spread
from shortstack.runtime.commands.exit_report.sweep import (
    SweepPoint,
)
from shortstack.runtime.commands.show import FinishedRun
from shortstack.runtime.decode.step import Stats
from shortstack.runtime.decode.stream import Token
from shortstack.runtime.early_exit.expression import parse_criterion
from shortstack.runtime.early_exit.policy import ExitPolicy

LAYERS, EXITS = 12, (2, 4, 8)
VOID_TAGS = {"meta", "br", "link", "img", "input", "hr"}
HOSTILE = "</title></script><script>alert('x')</script>\"><img src=x onerror=y>' onmouseover='z"


def tokens_of(*named: tuple[str, int]) -> tuple[Token, ...]:
    return tuple(
        Token(index + 10, text, False, depth, 0.5 + index / 100, index % 3) for index, (text, depth) in enumerate(named)
    )


TOKENS = tokens_of(("The", 12), (" cat", 2), (" sat", 4), ("\n", 8), ("", 2), (" on<b>", 2), (" it.", 12))
PLAIN = (*TOKENS[:3], replace(TOKENS[3], id=99, text=" lay", exit_layer=12), *TOKENS[4:])


def shown(strategy: str, tokens: tuple[Token, ...], elapsed_s: float = 2.0, **stats_of: float) -> FinishedRun:
    stats = Stats(elapsed_s=elapsed_s, first_token_s=1.0, **stats_of)  # type: ignore[arg-type]
    for token in tokens:
        stats.count_emitted(token.exit_layer)
    return FinishedRun(strategy, "".join(token.text for token in tokens), tokens, LAYERS, "eos", stats, 0)


CIRCUMSTANCES = Circumstances(
    datetime(2026, 11, 28, 9, 30, tzinfo=UTC), {"shortstack": "0.0.0", "onnxruntime": "1.2.3", "Python": "3.11.0"},
    "Linux x86_64", "Abacus 9000", 2, "ab" * 32, "float32",
)  # fmt: skip
POINTS = tuple(
    SweepPoint(threshold, similarity, depth, 0.5, Spread((speed - 1, speed, speed + 1)), threshold == 0.7)
    for threshold, similarity, depth, speed in ((0.9, 1.0, 10.0, 7.0), (0.7, 0.9, 6.0, 9.0), (0.0, 0.1, 2.0, 20.0))
)


def report(
    tokens: tuple[Token, ...] = TOKENS,
    plain: tuple[Token, ...] = PLAIN,
    *,
    rule: str = "top_prob >= 0.7",
    prompt: str = "Say it.\nNow.",
    points: tuple[SweepPoint, ...] = POINTS,
    profile: Profile | None = None,
    exits: tuple[int, ...] = EXITS,
) -> ExitReport:
    """Seven tokens, six of them after the first: 6, 8 and 12 tokens/s early, and 3, 4 and 6 plain."""
    early_runs = tuple(
        shown("early-exit", tokens, 1 + 6 / speed, draft_s=0.25, verify_s=0.5) for speed in (6.0, 12.0, 8.0)
    )
    plain_runs = tuple(shown("plain", plain, 1 + 6 / speed, verify_s=6 / speed) for speed in (4.0, 3.0, 6.0))
    agreement = agreement_of(early_runs[0].token_ids, plain_runs[0].token_ids)
    policy = ExitPolicy(parse_criterion(rule))
    return ExitReport(
        "tiny", prompt, policy, exits, LAYERS, early_runs, plain_runs, agreement, CIRCUMSTANCES, points, profile
    )


class Page(HTMLParser):
    """Parses a page strictly: every tag is closed, in order. Gathers the tokens of the first text, tiles and rows."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tokens: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.tiles: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID_TAGS:
            self.open.append((tag, dict(attrs)))
        if tag == "section" and "tiles" in [opened.get("class") for _, opened in self.open]:
            self.tiles.append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if "data-tip" in dict(attrs):
            self.tokens.append(("", dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        tags = [tag for tag, _ in self.open]
        if {"td", "th"} & set(tags):
            self.rows[-1][-1] += data
        if self.tiles and "tiles" in [opened.get("class") for _, opened in self.open]:
            self.tiles[-1] += f"{' ' * (tags[-1] == 'span')}{data}" if data.strip() else ""
        if any("data-tip" in attrs for _, attrs in self.open) and self.open[-1][0] != "sub":
            self.tokens[-1] = (self.tokens[-1][0] + data, self.tokens[-1][1])
