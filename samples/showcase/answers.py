r"""Exact answers, acceptance and speed of a bundle on prompts with known answers, such as commands and their parses.

::

    python -m shortstack.samples.showcase.answers BUNDLE --data dev.jsonl --prompt '{utterance}\n' --answer '{parse}'

With ``--chat`` prompts go through the bundle's chat template; without ``--answer`` nothing is known and only speed,
acceptance and sameness are measured. Each prompt is decoded plainly, self-speculatively with every draft length, and by
plain early exit at every threshold, one after the other, so that slow spells of the machine fall on all equally.
Times are of decoding after the prompt, summed over all prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from shortstack.graphs.errors import RequestError
from shortstack.runtime.decode.draft_length import DraftPolicy
from shortstack.runtime.early_exit.expression import parse_criterion
from shortstack.runtime.early_exit.policy import ExitPolicy
from shortstack.runtime.model import Model, load
from shortstack.runtime.request import ExitEarly, Speculate
from shortstack.samples.command import run_command


@dataclass(slots=True)
class Tally:
    """One way to decode, over all prompts.

    Attributes:
        name: Which one.
        right: Answers that are exactly the known one.
        same: Answers that are token for token those of plain decoding.
        tokens: Tokens generated.
        decode_s: Seconds after the first token.
        drafted: Tokens drafted, or that left early.
        accepted: Drafted tokens that the whole model accepted.
        judged: Drafted tokens up to the first rejected one of each round.
    """

    name: str
    right: int = 0
    same: int = 0
    tokens: int = 0
    decode_s: float = 0.0
    drafted: int = 0
    accepted: int = 0
    judged: int = 0

    @property
    def alpha(self) -> float:
        """Probability that one judged draft is accepted."""
        return self.accepted / self.judged if self.judged else 0.0


@dataclass(frozen=True, slots=True)
class Answers:
    """What was measured.

    Attributes:
        prompts: How many.
        tallies: Plain decoding first.
    """

    prompts: int
    tallies: list[Tally] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-ready data, with speed-ups over plain decoding."""
        plain = self.tallies[0]
        rows = []
        for tally in self.tallies:
            speed_up = plain.decode_s / plain.tokens / (tally.decode_s / tally.tokens)
            rows.append(asdict(tally) | {"alpha": round(tally.alpha, 4), "speed_up": round(speed_up, 3)})
        return {"prompts": self.prompts, "ways": rows}


def measure(
    model: Model,
    rows: Sequence[tuple[str, str]],
    exit_layer: int | None,
    policies: Mapping[str, DraftPolicy],
    thresholds: Sequence[float],
    max_new_tokens: int,
    *,
    is_chat: bool = False,
) -> Answers:
    """Decode every prompt in every way.

    Args:
        model: The bundle.
        rows: Prompts and their answers.
        exit_layer: Which exit drafts; None takes the lowest.
        policies: How to draft, by name.
        thresholds: Of plain early exit.
        max_new_tokens: Tokens to generate at most.
        is_chat: Prompts are a user's turn of the bundle's chat template.
    """
    if not model.exit_layers:
        raise RequestError("the bundle has no exit", remedy="export it with --exit-layer E")
    chosen = model.exit_layers[0] if exit_layer is None else exit_layer
    plain = Tally("plain")
    drafting = {name: Tally(name) for name in policies}
    early = {threshold: Tally(f"exit at p >= {threshold}") for threshold in thresholds}
    for number, (prompt, answer) in enumerate([rows[0], *rows]):  # the first one twice: its first time is a warm-up
        ids = model.encode([{"role": "user", "content": prompt}] if is_chat else prompt)
        reference = model.generate(ids, max_new_tokens=max_new_tokens)
        if number:
            plain.right += reference.text.strip() == answer
            plain.same += 1
            plain.tokens += len(reference.tokens) - 1
            plain.decode_s += reference.stats.draft_s + reference.stats.verify_s
        for name, tally in drafting.items():
            result = model.generate(
                ids,
                max_new_tokens=max_new_tokens,
                strategy=Speculate(chosen, policies[name]),
            )
            if number:
                stats = result.stats
                tally.right += result.text.strip() == answer
                tally.same += result.tokens == reference.tokens
                tally.tokens += len(result.tokens) - 1
                tally.decode_s += stats.draft_s + stats.verify_s
                tally.drafted += stats.drafted
                tally.accepted += stats.accepted
                tally.judged += stats.accepted + stats.corrected
        for threshold, tally in early.items():
            exits = ExitPolicy(parse_criterion(f"top_prob >= {threshold}"), (chosen,))
            result = model.generate(ids, max_new_tokens=max_new_tokens, strategy=ExitEarly(exits))
            if number:
                stats = result.stats
                tally.right += result.text.strip() == answer
                tally.same += result.tokens == reference.tokens
                tally.tokens += len(result.tokens) - 1
                tally.decode_s += stats.draft_s + stats.verify_s + stats.settle_s
                tally.drafted += stats.exited
    return Answers(len(rows), [plain, *drafting.values(), *early.values()])


def draft_policies(lengths: Sequence[int], confidence: float, has_bonus: bool) -> dict[str, DraftPolicy]:
    """Return fixed lengths, and the adaptive rule with the longest of them."""
    found = {f"draft {k}": DraftPolicy(k, confidence, has_bonus=has_bonus) for k in lengths}
    most = max(lengths)
    found[f"adaptive, at most {most}"] = DraftPolicy(most, confidence, is_adaptive=True, has_bonus=has_bonus)
    return found


def read_rows(file: Path, prompt: str, answer: str, count: int | None) -> list[tuple[str, str]]:
    """Read prompts and answers, spread evenly over the file if ``count`` is less than it has.

    Raises:
        RequestError: The file cannot be read or does not fit the templates.
    """
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        pairs = [(prompt.format_map(row), answer.format_map(row)) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(
            f"{file}: rows do not fit {prompt!r} and {answer!r} ({error})",
            remedy="name fields of its rows in --prompt and --answer",
        ) from None
    if not pairs:
        raise RequestError(f"{file} is empty")
    if count is None or count >= len(pairs):
        return pairs
    return [pairs[index * len(pairs) // count] for index in range(count)]


@click.command(context_settings={"max_content_width": 120})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="JSON lines.")
@click.option("--prompt", default="{prompt}\\n", show_default=True, help="Template of a prompt over a row's fields.")
@click.option("--answer", default="", help="Template of its answer [none is known].")
@click.option("--chat", "is_chat", is_flag=True, help="Prompts go through the chat template.")
@click.option("--bonus", is_flag=True, help="Give the last drafted token a row of its own.")
@click.option("--confidence", type=click.FloatRange(0, 1), default=0.0, help="End drafts after a less likely token.")
@click.option("--rows", type=click.IntRange(1), help="How many prompts, evenly spread [all].")
@click.option("--exit-layer", type=int, help="Which exit drafts [the lowest].")
@click.option("--draft", "draft_lengths", type=click.IntRange(1, 15), multiple=True, help="Drafts [2, 4, 6, 8].")
@click.option("--threshold", "thresholds", type=float, multiple=True, help="Of early exit [none].")
@click.option("--max-new-tokens", type=click.IntRange(2), default=96, show_default=True, help="Longest answer.")
@click.option("--threads", type=click.IntRange(1), help="Threads [all cores].")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def answers(
    bundle: Path, data: Path, prompt: str, answer: str, rows: int | None, exit_layer: int | None,
    draft_lengths: tuple[int, ...], thresholds: tuple[float, ...], max_new_tokens: int, threads: int | None,
    is_chat: bool, bonus: bool, confidence: float, as_json: bool,
) -> None:  # fmt: skip
    """Measure BUNDLE on prompts with known answers."""
    found = measure(
        load(bundle, threads=threads),
        read_rows(data, prompt.replace("\\n", "\n"), answer.replace("\\n", "\n"), rows),
        exit_layer,
        draft_policies(draft_lengths or (2, 4, 6, 8), confidence, bonus),
        thresholds,
        max_new_tokens,
        is_chat=is_chat,
    ).to_json()
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    table = Table(title=f"{bundle.name}, {found['prompts']} prompts")
    for name in ("decoding", "exact answers", "same as plain", "accepted / drafted", "alpha", "from the exit", "speed"):
        table.add_column(name, justify="right")
    for way in found["ways"]:
        count = found["prompts"]
        table.add_row(
            way["name"],
            f"{way['right'] / count:.3f}" if answer else "",
            f"{way['same'] / count:.3f}",
            f"{way['accepted'] / way['drafted']:.3f}" if way["judged"] else "",
            f"{way['alpha']:.3f}" if way["judged"] else "",
            f"{way['drafted'] / way['tokens']:.2f}" if way["drafted"] and not way["judged"] else "",
            f"{way['speed_up']:.2f}x",
        )
    Console().print(table)
    click.echo("alpha: accepted / judged; drafts behind the first rejected one of a round are not judged")


def main() -> None:
    """Run the command; a known error is one line and its exit code."""
    run_command(answers)


if __name__ == "__main__":
    main()
