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

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from shortstack.graphs.errors import RequestError
from shortstack.graphs.spec import ModelSpec
from shortstack.samples.recipes.training.command import Common, recipe_command
from shortstack.samples.recipes.training.drafter_command import Kind, check_request, draft_rows, drafter_options, train
from shortstack.samples.recipes.training.eagle_drafter import EagleDrafter
from shortstack.samples.recipes.training.eagle_files import read_head
from shortstack.samples.recipes.training.eagle_head import HeadSpec, new_head
from shortstack.samples.recipes.training.loop import LoopSpec

_OF_THE_HEAD = ("depths", "feature_norm", "intermediate_size", "heads", "kv_heads", "head_dim", "draft_vocab")
_DEFAULT_THETA = 10_000.0  # where the model has no rotary embedding


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
    draft_vocab = draft_rows(options, model)
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


@recipe_command
@click.option("--init", type=click.Path(path_type=Path), help="Continue this head, a folder RUN/head.")
@click.option("--depth", "depths", type=click.IntRange(1), multiple=True,
              help="Layers run before a state that the head reads; repeatable [2, L // 2, L - 3].")  # fmt: skip
@click.option("--feature-norm", type=click.Choice(["none", "each"]), help="Normalise each of these states [none].")
@click.option("--intermediate-size", type=click.IntRange(1), help="Width of the MLP [the model's].")
@click.option("--heads", type=click.IntRange(1), help="Query heads [the model's].")
@click.option("--kv-heads", type=click.IntRange(1), help="Key/value heads [the model's].")
@click.option("--head-dim", type=click.IntRange(2), help="Width of a head [the model's].")
@drafter_options
def main(loop: LoopSpec, common: Common, **options: Any) -> dict[str, Any]:
    """Train an EAGLE-3 head for the frozen CHECKPOINT; write it, report and picture to OUT."""
    costs = check_request(common, options, _OF_THE_HEAD)
    source = common.source()
    twin, init = source.twin, options["init"]
    kept = None if init is None else read_head(init, twin, options["unroll"])
    spec = head_spec(twin.spec, options["depths"], options, options["unroll"]) if kept is None else kept.spec
    kind = Kind(
        title="EAGLE-3",
        name="head",
        depths=spec.features,
        draft_vocab=spec.draft_vocab,
        kept=None if kept is None else EagleDrafter(kept),
        make=lambda ids, sets, rows: EagleDrafter(new_head(twin, spec, ids)),
    )
    return train(source, kind, costs, loop, common, options)


if __name__ == "__main__":
    main()
