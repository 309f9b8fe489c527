"""Decides which exits a bundle gets: those of a folder, those in the checkpoint, or plain ones.

==============================  =============================================================
``--exits FOLDER``              the folder's exits, and a plain one at every ``--exit-layer``
the checkpoint holds exits      all of them, or those that ``--exit-layer`` selects
neither                         a plain one at every ``--exit-layer``
==============================  =============================================================

A plain exit is the final norm and the LM head. If the model was trained with exits, no plain one is invented at another
depth: a user who asks for that depth has most likely counted the layers differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shortstack.export.checkpoint import Checkpoint
from shortstack.export.checkpoint.checkpoint import StoredExit
from shortstack.export.spec import ExportSpec
from shortstack.export.trained_exits import Array, read_exits
from shortstack.graphs.errors import RequestError, UnsupportedError
from shortstack.graphs.kv_map import check_boundaries
from shortstack.graphs.plan import ExitSpec, SplitPlan
from shortstack.graphs.spec import ModelSpec


def plan_exits(request: ExportSpec, checkpoint: Checkpoint, spec: ModelSpec) -> tuple[SplitPlan, dict[str, Array]]:
    """Return the exits of the bundle, and the weights of those that were trained.

    Args:
        request: The options of the export.
        checkpoint: The model's checkpoint.
        spec: The model.

    Raises:
        CheckpointError: Trained exits cannot be read, or do not fit the model.
        RequestError: The options do not fit the exits.
    """
    weights: dict[str, Array] = {}
    plain = request.exit_layers
    if request.exits is not None:
        trained, weights = read_exits(request.exits, spec)
    elif stored := checkpoint.exits(spec):
        chosen = _chosen(stored, request, spec)
        trained, plain = tuple(exit_.spec for exit_ in chosen), ()
        for exit_ in chosen:
            weights |= exit_.read()
    else:
        trained = ()
    if twice := sorted({e.exit_layer for e in trained} & set(plain)):
        raise RequestError(
            f"--exit-layer {twice[0]} is also the depth of an exit in {request.exits}",
            remedy=f"leave out --exit-layer {twice[0]}",
        )
    if request.draft_vocab is not None and not trained and not plain:
        raise RequestError(
            "--draft-vocab trims the head of an exit, and there is no exit",
            remedy="add --exit-layer E or --exits FOLDER",
        )
    exits = []
    for exit_spec in (*trained, *(ExitSpec(e) for e in plain)):
        is_whole = exit_spec.head == "shared" and exit_spec.draft_vocab is None
        exits.append(replace(exit_spec, draft_vocab=request.draft_vocab) if is_whole else exit_spec)
    if request.draft_vocab is not None and tuple(exits) == trained:
        raise RequestError(
            "--draft-vocab trims exit heads that are the LM head, and no exit has a whole one",
            remedy="leave it out: the heads of these exits were chosen when they were trained",
        )
    plan = SplitPlan(spec.num_hidden_layers, tuple(sorted(exits, key=lambda e: e.exit_layer)))
    check_boundaries(spec.kv_map, plan.boundaries)
    return plan, weights


def _chosen(stored: Sequence[StoredExit], request: ExportSpec, spec: ModelSpec) -> list[StoredExit]:
    """Return those exits of a checkpoint that ``--exit-layer`` selects, all without it."""
    depths = [exit_.spec.exit_layer for exit_ in stored]
    if unknown := sorted(set(request.exit_layers) - set(depths)):
        raise RequestError(
            f"{request.checkpoint} was trained with exits, and none is at --exit-layer",
            found=", ".join(map(str, unknown)),
            expected=f"layers run before one of its exits: {', '.join(map(str, depths))}",
            remedy="leave out --exit-layer to export all of them",
        )
    chosen = [exit_ for exit_ in stored if not request.exit_layers or exit_.spec.exit_layer in request.exit_layers]
    inside = [depth for depth in depths if 0 < depth < spec.num_hidden_layers]
    if outside := [exit_.spec.exit_layer for exit_ in chosen if exit_.spec.exit_layer not in inside]:
        raise UnsupportedError(
            f"{request.checkpoint} has exits before its first or after its last layer",
            found=f"after {', '.join(map(str, outside))} of {spec.num_hidden_layers} layers",
            remedy=f"choose others: {' '.join(f'--exit-layer {depth}' for depth in inside)}"
            if inside
            else "train exits between the layers",
        )
    return chosen
