"""`shortstack parity`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from shortstack.command_options import Command, allow_pickle_option, follow_links_option, option_group, threads_option
from shortstack.command_paths import BundlePath, CheckpointPath
from shortstack.graphs.errors import ParityError, RequestError
from shortstack.graphs.read_file import read_text


@click.command(cls=Command)
@click.argument("checkpoint", type=CheckpointPath())
@click.argument("bundle", type=BundlePath(path_type=Path))
@option_group(
    "Reference",
    click.option(
        "--adapter",
        type=click.Path(path_type=Path),
        metavar="FOLDER",
        help="The LoRA adapter that was merged into the bundle; it is added to the reference, too.",
    ),
    click.option(
        "--exits",
        "exits_folder",
        type=click.Path(path_type=Path),
        metavar="FOLDER",
        help="The trained exits that the bundle was exported with; they are compared with PyTorch's. Those that "
        "CHECKPOINT itself holds (EE-LLM) need not be named.",
    ),
    click.option(
        "--drafter",
        metavar="HEAD|mtp",
        help="The trained drafter that the bundle was exported with; it is compared with a PyTorch twin of it, and its "
        "acceptance rate on the prompts is printed.",
    ),
    click.option("--revision", help="Branch, tag or commit of a hub id."),
    follow_links_option,
    allow_pickle_option,
)
@option_group(
    "Prompts",
    click.option(
        "--prompts", "count", type=int, default=5, show_default=True, help="How many of the shipped prompts to run."
    ),
    click.option(
        "--text",
        "text_file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Run the prompts in this file instead, one per line.",
    ),
    click.option(
        "--greedy-tokens",
        type=int,
        default=32,
        show_default=True,
        help="Length of the greedy continuations that are compared; 0 compares none.",
    ),
)
@option_group("Machine", threads_option)
@option_group("Output", click.option("--json", "as_json", is_flag=True, help="Print the report as JSON."))
def parity(
    checkpoint: str,
    bundle: Path,
    count: int,
    text_file: Path | None,
    greedy_tokens: int,
    adapter: Path | None,
    exits_folder: Path | None,
    drafter: str | None,
    revision: str | None,
    follow_links: bool,
    allow_pickle: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Compare BUNDLE with transformers' PyTorch model of CHECKPOINT; exits with 1 when they differ."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' own bars; read when tqdm is imported
    import torch

    from shortstack.export.parity.bundle_weights import BundleWeights
    from shortstack.export.parity.compare import compare
    from shortstack.export.parity.drafter import compare_drafts
    from shortstack.export.parity.drafter_reference import load_drafter_reference
    from shortstack.export.parity.drafter_report import DrafterParity
    from shortstack.export.parity.exits import check_exits, load_twin_exits
    from shortstack.export.parity.reference import Reference
    from shortstack.export.parity.twin_reference import TwinReference, needs_twin
    from shortstack.progress import progress_stages
    from shortstack.runtime.model import load

    lines = _read_prompts(text_file, count)
    if greedy_tokens < 0:
        raise RequestError("--greedy-tokens", found=greedy_tokens, expected="0 or more")
    model = load(bundle, threads=threads)
    texts = [
        model.encode([{"role": "user", "content": line}] if model.tokenizer.has_chat_template else line)
        for line in lines
    ]
    with progress_stages() as stage:
        advance = stage("Loading the reference", 1)
        weights = None if model.bundle.manifest.precision.is_float else BundleWeights(model.bundle)
        is_trained = any(not exit_spec.is_plain for exit_spec in model.bundle.manifest.plan.exits)
        exits = None
        if exits_folder is not None or is_trained:
            exits = load_twin_exits(checkpoint, exits_folder, revision, adapter, follow_links, weights, allow_pickle)
        check_exits(model.bundle.manifest, exits)
        options = {"follow_links": follow_links, "allow_pickle": allow_pickle}
        drafts: DrafterParity | None = None
        if drafter is not None:
            own = load_drafter_reference(
                drafter,
                checkpoint,
                model.bundle.manifest,
                revision=revision,
                adapter=adapter,
                weights=weights,
                **options,
            )
        kind = TwinReference if needs_twin(model.bundle.manifest.spec, checkpoint) else Reference
        reference = kind(checkpoint, revision, adapter, follow_links, weights, allow_pickle)
        if threads is not None:
            torch.set_num_threads(threads)
        advance(1)
        advance = stage("Comparing", len(texts))
        report = compare(model, reference, texts, greedy_tokens=greedy_tokens, exits=exits, advance=advance)
        if drafter is not None:
            advance = stage("Comparing drafts", len(texts))
            drafts = compare_drafts(model, reference, own, texts, greedy_tokens=greedy_tokens, advance=advance)
    if as_json:
        click.echo(json.dumps(report.to_json() | ({} if drafts is None else {"drafter": drafts.to_json()})))
    else:
        click.echo(f"{report.texts} texts, {report.positions} positions, {report.greedy_tokens} greedy tokens")
        for head in report.heads:
            name = "final head" if head is report.heads[-1] else f"exit after {head.depth}"
            click.echo(
                f"{name:<14} logits: max {head.max_abs:.1e}, mean {head.mean_abs:.1e}, "
                f"same top token {head.agreement:.2%}"
            )
        if report.layers:
            worst = max(report.layers, key=lambda layer: layer.relative)
            click.echo(f"worst of cache and hidden states: {worst.what}, relative {worst.relative:.1e}")
        else:
            click.echo("cache and hidden states: not compared (an int8 cache holds codes, and there is no cut)")
        if report.weights:
            furthest = max((weight for weight in report.weights if not weight.is_kept), key=lambda each: each.relative)
            click.echo(f"weights: furthest from the checkpoint {furthest.what}, relative {furthest.relative:.1e}")
        if kept := [weight for weight in report.weights if weight.is_kept]:
            differing = sum(weight.relative > 0 for weight in kept)
            click.echo(f"kept blocks: {differing} of {len(kept)} matrices differ from the checkpoint's")
        for fork in report.forks:
            click.echo(
                f"greedy fork: text {fork.text}, {fork.strategy}, new token {fork.position}: "
                f"{fork.ours} / {fork.theirs}, top-2 gap {fork.gap:.1e}"
            )
        if greedy_tokens and not report.forks:
            click.echo("greedy continuations: identical")
        for line in () if drafts is None else drafts.lines():
            click.echo(line)
        if drafts is None and model.bundle.manifest.plan.drafter is not None:
            click.echo("drafter: not compared (name the one that the bundle was exported with: --drafter)")
    if problems := [*report.problems(), *(() if drafts is None else drafts.problems())]:
        raise ParityError(f"{bundle} differs from {checkpoint}: {'; '.join(problems)}")


def _read_prompts(text_file: Path | None, count: int) -> list[str]:
    if text_file is None:
        from shortstack.graphs.texts.prompts import prompts

        available = prompts()
        if not 1 <= count <= len(available):
            raise RequestError("--prompts", found=count, expected=f"1..{len(available)}")
        return available[:count]
    text = read_text(text_file, RequestError, "give a UTF-8 text file", called=f"--text {text_file}")
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise RequestError(f"--text {text_file} holds no prompt", remedy="write one prompt per line")
    return lines
