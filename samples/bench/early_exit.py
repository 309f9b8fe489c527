r"""Speed and quality of early exit over thresholds, and what each way to keep the cache exact costs.

::

    python -m shortstack.samples.bench.early_exit BUNDLE --data dev.jsonl --prompt '{utterance}\n'

Plain decoding, every threshold and every way take turns on each prompt. Speeds are medians over the prompts, with
quartiles; text loss is 1 - ROUGE-L against the whole model's own answer. The last table shows where the time of a token
goes, and so what bounds the speed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.errors import RequestError
from shortstack.runtime.text.tokenizer import Tokenizer
from shortstack.samples.bench.drafting import relative_costs
from shortstack.samples.bench.exit_ways import Outcome, Terms, Way, compare, terms
from shortstack.samples.bench.pipe import bundle_worker
from shortstack.samples.bench.report import machine, progress
from shortstack.samples.command import run_command
from shortstack.samples.showcase.answers import read_rows

_COST_ROWS = (1, 2, 3, 4, 6, 8, 12, 16)
_COST_REPEATS = 20


def ways_of(thresholds: Sequence[float], template: str, exits: Sequence[int]) -> list[Way]:
    """Return plain decoding, and each threshold with each way to catch up, and verified."""
    ways = [Way("plain", "shared")]
    for threshold in thresholds:
        when: dict[str, Any] = {"exit_when": template.replace("{}", f"{threshold:g}"), "exit_layers": list(exits)}
        name = str(when["exit_when"])
        ways += [
            Way(f"{name}, flush", "shared", when),
            Way(f"{name}, recompute", "shared", when | {"kv_policy": "recompute"}),
            Way(f"{name}, pipeline", "shared", when | {"kv_policy": "pipeline"}),
            Way(f"{name}, pipeline, a core each", "single", when | {"kv_policy": "pipeline"}),
            Way(f"{name}, exact", "shared", when | {"verify": "exact"}),
        ]
    return ways


@click.command(context_settings={"max_content_width": 120, "show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="JSON lines.")
@click.option("--prompt", default="{prompt}\\n", help="Template of a prompt over a row's fields.")
@click.option("--chat", "is_chat", is_flag=True, help="Prompts go through the chat template.")
@click.option("--rows", type=click.IntRange(1), default=40, help="How many prompts, evenly spread.")
@click.option("--exit-layer", "-e", "exits", type=int, multiple=True, help="Exits in use.  [default: all]")
@click.option("--exit-when", "template", default="top_prob >= {}", help="Criterion, {} being the threshold.")
@click.option("--threshold", "thresholds", type=float, multiple=True, default=(0.5, 0.8, 0.9, 0.95, 0.99))
@click.option("--max-new-tokens", type=click.IntRange(2), default=64, help="Longest answer.")
@click.option("--threads", type=click.IntRange(1), help="Of the shared pool.  [default: all cores]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def bench(
    bundle: Path, data: Path, prompt: str, is_chat: bool, rows: int, exits: tuple[int, ...], template: str,
    thresholds: tuple[float, ...], max_new_tokens: int, threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure early exit with BUNDLE."""
    manifest = open_bundle(bundle).manifest
    if not manifest.plan.boundaries:
        raise RequestError("the bundle has no exit", remedy="export it with --exit-layer E")
    used = tuple(sorted(exits or manifest.plan.boundaries))
    tokenizer = Tokenizer.load(bundle)
    texts = [text for text, _ in read_rows(data, prompt.replace("\\n", "\n"), "", rows)]
    ids = [
        tokenizer.encode_chat([{"role": "user", "content": text}]) if is_chat else tokenizer.encode(text)
        for text in texts
    ]
    ways = ways_of(thresholds, template, used)
    with ExitStack() as stack:
        workers = {
            "shared": stack.enter_context(bundle_worker(bundle, threads)),
            "single": stack.enter_context(bundle_worker(bundle, 1)),
        }
        progress(f"{len(ids)} prompts in {len(ways)} ways")
        outcomes = compare(workers, ids, ways, max_new_tokens)
        answer = workers["shared"].ask("costs", prompt=ids[0], rows=list(_COST_ROWS), repeats=_COST_REPEATS)
    costs = relative_costs(answer["plain"], answer["draft"], answer["lower"], answer["verify"])
    # The costs are those of the lowest exit; with several in use a token's time has more terms.
    flushes = [o for o in outcomes if o.way.name.endswith(", flush")] if len(used) == 1 else []
    parts = {o.way.name: terms(o, outcomes[0], costs.lower, costs.draft, costs.verify) for o in flushes}
    facts = {**machine(), "bundle": bundle.name, "exits": list(used), "layers": manifest.plan.num_layers}
    if as_json:
        rows_of_json = [
            asdict(o)
            | {"exited_share": o.exited_share, "terms": asdict(parts[o.way.name]) if o.way.name in parts else None}
            for o in outcomes
        ]
        click.echo(json.dumps({**facts, "c": costs.curve, "ways": rows_of_json}, indent=2))
    else:
        print_tables(facts, outcomes, parts, costs.curve)


def print_tables(
    facts: dict[str, Any], outcomes: Sequence[Outcome], parts: dict[str, Terms], curve: dict[int, float]
) -> None:
    """Print what was measured."""
    console = Console(width=120, highlight=False)
    console.print(", ".join(f"{name}: {value}" for name, value in facts.items()), style="dim")
    table = Table(box=None, pad_edge=False)
    for name in ("", "speed", "mean depth", "left early", "text loss", "same texts"):
        table.add_column(name, justify="left" if not name else "right")
    for o in outcomes:
        table.add_row(
            o.way.name, o.speed.show(), f"{o.depth:.1f}", f"{o.exited_share:.0%}", f"{o.text_loss:.3f}", f"{o.same:.0%}"
        )
    console.print(table)
    if parts:
        table = Table(title="a token's time, in plain steps", box=None, pad_edge=False)
        for name in ("", "below the exit", "exit head", "above, a token's share", "rows a run", "rest", "predicted"):
            table.add_column(name, justify="left" if not name else "right")
        for name, part in parts.items():
            cells = (part.lower, part.head, part.upper, part.rows, part.unmeasured)
            table.add_row(name, *(f"{cell:.2f}" for cell in cells), f"{part.predicted:.2f}x")
        console.print(table)
    console.print("c(M): " + ", ".join(f"{rows}: {cost:.2f}" for rows, cost in curve.items()))


def main() -> None:
    """Run the benchmark; a known error is one line and its exit code."""
    run_command(bench)


if __name__ == "__main__":
    main()
