"""``python -m shortstack.samples.bench``: measures, and prints one table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from shortstack.graphs.texts.prompts import prompts
from shortstack.runtime.text.tokenizer import Tokenizer
from shortstack.samples.bench.artifacts import PRECISIONS, Precision, open_artifacts
from shortstack.samples.bench.footprint import MAX_INT4_MB, disk_section, load_section, memory_section
from shortstack.samples.bench.report import Section, machine, print_report, to_json
from shortstack.samples.bench.rivals import find_rivals, rival_names
from shortstack.samples.bench.sections import drafting_section, engines_section
from shortstack.samples.bench.settings import FULL, QUICK
from shortstack.samples.command import run_command
from shortstack.samples.fetch_model import cache_folder, default_model_path

PARTS = ("engines", "disk", "memory", "load", "drafting")
_WITH_RIVALS = {"engines", "disk", "memory", "load"}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--checkpoint", type=click.Path(path_type=Path, exists=True), help="Another model than the default one.")
@click.option("--exit-layer", type=int, default=8, help="Where the bundles are cut.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", help="Of the models under comparison.")
@click.option(
    "--preset", "--recipe", "preset", help="How `shortstack quantize` makes them.  [default: the precision's name]"
)
@click.option("--method", help="How `shortstack quantize` rounds: changes no speed.  [default: the preset's]")
@click.option("--threads", type=int, multiple=True, default=(1, 2), help="May be given more than once.")
@click.option(
    "--part", "parts", type=click.Choice(PARTS), multiple=True, default=PARTS, help="May be given more than once."
)
@click.option("--genai-python", default=sys.executable, help="An interpreter that has onnxruntime-genai.")
@click.option("--llama-python", default=sys.executable, help="An interpreter that has llama-cpp-python.")
@click.option("--cache", type=click.Path(path_type=Path), help="Where models are kept.  [default: bench in our cache]")
@click.option("--quick", is_flag=True, help="Run everything small: two minutes, and the numbers mean nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def bench(
    checkpoint: Path | None,
    exit_layer: int,
    precision: Precision,
    preset: str | None,
    method: str | None,
    threads: tuple[int, ...],
    parts: tuple[str, ...],
    genai_python: str,
    llama_python: str,
    cache: Path | None,
    quick: bool,
    as_json: bool,
) -> None:
    """Compare split bundles with one uncut graph and with other engines, and drafting with plain decoding."""
    if (preset or method) and precision == "fp32":
        raise click.UsageError(
            "--preset and --method choose how to quantize: name a --precision of int4 or int8 with them"
        )
    settings = QUICK if quick else FULL
    thread_counts = threads[:1] if quick else threads
    source = checkpoint or default_model_path()
    models = open_artifacts(source, cache or cache_folder() / "bench", precision, preset, method)
    load = machine()  # before anything runs
    rivals = find_rivals(models, genai_python, llama_python) if _WITH_RIVALS & set(parts) else []
    versions = {rival.name: rival.version for rival in rivals}
    facts = {
        **load,
        "checkpoint": source.name,
        "precision": models.description,
        **{name: versions.get(name) for name in rival_names(models)},
        "exit_layer": exit_layer,
        "prompt_tokens": ", ".join(map(str, settings.prompt_lengths)),
        "decoded": f"{settings.repeats - 1} x {settings.chunks} chunks of {settings.chunk_tokens} tokens, taking turns",
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
        max_mb = MAX_INT4_MB if precision == "int4" and checkpoint is None else None
        sections.append(disk_section(models, exit_layer, rivals, settings, max_mb))
    if "memory" in parts:
        sections.append(memory_section(models, exit_layer, text, rivals, settings))
    if "load" in parts:
        sections.append(load_section(models, exit_layer, text, rivals, settings))
    for count in thread_counts:
        if "engines" in parts:
            sections.append(engines_section(models, exit_layer, text, count, rivals, settings))
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
    run_command(bench)


if __name__ == "__main__":
    main()
