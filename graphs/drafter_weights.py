"""The weights of a trained drafter: their names in a bundle, and their shapes. Standard library only."""

from __future__ import annotations

import re
from dataclasses import replace

from shortstack.graphs import names
from shortstack.graphs.drafter_spec import DrafterSpec
from shortstack.graphs.layer_weights import Shape, Weight, layer_weights, matrix_parts, stored_shapes

FUSE = "fuse.weight"  # [hidden, features * model's hidden]
FEATURE_NORM = "feature_norm"
TOKEN_NORM = "token_norm.weight"
STATE_NORM = "state_norm.weight"
INPUT = "input.weight"  # [hidden, 2 * state]
INPUT_BIAS = "input.bias"
FINAL_NORM = "norm.weight"
EMBED_TOKENS = "embed_tokens.weight"
HEAD = "head.weight"
HEAD_IDS = "head.ids"
OUTPUT = "output.weight"  # [state, hidden]
CENTROIDS = "centroids.weight"  # [centroids, hidden]
MODEL_NORM = "model_norm.weight"  # the model's final norm as it was trained: quantization may scale the model's own
_STAGE = re.compile(r"stages\.([1-9]\d*)\.|layers\.(\d+)\.")
ROWS = (EMBED_TOKENS, HEAD)  # one row per token: stored so


def drafter_layer_weights(drafter: DrafterSpec, layer: int) -> tuple[Weight, ...]:
    """Return the weights of one of a drafter's layers, in the order in which a bundle stores them."""
    table = layer_weights(drafter.layers[layer], drafter.hidden_size, owns_kv=not drafter.shared)
    if not drafter.is_stacked or layer:
        return table
    width = drafter.input_width
    return tuple(
        replace(weight, shape=(weight.shape[0], width)) if weight.is_matrix and weight.reads == "stream" else weight
        for weight in table
    )


def stage_part(part: str, stage: int) -> str:
    """Return a part outside the layers of one of several stages; those of the first have no prefix."""
    return part if stage == 0 else f"stages.{stage}.{part}"


def stage_of(drafter: DrafterSpec, part: str) -> int:
    """Return the stage whose graph has a part."""
    found = _STAGE.match(part) if drafter.layer_per_draft else None
    return 0 if found is None else int(found[1] or found[2])


def feature_norms(drafter: DrafterSpec) -> tuple[str, ...]:
    """Return the parts of the norms of features: none, one, or one for each."""
    if drafter.feature_norm == "none":
        return ()
    if drafter.feature_norm == "all":
        return (f"{FEATURE_NORM}.weight",)
    return tuple(f"{FEATURE_NORM}.{number}.weight" for number in range(len(drafter.features)))


def end_parts(drafter: DrafterSpec, model_hidden: int, vocab: int) -> dict[str, Shape]:
    """Return the shape of each weight outside the layers, by part; matrices [out, in].

    Args:
        drafter: The drafter.
        model_hidden: Width of the model's residual stream.
        vocab: Token ids of the model.
    """
    hidden, count = drafter.hidden_size, len(drafter.features)
    parts: dict[str, Shape] = {}
    if count:
        norm_width = model_hidden * (count if drafter.feature_norm == "all" else 1)
        parts |= dict.fromkeys(feature_norms(drafter), (norm_width,))
        parts[FUSE] = (hidden, count * model_hidden)
    else:
        parts[MODEL_NORM] = (model_hidden,)
    own = _stage_parts(drafter, vocab)
    for stage in range(drafter.stages):
        parts |= {stage_part(part, stage): shape for part, shape in own.items()}
    if drafter.has_head_ids:
        parts[HEAD_IDS] = (vocab if drafter.draft_vocab is None else drafter.draft_vocab,)
    return parts


def _stage_parts(drafter: DrafterSpec, vocab: int) -> dict[str, Shape]:
    """Return the shape of each weight outside the layers that every stage has, by part."""
    hidden = drafter.hidden_size
    parts: dict[str, Shape] = {}
    if drafter.has_own_embedding:
        parts[EMBED_TOKENS] = (vocab, drafter.state_width)
    if drafter.has_token_norm:
        parts[TOKEN_NORM] = (drafter.state_width,)
    if drafter.has_state_norm:
        parts[STATE_NORM] = (drafter.state_width,)
    if not drafter.is_stacked:
        parts[INPUT] = (hidden, drafter.input_width)
    if drafter.input_bias:
        parts[INPUT_BIAS] = (hidden,)
    if drafter.has_final_norm:
        parts[FINAL_NORM] = (hidden,)
    if drafter.state_size:
        parts[OUTPUT] = (drafter.state_size, hidden)
    if drafter.centroids:
        parts[CENTROIDS] = (drafter.centroids, hidden)
    if drafter.has_own_head:
        parts[HEAD] = (vocab if drafter.draft_vocab is None else drafter.draft_vocab, hidden)
    return parts


def stored_drafter(drafter: DrafterSpec, model_hidden: int, vocab: int) -> dict[str, Shape]:
    """Return what a bundle stores of a drafter, by the name in the bundle; matrices [out, in]."""
    found = {names.drafter_weight(part): shape for part, shape in end_parts(drafter, model_hidden, vocab).items()}
    for layer, own in enumerate(drafter.layers):
        shapes = stored_shapes(drafter_layer_weights(drafter, layer), own.attention)
        found |= {names.drafter_weight(f"layers.{layer}.{part}"): shape for part, shape in shapes.items()}
    return found


def drafter_matrices(drafter: DrafterSpec, model_hidden: int, vocab: int) -> dict[str, tuple[int, int]]:
    """Return the matrices [out, in] of a drafter that a bundle may store in blocks, by name."""
    found = stored_drafter(drafter, model_hidden, vocab)
    return {name: (shape[0], shape[1]) for name, shape in found.items() if len(shape) == 2}


def is_rows(name: str) -> bool:
    """Whether a matrix of a drafter has one row per token, and is stored as [rows, in] in floats too."""
    prefix = names.drafter_weight("")
    return name.startswith(prefix) and _STAGE.sub("", name.removeprefix(prefix), count=1) in ROWS


def layer_matrices(drafter: DrafterSpec, layer: int) -> dict[str, str]:
    """Return the parts of a layer that are matrices, with what each of them reads."""
    return matrix_parts(drafter_layer_weights(drafter, layer))
