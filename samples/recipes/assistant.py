r"""An assistant for a frozen model of any family: a drafter as Gemma 4's, trained on the model's own answers.

::

    python -m shortstack.samples.recipes.self_data MODEL answers.jsonl --self-prompted 2000
    python -m shortstack.samples.recipes.assistant MODEL RUN --data answers.jsonl --epochs 5 --batch-size 8 --lr 1e-3
    shortstack export MODEL OUT --drafter RUN/assistant

A few narrow layers read the newest token, the model's last state, and the keys and values that some layers of the
model have written. They have none of their own, so a prompt costs the drafter nothing and a rejected draft leaves no
trace. The model runs over the data once (``RUN/features``). The assistant starts as the best linear drafter of its
width, and the training-time test then runs it on its own states, as many steps as ``--unroll`` says.

RUN afterwards::

    assistant/               config.json and model.safetensors, for ``shortstack export --drafter``
    report.json              tokens, time, settings; alpha draft by draft, cost, predicted speed-up
    training.png
    state.pt, features/      the run itself; the same command continues where it stopped
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from shortstack.export.arch import ARCHITECTURES
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.drafters import ModelOfDrafter
from shortstack.graphs.errors import RequestError, UnsupportedError
from shortstack.graphs.kv_map import iterated_groups
from shortstack.graphs.spec import ModelSpec
from shortstack.samples.recipes.training.assistant_drafter import AssistantDrafter
from shortstack.samples.recipes.training.assistant_files import read_assistant
from shortstack.samples.recipes.training.assistant_head import Assistant, AssistantSpec
from shortstack.samples.recipes.training.assistant_start import new_assistant
from shortstack.samples.recipes.training.command import Common, recipe_command
from shortstack.samples.recipes.training.drafter_command import Kind, check_request, draft_rows, drafter_options, train
from shortstack.samples.recipes.training.loop import LoopSpec

LAYERS, HIDDEN, MLP_FACTOR = 2, 256, 4
_OF_THE_ASSISTANT = ("kv_layers", "layers", "hidden_size", "intermediate_size", "heads", "draft_vocab")


def readable_layers(model: ModelSpec) -> tuple[int, ...]:
    """Return the layers of a model whose keys and values can be computed from a residual stream that is kept.

    Not the first layer, whose keys and values know one token each, nor those inside an iterated group.
    """
    inside = {layer for group in iterated_groups(model.kv_map) for layer in range(group.start + 1, group.end)}
    owners = (layer for layer in range(1, model.num_hidden_layers) if model.owns_kv(layer))
    return tuple(layer for layer in owners if layer not in inside)


def assistant_spec(model: ModelSpec, options: Mapping[str, Any]) -> AssistantSpec:
    """Return the assistant that the options describe.

    Raises:
        RequestError: The model has no such layers, or sizes do not go together.
        UnsupportedError: The model's final norm has a bias.
    """
    if model.ends.final_norm.has_bias:
        raise UnsupportedError(
            "an assistant for a model whose final norm has a bias",
            remedy="train an EAGLE-3 head: samples.recipes.eagle",
        )
    known = readable_layers(model)
    if not known:
        raise RequestError(
            "an assistant needs a layer above the first with keys and values of its own", found=f"kv_map {model.kv_map}"
        )
    given, count = tuple(options["kv_layers"]), options["layers"]
    if count is not None and len(given) > 1 and len(given) != count:
        raise RequestError("--kv-layer", found=f"{len(given)} of them", expected=f"one for each of --layers {count}")
    far = [layer for layer in known if not model.layers[layer].attention.window]
    own = given or ((far or known)[-1],)
    own = own * (count or LAYERS) if len(own) == 1 else own
    if outside := [layer for layer in own if layer not in known]:
        raise RequestError("--kv-layer", found=outside[0], expected=f"one of {', '.join(map(str, known))}")
    theirs = [model.layers[layer].attention for layer in own]
    sizes = {(one.kv_heads, one.head_dim) for one in theirs}
    windows = {one.window for one in theirs if one.window}
    if len(sizes) > 1 or len(windows) > 1:
        raise RequestError(
            "--kv-layer",
            found=", ".join(f"{one.kv_heads} heads of {one.head_dim}, window {one.window}" for one in theirs),
            expected="layers of the same heads for keys and values, and of one window where they slide",
        )
    kv_heads, head_dim = theirs[0].kv_heads, theirs[0].head_dim
    heads = options["heads"] or theirs[0].heads
    if heads % kv_heads:
        raise RequestError(
            "--heads", found=heads, expected=f"a multiple of the {kv_heads} for keys and values that these layers have"
        )
    hidden = options["hidden_size"] or min(HIDDEN, model.hidden_size)
    return AssistantSpec(
        model_hidden=model.hidden_size,
        vocab_size=model.vocab_size,
        kv_layers=own,
        hidden_size=hidden,
        intermediate_size=options["intermediate_size"] or MLP_FACTOR * hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ropes=tuple(one.rope for one in theirs),
        windows=tuple(one.window for one in theirs),
        draft_vocab=draft_rows(options, model),
        eps=model.norm_eps,
        max_positions=model.max_position_embeddings,
    )


def _kept(common: Common, model: ModelSpec, init: Path | None) -> Assistant | None:
    """Return the assistant to continue; errors as in :func:`read_assistant`."""
    if init is None:
        return None
    checkpoint = open_checkpoint(common.checkpoint, allow_pickle=common.allow_pickle)
    return read_assistant(init, ModelOfDrafter(checkpoint, model, ARCHITECTURES[model.model_type]))


@recipe_command
@click.option("--init", type=click.Path(path_type=Path), help="Continue this assistant, a folder RUN/assistant.")
@click.option("--kv-layer", "kv_layers", type=click.IntRange(0), multiple=True,
              help="Layer of the model, from 0, whose keys and values all layers read, or one for each layer, in order "
              "[the last one that sees all positions].")  # fmt: skip
@click.option("--layers", type=click.IntRange(1), help="Layers [2, or as many as --kv-layer].")
@click.option("--hidden-size", type=click.IntRange(2), help="Width of the layers [256, at most the model's].")
@click.option("--intermediate-size", type=click.IntRange(1), help="Width of the MLP [4 times the layers'].")
@click.option("--heads", type=click.IntRange(1), help="Query heads [as the model's layer].")
@drafter_options
def main(loop: LoopSpec, common: Common, **options: Any) -> dict[str, Any]:
    """Train an assistant for the frozen CHECKPOINT; write it, report and picture to OUT."""
    costs = check_request(common, options, _OF_THE_ASSISTANT)
    source = common.source()
    twin = source.twin
    kept = _kept(common, twin.spec, options["init"])
    spec = assistant_spec(twin.spec, options) if kept is None else kept.spec
    kind = Kind(
        title="assistant",
        name="assistant",
        depths=spec.depths,
        draft_vocab=spec.draft_vocab,
        kept=None if kept is None else AssistantDrafter(kept),
        make=lambda ids, sets, rows: AssistantDrafter(new_assistant(twin, spec, ids, sets, rows)),
    )
    return train(source, kind, costs, loop, common, options)


if __name__ == "__main__":
    main()
