r"""EE-Tuning: exits on a frozen model (https://arxiv.org/abs/2402.00518), and draft heads that see its last state.

::

    python -m shortstack.samples.recipes.ee_tuning CHECKPOINT OUT --data answers.jsonl --exit-layer 6 --kind mlp
    python -m shortstack.samples.recipes.ee_tuning CHECKPOINT OUT --data answers.jsonl --exit-layer 2 --kind linear \
        --linear-mlp 960 --sees-token --sees-state --draft-vocab 4096

The kinds of EE-LLM (embedding, norm, mlp, block) at any depths at once, tied or with heads of their own,
copy-initialised; a linear exit, fitted in closed form and, with ``--closed-form``, no further; low-rank heads; a
confidence gate as in CALM. The model runs over the data once (``OUT/features``); exits are then trained on what it
computed.

OUT afterwards::

    exits.json, exits.safetensors    for ``shortstack export --exits OUT``
    report.json                      tokens, time, settings; alpha draft by draft, cost, predicted speed-up
    training.png
    state.pt, features/              the run itself; the same command continues where it stopped
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import click
from rich.console import Console
from rich.table import Table

from shortstack.graphs.errors import RequestError
from shortstack.graphs.plan import Branch, ExitSpec, HeadKind, Norm
from shortstack.samples.recipes.training.command import (
    EE_LLM_KINDS,
    Common,
    exit_layer_option,
    exit_weight_options,
    loss_weights,
    recipe_command,
)
from shortstack.samples.recipes.training.data import Example, read_examples
from shortstack.samples.recipes.training.draft_cost import ROW_COSTS, Costs, read_row_costs
from shortstack.samples.recipes.training.exit_loss import ExitLossSpec, Target
from shortstack.samples.recipes.training.exit_start import Start
from shortstack.samples.recipes.training.exit_tuning import ExitWeights, TuningSpec, hold_out, tune
from shortstack.samples.recipes.training.loop import LoopSpec
from shortstack.samples.recipes.training.source import Source

KINDS: dict[str, tuple[Branch, Norm]] = {**EE_LLM_KINDS, "linear": ("linear", "final")}


def show(found: Sequence[Mapping[str, Any]]) -> None:
    """Print what the exits are worth as draft sources."""
    table = Table(title="drafting on held-out answers, speed-ups predicted")
    for name in ("after layer", "cost of a draft", "alpha of draft 1, 2, ...", "fixed length", "with threshold"):
        table.add_column(name, justify="right")
    for one in found:
        cells = []
        for kind in ("fixed_length", "with_threshold"):
            policy = one[kind]["policy"]
            sure = f", p >= {policy['threshold']}" if policy["threshold"] else ""
            cells.append(f"{one[kind]['speed_up']:.2f}x ({policy['drafts']} drafts{sure})")
        alphas = " ".join(f"{alpha:.2f}" for alpha in one["alphas"])
        table.add_row(str(one["spec"]["exit_layer"]), f"{one['draft_cost']:.3f}", alphas, *cells)
    Console().print(table)


def exit_specs(
    exit_layers: Sequence[int], depth: int, vocab_size: int, options: Mapping[str, Any]
) -> tuple[ExitSpec, ...]:
    """Return the exits that the options describe, ascending.

    Raises:
        RequestError: A depth is outside the model, or options do not go together.
    """
    if not exit_layers or not all(e < depth for e in exit_layers):
        raise RequestError(
            "--exit-layer", found=list(exit_layers), expected=f"at least one, below the {depth} layers of the model"
        )
    branch, norm = KINDS[options["kind"]]
    if options["draft_vocab"] is not None and options["draft_vocab"] > vocab_size:
        raise RequestError(
            "--draft-vocab", found=options["draft_vocab"], expected=f"at most the {vocab_size} token ids of the model"
        )
    return tuple(
        ExitSpec(
            exit_layer=exit_layer,
            draft_vocab=options["draft_vocab"],
            branch=branch,
            norm=norm,
            head=cast(HeadKind, options["head"].replace("-", "_")),
            head_rank=options["head_rank"],
            linear_mlp=options["linear_mlp"],
            sees_token=options["sees_token"],
            sees_state=options["sees_state"],
            has_gate=options["gate"],
        )
        for exit_layer in sorted(set(exit_layers))
    )


def read_rows(common: Common, source: Source) -> tuple[list[Example], list[bool]]:
    """Read the answers and which of them are held out: those of ``--held-out``, or every tenth.

    Raises:
        RequestError: A file cannot be read, or nothing is left to train or to measure on.
    """
    read = functools.partial(
        read_examples, tokenizer=source.tokenizer, prompt=common.prompt, completion=common.completion,
        end=source.end, max_tokens=min(common.max_tokens, source.twin.spec.max_position_embeddings),
    )  # fmt: skip
    rows = read(common.data)
    if common.held_out is not None:
        held = read(common.held_out)[: common.held_out_rows]
        return [*rows, *held], [False] * len(rows) + [True] * len(held)
    return rows, hold_out(rows, common.data)


@recipe_command
@exit_layer_option
@click.option(
    "--kind",
    type=click.Choice(list(KINDS)),
    default="linear",
    show_default=True,
    help="What is below the head: EE-LLM's four kinds, or a linear map.",
)
@click.option(
    "--linear-mlp",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Linear: inner width of a gated MLP next to the map.",
)
@click.option("--sees-token", is_flag=True, help="Linear: reads the token's embedding.")
@click.option("--sees-state", is_flag=True, help="Linear: reads the whole model's state of the position before.")
@click.option(
    "--head",
    type=click.Choice(["shared", "own", "low-rank"]),
    default="shared",
    show_default=True,
    help="The model's LM head, or one that is trained.",
)
@click.option("--head-rank", type=click.IntRange(0), default=0, show_default=True, help="Of a low-rank head.")
@click.option("--draft-vocab", type=click.IntRange(2), help="Trim the head to the N most frequent ids of the answers.")
@click.option("--gate", is_flag=True, help="Train a confidence gate too.")
@click.option(
    "--start",
    type=click.Choice(["copy", "random"]),
    default="copy",
    show_default=True,
    help="Copy from the model, a linear map in closed form; or draw.",
)
@click.option("--closed-form", is_flag=True, help="Take no gradient step.")
@click.option(
    "--target",
    type=click.Choice(["model", "text"]),
    default="model",
    show_default=True,
    help="Distil the whole model, or learn the text's next token as EE-LLM does.",
)
@click.option(
    "--hard",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Part of the loss on the model's most likely token alone.",
)
@click.option("--token-weighted", is_flag=True, help="Weigh tokens with the exit's own confidence (EE-LLM).")
@click.option(
    "--regression",
    type=click.FloatRange(0),
    default=5.0,
    show_default=True,
    help="Weight of the distance between states guessed and true.",
)
@click.option("--unroll", type=click.IntRange(1), default=3, show_default=True, help="Drafts in a row in training.")
@exit_weight_options
@click.option("--features", type=click.Path(path_type=Path), help="Where activations are kept [OUT/features].")
@click.option("--draft-tokens", type=click.IntRange(1), default=4, show_default=True, help="Drafts to measure.")
@click.option(
    "--row-costs",
    default=",".join(f"{m}:{c}" for m, c in ROW_COSTS.items()),
    show_default=True,
    help="c(M), for the predicted speed-up.",
)
@click.option("--launch-cost", type=click.FloatRange(0), default=0.0, show_default=True,
              help="What a run costs besides its weights, in plain steps.")  # fmt: skip
def main(loop: LoopSpec, common: Common, **options: Any) -> dict[str, Any]:
    """Train exits on the frozen CHECKPOINT; write them, report and picture to OUT."""
    if common.from_scratch:
        raise RequestError("--from-scratch trains a stack", remedy="train it with samples.recipes.ee_llm first")
    source = common.source()
    exits = exit_specs(options["exit_layers"], source.twin.spec.num_hidden_layers, source.twin.spec.vocab_size, options)
    weights = loss_weights(options["exit_weights"], len(exits))
    recipe = TuningSpec(
        exits=exits,
        start=cast(Start, options["start"]),
        loss=ExitLossSpec(
            target=cast(Target, options["target"]),
            hard=options["hard"],
            is_token_weighted=options["token_weighted"],
            regression=options["regression"],
            unroll=options["unroll"],
        ),
        weights=ExitWeights(weights, options["weight_start"], options["weight_steps"], options["weight_style"]),
        batch_size=common.batch_size,
        drafts=options["draft_tokens"],
        costs=Costs(read_row_costs(options["row_costs"]), options["launch_cost"]),
    )
    rows, is_held_out = read_rows(common, source)
    features = options.pop("features")
    settings = common.settings(options)
    steps = None if options["closed_form"] else loop
    report = tune(source, rows, is_held_out, recipe, steps, common.out, settings, features)
    if not click.get_current_context().params["as_json"]:
        show(report["exits"])
    return report


if __name__ == "__main__":
    main()
