"""`shortstack doctor`: what this machine has, and whether it verifies drafts exactly."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from typing import Any

import click
import onnxruntime as ort

from shortstack import __version__
from shortstack.command_options import Command, provider_option, threads_option
from shortstack.command_paths import BundlePath
from shortstack.cores import usable_cores
from shortstack.graphs.origins import grouped
from shortstack.graphs.precision import EXACT_BLOCK_SIZES
from shortstack.runtime.commands.drafter_check import DrafterCheck, check_drafter
from shortstack.runtime.commands.machine import processor
from shortstack.runtime.commands.row_check import MOST_ROWS, RowCheck, check_rows
from shortstack.runtime.model import Model, load

_TEXT = (
    "The quick brown fox jumps over the lazy dog, and then it sits down to count: one, two, three, four, five, six, "
    "seven, eight, nine, ten, eleven, twelve."
)
# What onnxruntime's integer kernels look for.
_CPU_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimddp", "i8mm", "fphp")


@click.command(cls=Command)
@click.argument("bundle", type=BundlePath(), required=False)
@provider_option
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(bundle: str | None, providers: tuple[str, ...], threads: int | None, as_json: bool) -> int:
    """Show what this machine has; with BUNDLE, also whether its graphs verify drafts exactly here.

    A trained drafter is run, too. Exits with 1 when a run of several rows picks another token than the same rows run
    one by one, or when the drafter's numbers overflow or change a text.
    """
    cpu, features = processor()
    facts: dict[str, Any] = {
        "shortstack": __version__,
        "python": platform.python_version(),
        "onnxruntime": ort.__version__,
        "providers": ort.get_available_providers(),
        "cpu": cpu,
        "cpu_flags": [flag for flag in _CPU_FLAGS if flag in features],
        "cores": usable_cores(),
    }
    checks: list[RowCheck] = []
    drafter: DrafterCheck | None = None
    if bundle is not None:
        model = load(bundle, providers=providers or None, threads=threads)
        checks = check_rows(model, _tokens(model))
        manifest = model.bundle.manifest
        odd = sorted({f.block_size for f in manifest.precision.weights.values()} - {*EXACT_BLOCK_SIZES})
        facts |= {
            "bundle": str(bundle),
            "other_block_sizes": odd,
            "blocks_kept": [group.words for group in grouped(manifest.origins, manifest.precision.weights)],
            "rows": [
                {"rows": c.rows, "max_difference": c.max_difference, "same_tokens": c.same_tokens} for c in checks
            ],
        }
        if manifest.plan.drafter is not None:
            drafter = check_drafter(model, _tokens(model))
            facts["drafter"] = None if drafter is None else asdict(drafter)
    if as_json:
        click.echo(json.dumps(facts))
    else:
        _print(facts, checks)
        if drafter is not None:
            _print_drafter(drafter)
    is_right = all(check.same_tokens for check in checks) and (drafter is None or drafter.is_sound)
    return 0 if is_right else 1


def _print(facts: dict[str, Any], checks: list[RowCheck]) -> None:
    flags = ", ".join(facts["cpu_flags"]) or "none of the features that integer kernels use"
    click.echo(f"shortstack {facts['shortstack']}, Python {facts['python']}, onnxruntime {facts['onnxruntime']}")
    click.echo(f"providers   {', '.join(facts['providers'])}")
    click.echo(f"processor   {facts['cpu']}, {facts['cores']} usable cores ({flags})")
    if not checks:
        click.echo("rows        not checked: give a bundle")
        return
    for check in checks:
        words = (
            "bit for bit" if check.is_exact else f"largest difference {check.max_difference:.1e} of the largest logit"
        )
        click.echo(f"rows {check.rows:<6} {words}; {'same tokens' if check.same_tokens else 'OTHER TOKENS'}")
    if facts["other_block_sizes"]:
        sizes = ", ".join(map(str, facts["other_block_sizes"]))
        exact = " and ".join(map(str, EXACT_BLOCK_SIZES))
        click.echo(f"note        blocks of {sizes} are rounded differently in longer runs; {exact} are not")
    for words in facts["blocks_kept"]:
        click.echo(f"blocks      {words}")
    is_same = all(check.same_tokens for check in checks)
    click.echo(
        "verdict     a run of several rows picks the tokens of single runs: drafts are verified exactly here"
        if is_same
        else "verdict     rows depend on the length of a run here: self-speculation may fork from plain decoding"
    )


def _print_drafter(check: DrafterCheck) -> None:
    wrong = (
        [] if check.is_finite else ["its numbers overflow, so texts are decoded plainly (export it again, in float32)"]
    )
    wrong += [] if check.has_valid_tokens else ["it drafts token ids that the model does not have (export it again)"]
    wrong += [] if check.same_tokens else ["a text with its drafts differs from plain decoding"]
    found = "; ".join(wrong) or "a text with its drafts is that of plain decoding"
    click.echo(
        f"drafter     {', '.join(check.graphs)} run here; {found} ({check.accepted} of {check.drafted} accepted)"
    )


def _tokens(model: Model) -> list[int]:
    """Return a text in the bundle's tokens, at least long enough, at most as long as its context."""
    vocab = model.bundle.manifest.spec.vocab_size
    ids = [i for i in model.tokenizer.encode(_TEXT) if i < vocab]
    while len(ids) <= MOST_ROWS:
        ids += ids or [0]
    return ids[: min(len(ids), model.cache.max_length)]
