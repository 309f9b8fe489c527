r"""EAGLE-3: a drafter for a frozen model (https://arxiv.org/abs/2503.01840), trained on the model's own answers.

::

    python -m shortstack.samples.recipes.self_data MODEL answers.jsonl --self-prompted 2000
    python -m shortstack.samples.recipes.eagle MODEL RUN --data answers.jsonl --epochs 5 --batch-size 8 --lr 1e-3
    shortstack export MODEL OUT --drafter RUN/head

One decoder layer reads the model's residual stream at three depths and the newest token, and drafts over a trimmed
vocabulary. The model runs over the data once (``RUN/features``). The training-time test then runs the layer on its own
states, as many steps as ``--unroll`` says, so that it also drafts well behind its own drafts.

RUN afterwards::

    head/                    EAGLE's config.json and model.safetensors, for ``shortstack export --drafter``
    report.json              tokens, time, settings; alpha draft by draft, cost, predicted speed-up
    training.png
    state.pt, features/      the run itself; the same command continues where it stopped
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from shortstack.graphs.errors import RequestError
from shortstack.graphs.spec import ModelSpec
from shortstack.samples.recipes.training.command import Common, recipe_command
from shortstack.samples.recipes.training.data import read_examples
from shortstack.samples.recipes.training.draft_cost import ROW_COSTS, Costs, read_row_costs
from shortstack.samples.recipes.training.eagle_head import HeadSpec
from shortstack.samples.recipes.training.eagle_loss import HeadLossSpec
from shortstack.samples.recipes.training.eagle_training import Answers, HeadTraining, train_head
from shortstack.samples.recipes.training.loop import LoopSpec
from shortstack.samples.recipes.training.source import Source

DRAFT_VOCAB = 8192
_OF_THE_HEAD = ("depths", "feature_norm", "intermediate_size", "heads", "kv_heads", "head_dim", "draft_vocab")
_DEFAULT_THETA = 10_000.0  # where the model has no rotary embedding


def show(found: Mapping[str, Any]) -> None:
    """Print what the head is worth."""
    table = Table(title="drafting on held-out answers, speed-ups predicted")
    for name in ("parameters", "cost of a draft", "alpha of draft 1, 2, ...", "fixed length", "with threshold"):
        table.add_column(name, justify="right")
    cells = []
    for kind in ("fixed_length", "with_threshold"):
        policy = found[kind]["policy"]
        sure = f", p >= {policy['threshold']}" if policy["threshold"] else ""
        cells.append(f"{found[kind]['speed_up']:.2f}x ({policy['drafts']} drafts{sure})")
    alphas = " ".join(f"{alpha:.2f}" for alpha in found["alphas"])
    table.add_row(f"{found['parameters'] / 1e6:.1f} M", f"{found['draft_cost']:.3f}", alphas, *cells)
    Console().print(table)


def head_spec(model: ModelSpec, depths: Sequence[int], options: Mapping[str, Any], drafts: int) -> HeadSpec:
    """Return the head that the options describe; what they leave out is as in the model.

    Raises:
        RequestError: A depth is outside the model, or sizes do not go together.
    """
    layers, attention = model.num_hidden_layers, model.layers[0].attention
    own = tuple(sorted(set(depths))) or tuple(sorted({2, layers // 2, layers - 3}))
    if not all(2 <= depth < layers for depth in own):
        raise RequestError(
            "--depth",
            found=", ".join(map(str, own)) + ("" if depths else ", the default for so few layers"),
            expected=f"2..{layers - 1}: the model has {layers} layers, and in EAGLE's files 1 has another meaning",
        )
    heads, kv_heads = options["heads"] or attention.heads, options["kv_heads"] or attention.kv_heads
    head_dim = options["head_dim"] or attention.head_dim
    if heads % kv_heads or head_dim % 2:
        raise RequestError(
            "--heads, --kv-heads, --head-dim",
            found=f"{heads} heads, {kv_heads} for keys and values, {head_dim} wide",
            expected="heads that those for keys and values divide, of an even width",
        )
    draft_vocab = min(DRAFT_VOCAB, model.vocab_size) if options["draft_vocab"] is None else options["draft_vocab"]
    if draft_vocab > model.vocab_size:
        raise RequestError(
            "--draft-vocab", found=draft_vocab, expected=f"at most the {model.vocab_size} token ids of the model"
        )
    return HeadSpec(
        model_hidden=model.hidden_size,
        vocab_size=model.vocab_size,
        features=own,
        feature_norm=options["feature_norm"] or "none",
        intermediate_size=options["intermediate_size"] or model.layers[0].mlp.width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        draft_vocab=draft_vocab,
        theta=model.ropes[0].theta if model.ropes else _DEFAULT_THETA,
        eps=model.norm_eps,
        max_positions=model.max_position_embeddings,
        drafts=drafts,
    )


def read_answers(common: Common, more: Sequence[Path], source: Source) -> list[Answers]:
    """Read the answers: those of ``--data`` with the rows held out, then those of each further file.

    Raises:
        RequestError: A file cannot be read or is too small, or two have the same name.
    """
    trained, held = common.split(source)
    answers = [Answers(common.data.stem, [*trained, *held], [False] * len(trained) + [True] * len(held))]
    read = functools.partial(
        read_examples, tokenizer=source.tokenizer, prompt=common.prompt, completion=common.completion,
        end=source.end, max_tokens=common.max_tokens,
    )  # fmt: skip
    for file in more:
        rows = read(file)
        answers.append(Answers(file.stem, rows, [False] * len(rows)))
    found = [own.name for own in answers]
    if len(set(found)) < len(found):
        raise RequestError(
            "--data and --more-data", found=", ".join(found), expected="files of different names: what the model "
            "computes is kept by name",
        )  # fmt: skip
    return answers


@recipe_command
@click.option("--more-data", type=click.Path(path_type=Path), multiple=True,
              help="Further JSON lines, all of them trained on; repeatable.")  # fmt: skip
@click.option("--init", type=click.Path(path_type=Path), help="Continue this head, a folder RUN/head.")
@click.option("--depth", "depths", type=click.IntRange(1), multiple=True,
              help="Layers run before a state that the head reads; repeatable [2, L // 2, L - 3].")  # fmt: skip
@click.option("--feature-norm", type=click.Choice(["none", "each"]), help="Normalise each of these states [none].")
@click.option("--intermediate-size", type=click.IntRange(1), help="Width of the MLP [the model's].")
@click.option("--heads", type=click.IntRange(1), help="Query heads [the model's].")
@click.option("--kv-heads", type=click.IntRange(1), help="Key/value heads [the model's].")
@click.option("--head-dim", type=click.IntRange(2), help="Width of a head [the model's].")
@click.option("--draft-vocab", type=click.IntRange(2), help="Draft the N most frequent ids of the answers [8192].")
@click.option("--unroll", type=click.IntRange(1), default=3, show_default=True,
              help="Steps of the training-time test: drafts in a row in training.")  # fmt: skip
@click.option("--step-decay", type=click.FloatRange(0, 1, min_open=True), default=0.8, show_default=True,
              help="Weight of a step's loss in that of the step before.")  # fmt: skip
@click.option("--hard", type=click.FloatRange(0, 1), default=0.0, show_default=True,
              help="Part of the loss on the model's most likely token alone, not on its distribution.")  # fmt: skip
@click.option("--regression", type=click.FloatRange(0), default=0.0, show_default=True,
              help="Weight of the distance between states guessed and true.")  # fmt: skip
@click.option(
    "--epochs", type=click.FloatRange(0, min_open=True), help="Train on each text so often [as --steps says]."
)
@click.option("--features", type=click.Path(path_type=Path), help="Where activations are kept [RUN/features].")
@click.option("--draft-tokens", type=click.IntRange(1), default=4, show_default=True, help="Drafts to measure.")
@click.option("--row-costs", default=",".join(f"{m}:{c}" for m, c in ROW_COSTS.items()), show_default=True,
              help="c(M), for the predicted speed-up.")  # fmt: skip
@click.option("--launch-cost", type=click.FloatRange(0), default=0.0, show_default=True,
              help="What a run costs besides its weights, in plain steps.")  # fmt: skip
def main(loop: LoopSpec, common: Common, **options: Any) -> dict[str, Any]:
    """Train an EAGLE-3 head for the frozen CHECKPOINT; write it, report and picture to OUT."""
    if common.from_scratch:
        raise RequestError("--from-scratch trains a stack", remedy="train it with samples.recipes.ee_llm first")
    if common.held_out is not None:
        raise RequestError("--held-out", expected="--held-out-rows: rows of the end of --data are held out")
    costs = Costs(read_row_costs(options["row_costs"]), options["launch_cost"])
    given = [name for name in _OF_THE_HEAD if options[name]]
    if options["init"] is not None and given:
        raise RequestError(
            "--init continues a head as it is",
            found=", ".join(
                f"--{name.removesuffix('s' if name == 'depths' else '').replace('_', '-')}" for name in given
            ),
            expected="no options that change its sizes",
        )
    source = common.source()
    spec = source.twin.spec
    recipe = HeadTraining(
        head=head_spec(spec, options["depths"], options, options["unroll"]) if options["init"] is None else None,
        init=options["init"],
        loss=HeadLossSpec(options["unroll"], options["step_decay"], options["hard"], options["regression"]),
        batch_size=common.batch_size,
        drafts=options["draft_tokens"],
        costs=costs,
    )
    answers = read_answers(common, options["more_data"], source)
    features = options.pop("features")
    plain = options | {
        "init": None if options["init"] is None else str(options["init"]),
        "more_data": [file.name for file in options["more_data"]],
    }
    settings = common.settings(plain)
    report = train_head(source, answers, recipe, loop, options["epochs"], common.out, settings, features)
    if not click.get_current_context().params["as_json"]:
        show(report["head"])
    return report


if __name__ == "__main__":
    main()
