"""``python -m shortstack.samples.bench.categories BUNDLE --data questions.jsonl``: speed by kind of question.

Text decides what drafts are worth: a summary repeats its document, a story does not. So each question has a category,
and what is reported is the speed of drafting over plain decoding in each, and the geometric mean over categories::

    {"category": "math", "turns": ["How many ...?"]}     as in Spec-Bench; only the first turn is asked
    {"category": "math", "prompt": "How many ...?"}

Each question is decoded in every way, one after the other, in an order that turns from question to question. Times are
of decoding after the first token. Every answer is compared with plain decoding's.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import click
from rich.console import Console
from rich.table import Table

from shortstack.graphs.errors import RequestError
from shortstack.graphs.read_file import parse_json_object, read_text
from shortstack.runtime.decode.draft_length import DraftPolicy
from shortstack.runtime.decode.drafters import FromExit
from shortstack.runtime.decode.lookup import LOOKUP_DRAFTS, FromLookup
from shortstack.runtime.decode.step import Stats
from shortstack.runtime.decode.trained_drafter import FromDrafter
from shortstack.runtime.model import Model, load
from shortstack.runtime.request import Plain, Speculate, Strategy
from shortstack.samples.command import run_command

_PLAIN = "plain"
_ADAPTIVE = DraftPolicy(is_adaptive=True)
WAYS: Mapping[str, Strategy] = {
    "auto": Speculate(),
    "drafter": Speculate(None, _ADAPTIVE, FromDrafter()),
    "exit": Speculate(None, _ADAPTIVE, FromExit()),
    "lookup": Speculate(None, DraftPolicy(LOOKUP_DRAFTS, is_adaptive=True, has_bonus=True), FromLookup()),
}
"""What may draft, always as many tokens as pay."""


class Question(NamedTuple):
    """A question and its kind."""

    category: str
    text: str


@dataclass(slots=True)
class Way:
    """What one way to decode did with the questions of a category.

    Attributes:
        speeds: Plain decoding's seconds a token over its own, for each question.
        tokens: Tokens decoded after the first ones.
        decode_s: Seconds of them.
        drafted: Tokens drafted.
        accepted: Of these, those that the model said, too.
        rounds: Rounds that drafted.
        differing: Answers that are not plain decoding's.
        drafted_at: Tokens drafted, by their place in the round.
        accepted_at: Accepted ones, likewise.
    """

    speeds: list[float] = field(default_factory=list)
    tokens: int = 0
    decode_s: float = 0.0
    drafted: int = 0
    accepted: int = 0
    rounds: int = 0
    differing: int = 0
    drafted_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)

    def add(self, tokens: int, decode_s: float, stats: Stats) -> None:
        """Add an answer."""
        self.tokens += tokens
        self.decode_s += decode_s
        self.drafted += stats.drafted
        self.accepted += stats.accepted
        self.rounds += stats.rounds
        self.drafted_at = _summed(self.drafted_at, stats.drafted_at)
        self.accepted_at = _summed(self.accepted_at, stats.accepted_at)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        reached = [self.rounds, *self.accepted_at]
        return {
            "questions": len(self.speeds),
            "speed": statistics.median(self.speeds) if self.speeds else None,
            "tokens": self.tokens,
            "tokens_per_s": self.tokens / self.decode_s if self.decode_s else None,
            "drafted": self.drafted,
            "acceptance": self.accepted / self.drafted if self.drafted else None,
            "tokens_per_round": 1 + self.accepted / self.rounds if self.rounds else None,
            "accepted_of_reached": [
                round(accepted / min(drafted, before), 4) if min(drafted, before) else None
                for drafted, accepted, before in zip(self.drafted_at, self.accepted_at, reached, strict=False)
            ],
            "differing": self.differing,
        }


Found = dict[str, dict[str, Way]]
"""By way, then by category."""


def measure(
    model: Model, questions: Sequence[Question], names: Sequence[str], max_new_tokens: int, say: Callable[[str], None]
) -> Found:
    """Decode every question in every way.

    Args:
        model: The bundle.
        questions: What is asked.
        names: Of :data:`WAYS`.
        max_new_tokens: Tokens of an answer at most; an end token ends it.
        say: Told how far it is.
    """
    ways: dict[str, Strategy] = {_PLAIN: Plain(), **{name: WAYS[name] for name in names}}
    found: Found = {name: {} for name in ways}
    for strategy in ways.values():  # loops learn costs, buffers are made
        model.generate(_asked(model, questions[0]), max_new_tokens=max_new_tokens, strategy=strategy)
    started = time.perf_counter()
    for number, question in enumerate(questions):
        prompt = _asked(model, question)
        order = [*ways]
        order = order[number % len(order) :] + order[: number % len(order)]
        answers: dict[str, list[int]] = {}
        per_token: dict[str, float] = {}
        for name in order:
            result = model.generate(prompt, max_new_tokens=max_new_tokens, strategy=ways[name])
            way = found[name].setdefault(question.category, Way())
            count = len(result.tokens) - 1
            decode_s = result.stats.elapsed_s - result.stats.first_token_s
            answers[name] = list(result.tokens)
            if count > 0:
                way.add(count, decode_s, result.stats)
                per_token[name] = decode_s / count
        for name, seconds in per_token.items():
            way = found[name][question.category]
            way.speeds.append(per_token[_PLAIN] / seconds)
            way.differing += answers[name] != answers[_PLAIN]
        passed = time.perf_counter() - started
        left = passed / (number + 1) * (len(questions) - number - 1)
        say(f"question {number + 1} of {len(questions)}, {left:.0f} s left")
    return found


def _asked(model: Model, question: Question) -> Sequence[int]:
    is_chat = model.tokenizer.has_chat_template
    return model.encode([{"role": "user", "content": question.text}] if is_chat else question.text)


def _summed(one: Sequence[int], other: Sequence[int]) -> list[int]:
    size = max(len(one), len(other))
    return [sum(own[i] for own in (one, other) if i < len(own)) for i in range(size)]


def geometric_mean(ways: Mapping[str, Way]) -> float:
    """Return the geometric mean over categories of their median speeds."""
    return statistics.geometric_mean(statistics.median(way.speeds) for way in ways.values() if way.speeds)


def read_questions(file: Path, rows: int | None, longest: int) -> list[Question]:
    """Read questions, or some of them, evenly spread.

    Args:
        file: JSON lines.
        rows: How many; None takes all.
        longest: Characters; what is beyond is cut off, at the front of a question, so that what is asked stays.

    Raises:
        RequestError: It cannot be read, or a line is no question.
    """
    found = []
    for number, line in enumerate(read_text(file, RequestError, "name a file of JSON lines").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        row = parse_json_object(line, where, RequestError, "write one JSON object per line")
        turns = row.get("turns")
        text = turns[0] if isinstance(turns, list) and turns else row.get("prompt")
        if not isinstance(text, str) or not text.strip():
            raise RequestError(f"{where} asks nothing", expected='a field "turns" or "prompt"', found=line[:60])
        found.append(Question(str(row.get("category", "all")), text[-longest:]))
    if not found:
        raise RequestError(f"{file} holds no question", remedy="write one JSON object per line")
    count = len(found) if rows is None else min(rows, len(found))
    return [found[number * len(found) // count] for number in range(count)]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True, help="Questions, JSON lines.")
@click.option("--draft", "ways", type=click.Choice([*WAYS]), multiple=True, default=("auto",), help="Repeatable.")
@click.option("--rows", type=click.IntRange(1), help="How many questions, evenly spread.  [default: all]")
@click.option("--longest", type=click.IntRange(1), default=6000, help="Characters of a question at most.")
@click.option("--max-new-tokens", "-n", type=click.IntRange(2), default=128, help="Longest answer.")
@click.option("--threads", type=click.IntRange(1), help="Threads.  [default: all usable cores]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(
    bundle: Path,
    data: Path,
    ways: tuple[str, ...],
    rows: int | None,
    longest: int,
    max_new_tokens: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure what drafting gains in BUNDLE, by category of questions. Exits with 1 if an answer differs."""
    questions = read_questions(data, rows, longest)
    with load(bundle, threads=threads) as model:
        found = measure(model, questions, list(dict.fromkeys(ways)), max_new_tokens, _say)
    click.echo(err=True)
    if as_json:
        listed = {name: {category: way.to_json() for category, way in own.items()} for name, own in found.items()}
        means = {name: geometric_mean(own) for name, own in found.items()}
        click.echo(json.dumps({"geometric_mean": means, "ways": listed}))
    else:
        _print(found)
    if any(way.differing for own in found.values() for way in own.values()):
        sys.exit(1)


def _say(line: str) -> None:
    click.echo(f"\r{line}  ", nl=False, err=True)


def _print(found: Found) -> None:
    console = Console(width=110)
    for name, own in found.items():
        if name == _PLAIN:
            continue
        title = f"{name}: {geometric_mean(own):.3f}x plain, geometric mean over {len(own)} categories"
        table = Table(title=title, title_justify="left")
        for column in ("category", "questions", "speed", "acceptance", "tokens a round", "by place", "differing"):
            table.add_column(column, justify="left" if column == "category" else "right")
        for category, way in sorted(own.items()):
            row = way.to_json()
            table.add_row(
                category,
                str(row["questions"]),
                _shown(row["speed"], "{:.2f}x"),
                _shown(row["acceptance"], "{:.0%}"),
                _shown(row["tokens_per_round"], "{:.2f}"),
                " ".join(_shown(each, "{:.2f}") for each in row["accepted_of_reached"][:4]),
                str(way.differing),
            )
        console.print(table)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


if __name__ == "__main__":
    run_command(main)
