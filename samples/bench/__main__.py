"""``python -m shortstack.samples.bench``: measures, and prints one table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from shortstack.graphs.errors import ShortstackError
from shortstack.runtime.tokenizer import Tokenizer
from shortstack.samples.bench.artifacts import open_artifacts
from shortstack.samples.bench.report import Section, machine, print_report, to_json
from shortstack.samples.bench.sections import (
    disk_section,
    drafting_section,
    engines_section,
    find_rival,
    memory_section,
)
from shortstack.samples.bench.settings import FULL, QUICK
from shortstack.samples.fetch_model import cache_folder, default_model_path
from shortstack.samples.prompts import prompts

PARTS = ("engines", "disk", "memory", "drafting")


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--checkpoint", type=click.Path(path_type=Path, exists=True), help="Another model than the default one.")
@click.option("--exit-layer", type=int, default=8, help="Where the bundles are cut.")
@click.option("--threads", type=int, multiple=True, default=(1, 2), help="May be given more than once.")
@click.option(
    "--part", "parts", type=click.Choice(PARTS), multiple=True, default=PARTS, help="May be given more than once."
)
@click.option("--genai-python", default=sys.executable, help="An interpreter that has onnxruntime-genai.")
@click.option("--cache", type=click.Path(path_type=Path), help="Where models are kept.  [default: bench in our cache]")
@click.option("--quick", is_flag=True, help="Run everything small: two minutes, numbers of no worth.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def bench(
    checkpoint: Path | None,
    exit_layer: int,
    threads: tuple[int, ...],
    parts: tuple[str, ...],
    genai_python: str,
    cache: Path | None,
    quick: bool,
    as_json: bool,
) -> None:
    """Compare split bundles with one uncut graph and with onnxruntime-genai, and drafting with plain decoding."""
    settings = QUICK if quick else FULL
    thread_counts = threads[:1] if quick else threads
    source = checkpoint or default_model_path()
    models = open_artifacts(source, cache or cache_folder() / "bench")
    load = machine()  # before anything runs
    rival = find_rival(models, genai_python) if {"engines", "memory"} & set(parts) else None
    facts = {
        **load,
        "checkpoint": source.name,
        "onnxruntime-genai": rival.version if rival else None,
        "exit_layer": exit_layer,
        "prompt_tokens": ", ".join(map(str, settings.prompt_lengths)),
        "decoded": f"{settings.repeats - 1} x {settings.blocks} blocks of {settings.block_tokens} tokens, taking turns",
    }
    tokenizer = Tokenizer.load(models.bundle(exit_layer))
    text = tokenizer.encode("\n\n".join(prompts()))
    chats = [
        tokenizer.encode_chat([{"role": "user", "content": prompt}])
        if tokenizer.has_chat_template
        else tokenizer.encode(prompt)
        for prompt in prompts(settings.draft_prompts)
    ]
    sections: list[Section] = []
    if "disk" in parts:
        sections.append(disk_section(models, exit_layer, settings))
    if "memory" in parts:
        sections.append(memory_section(models, exit_layer, text, rival, settings))
    for count in thread_counts:
        if "engines" in parts:
            sections.append(engines_section(models, exit_layer, text, count, rival, settings))
        if "drafting" in parts:
            for vocab in settings.draft_vocabs:
                bundle = models.bundle(exit_layer, vocab)
                sections.append(drafting_section(bundle, vocab, chats, count, settings))
    if as_json:
        click.echo(json.dumps(to_json(facts, sections), ensure_ascii=False))
    else:
        print_report(facts, sections)


def main() -> None:
    """Run the benchmark; a known error is one line and its exit code."""
    try:
        bench.main(standalone_mode=False)
    except ShortstackError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)


if __name__ == "__main__":
    main()
