r"""What exits of a frozen model are worth as draft sources: alpha against cost, over depth, kind and vocabulary.

::

    python -m shortstack.samples.recipes.draft_head_curve CHECKPOINT OUT --data answers.jsonl --exit-layer 2 \
        --exit-layer 8 --draft-vocab 4096 --trained FOLDER_OF_EE_TUNING

Per depth and draft vocabulary (0 is the whole one): the final norm and head as they are, and linear exits in closed
form that read the hidden state, the token too, and the whole model's last state too. ``--trained`` adds what
``ee_tuning`` reported on the same data.

OUT afterwards::

    curve.json    one entry an exit: spec, cost, alpha (accepted / judged) draft by draft, best predicted speed-up
    curve.png     alpha of the first draft against cost, over lines of equal speed-up
    features/     what the model computed, for the next call
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from shortstack.command_options import allow_pickle_option
from shortstack.export.twin.exits import ExitNode
from shortstack.graphs.errors import RequestError
from shortstack.graphs.plan import ExitSpec
from shortstack.progress import progress_stages
from shortstack.samples.command import run_command
from shortstack.samples.recipes.training.closed_form import fit_linear
from shortstack.samples.recipes.training.curve_plot import draw_curve
from shortstack.samples.recipes.training.data import read_examples
from shortstack.samples.recipes.training.draft_cost import ROW_COSTS, Costs, read_row_costs
from shortstack.samples.recipes.training.exit_tuning import describe, draft_ids, hold_out
from shortstack.samples.recipes.training.features import Features, extract_features
from shortstack.samples.recipes.training.source import Source, open_source

_KINDS: dict[str, dict[str, Any]] = {
    "final norm and head": {},
    "linear, hidden": {"branch": "linear"},
    "linear, hidden + token": {"branch": "linear", "sees_token": True},
    "linear, hidden + token + state": {"branch": "linear", "sees_token": True, "sees_state": True},
}


def measure_curve(
    source: Source,
    features: Features,
    ids: Mapping[int, Any],
    depths: Sequence[int],
    drafts: int,
    costs: Costs,
    done: Sequence[Mapping[str, Any]],
    save: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Measure every kind at every depth with every draft vocabulary.

    Args:
        source: The model.
        features: Its activations.
        ids: Token ids by size of the draft vocabulary; size 0 is the whole one.
        depths: Where exits are.
        drafts: Tokens drafted in a row.
        costs: For the predicted speed-ups.
        done: Entries that are measured already.
        save: Called with all entries after each exit.

    Returns:
        The entries, each with its kind.
    """
    entries = [dict(entry) for entry in done]
    there = {(entry["kind"], entry["spec"]["exit_layer"]) for entry in entries}
    trained_on = [row for row, held in enumerate(features.is_held_out) if not held]
    with progress_stages() as stage:
        advance = stage("measuring exits", len(depths) * len(_KINDS))
        for depth in depths:
            for kind, options in _KINDS.items():
                if (kind, depth) not in there:
                    fitted = ExitNode(source.twin.spec, ExitSpec(depth, **options)).requires_grad_(False)
                    if options:
                        fit_linear(fitted, source.twin, features, trained_on)
                    for size in ids:
                        node = _trimmed(fitted, source, size, ids[size])
                        entries.append({"kind": kind, **describe(node, source.twin, features, drafts, costs)})
                    save(entries)
                advance(1)
    return entries


def _trimmed(fitted: ExitNode, source: Source, size: int, ids: Any) -> ExitNode:
    """Return the exit with another draft vocabulary; the branch does not depend on it."""
    if not size:
        return fitted
    spec = {name: getattr(fitted.exit_spec, name) for name in ExitSpec.__dataclass_fields__} | {"draft_vocab": size}
    node = ExitNode(source.twin.spec, ExitSpec(**spec)).requires_grad_(False)
    node.load_state_dict({**fitted.state_dict(), "head.ids": ids})
    return node


def read_trained(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the entries that ``ee_tuning`` reported.

    Raises:
        RequestError: A folder has no such report.
    """
    entries = []
    for folder in folders:
        try:
            report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
            entries += [{"kind": _name(one["spec"]), **one} for one in report["exits"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RequestError(
                f"--trained {folder}: report.json cannot be read ({error!r})",
                remedy="name a folder that ee_tuning wrote",
            ) from None
    return entries


def _name(spec: Mapping[str, Any]) -> str:
    """Return what a trained exit is called in table and picture."""
    if spec["branch"] != "linear":
        return f"trained, {spec['branch']}"
    seen = " + ".join(["hidden", *(what for what in ("token", "state") if spec[f"sees_{what}"])])
    return f"trained, {seen}" + (f", MLP of {spec['linear_mlp']}" if spec["linear_mlp"] else "")


def show(entries: Sequence[Mapping[str, Any]]) -> None:
    """Print the fastest exit of each kind and depth."""
    table = Table(title="draft sources, fastest draft vocabulary of each; speed-ups predicted")
    for name in ("kind", "layers", "vocabulary", "cost", "alpha of draft 1, 2, ...", "speed-up", "drafts"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    best: dict[tuple[str, int], Mapping[str, Any]] = {}
    for entry in entries:
        place = entry["kind"], entry["spec"]["exit_layer"]
        if place not in best or speed_up(entry) > speed_up(best[place]):
            best[place] = entry
    for (kind, depth), entry in best.items():
        alphas = " ".join(f"{alpha:.2f}" for alpha in entry["alphas"])
        vocab = str(entry["spec"]["draft_vocab"] or "all")
        drafts = str(entry["with_threshold"]["policy"]["drafts"])
        row = (kind, str(depth), vocab, f"{entry['draft_cost']:.3f}", alphas, f"{speed_up(entry):.3f}", drafts)
        table.add_row(*row)
    Console().print(table)


def speed_up(entry: Mapping[str, Any]) -> float:
    """Return the best predicted speed-up of an entry."""
    return float(entry["with_threshold"]["speed_up"])


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.argument("checkpoint")
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Answers, as self_data writes them.")
@click.option("--exit-layer", "exit_layers", type=click.IntRange(1), multiple=True, required=True, help="Repeatable.")
@click.option("--draft-vocab", "vocabs", type=click.IntRange(0), multiple=True, default=(4096,), help="Repeatable.")
@click.option("--trained", type=click.Path(path_type=Path), multiple=True, help="OUT of ee_tuning; repeatable.")
@click.option(
    "--features", type=click.Path(path_type=Path), help="Where activations are kept.  [default: OUT/features]"
)
@click.option("--draft-tokens", type=click.IntRange(1), default=4, help="Drafts in a row.")
@click.option("--row-costs", default=",".join(f"{m}:{c}" for m, c in ROW_COSTS.items()), help="c(M).")
@click.option("--launch-cost", type=click.FloatRange(0), default=0.0, help="Of a run, besides its weights.")
@click.option("--max-tokens", type=click.IntRange(2), default=512, help="Longer rows are cut.")
@allow_pickle_option
@click.option("--json", "as_json", is_flag=True, help="Print the entries as JSON.")
def curve(
    checkpoint: str,
    out: Path,
    data: Path,
    exit_layers: tuple[int, ...],
    vocabs: tuple[int, ...],
    trained: tuple[Path, ...],
    features: Path | None,
    draft_tokens: int,
    row_costs: str,
    launch_cost: float,
    max_tokens: int,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Measure exits of CHECKPOINT as draft sources; write table and picture to OUT. Continues where it was stopped."""
    extra = read_trained(trained)
    costs = Costs(read_row_costs(row_costs), launch_cost)
    source = open_source(checkpoint, from_scratch=False, allow_pickle=allow_pickle)
    spec = source.twin.eval().requires_grad_(False).spec
    depths = sorted(set(exit_layers))
    if depths[-1] >= spec.num_hidden_layers:
        raise RequestError("--exit-layer", found=depths[-1], expected=f"below the {spec.num_hidden_layers} layers")
    if max(vocabs) > spec.vocab_size:
        raise RequestError("--draft-vocab", found=max(vocabs), expected=f"at most the {spec.vocab_size} token ids")
    rows = read_examples(data, source.tokenizer, "", "", (), max_tokens)
    is_held_out = hold_out(rows, data)
    with progress_stages() as stage:
        advance = stage("running the model", sum(len(row.ids) for row in rows))
        found = extract_features(source.twin, rows, is_held_out, features or out / "features", depths, advance=advance)
    ids = {size: draft_ids(rows, is_held_out, size, spec.vocab_size) if size else None for size in sorted(set(vocabs))}
    settings = {
        "data": data.name,
        "vocabs": list(ids),
        "drafts": draft_tokens,
        "costs": row_costs,
        "launch": launch_cost,
    }
    file = out / "curve.json"
    done = _measured(file, settings)

    def save(entries: list[dict[str, Any]]) -> None:
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps({"settings": settings, "entries": entries}, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, file)

    out.mkdir(parents=True, exist_ok=True)
    entries = measure_curve(source, found, ids, depths, draft_tokens, costs, done, save)
    save([*entries, *extra])
    draw_curve([*entries, *extra], costs, out / "curve.png")
    if as_json:
        click.echo(json.dumps([*entries, *extra], indent=1))
    else:
        show([*entries, *extra])


def _measured(file: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of an earlier call with the same settings, without the trained ones."""
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if before["settings"] != settings:
        return []
    return [entry for entry in before["entries"] if entry["kind"] in _KINDS]


def main() -> None:
    """Run the command; a known error is one line and its exit code."""
    run_command(curve, when_interrupted="stopped; the same command continues where it was")


if __name__ == "__main__":
    main()
