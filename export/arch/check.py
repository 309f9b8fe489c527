"""Compares the tensors of a checkpoint with those that its config describes, and reports all differences at once."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from shortstack.export.arch.architecture import EMBEDDING, LM_HEAD, Architecture, expected_tensors
from shortstack.export.checkpoint.checkpoint import Checkpoint
from shortstack.graphs.errors import CheckpointError
from shortstack.graphs.layer_weights import layer_weights
from shortstack.graphs.spec import ModelSpec

_MAX_LISTED = 10
_DRAFTING = re.compile(r"model\.layers\.(\d+)\.(eh_proj|enorm|hnorm)\.")
_HARMLESS = re.compile(r"(.*\.)?(rotary_emb\.(inv_freq|weight)|(attn|attention)\.(bias|masked_bias))")
"""Rotary frequencies and causal masks. Old checkpoints store them, although they follow from the config. Divisors of
frequencies in GGUF files do not."""


def check_tensors(checkpoint: Checkpoint, arch: Architecture, spec: ModelSpec) -> None:
    """Check the names and shapes of all tensors; a tied model may store its LM head too, if it equals the embedding.

    Layers that use another one's keys and values may still hold ``k_proj`` and ``v_proj``, which are never read.
    Training code often keeps them, and a model may be a copy of one that did not share yet.

    Raises:
        CheckpointError: A tensor is missing, extra or misshapen, or a layer's queries do not fit the K,V that it reads.
            The message lists all of them.
    """
    expected = expected_tensors(arch, spec)
    names = checkpoint.names()
    head = arch.tensor_name(LM_HEAD)
    missing = [name for name in expected if name not in names]
    unread = _unread(arch, spec)
    drafting = drafting_layers(checkpoint, spec)
    extra = sorted(
        name for name in names - expected.keys() - unread if not (_is_unread(arch, name) or name.startswith(drafting))
    )
    extra = [name for name in extra if not _is_bias_of_nothing(checkpoint, name)]
    misshapen = [
        f"{name} is {list(checkpoint.shape(name))}, not {list(shape)}{_transposed(checkpoint.shape(name), shape)}"
        for name, shape in expected.items()
        if name in names and checkpoint.shape(name) != shape
    ]
    stored_head_of_tied = spec.tie_word_embeddings and head in extra
    if stored_head_of_tied:
        extra.remove(head)
    unfit = _unfit_queries(checkpoint, arch, spec)
    differences = (
        ("missing", missing, ", "),
        ("extra", extra, ", "),
        ("misshapen", misshapen, ", "),
        ("with queries that do not fit the shared K,V", unfit, "; "),
    )
    problems = [f"{len(found)} {what} ({_listed(found, between)})" for what, found, between in differences if found]
    if head in missing:
        problems.append(f"{head} may be absent only if tie_word_embeddings is true, and it is false")
    if problems:
        raise CheckpointError(
            f"{checkpoint.folder_or_file} does not hold the tensors that its config describes: {'; '.join(problems)}",
            remedy="check that weights and config belong to the same model",
        )
    if stored_head_of_tied:
        _check_same(checkpoint, arch.tensor_name(EMBEDDING), head)


def drafting_layers(checkpoint: Checkpoint, spec: ModelSpec) -> tuple[str, ...]:
    """Return what the tensors of layers above the last one begin with, if these predict further tokens (MTP)."""
    above = (_DRAFTING.match(name) for name in checkpoint.names())
    numbers = {int(match[1]) for match in above if match}
    return tuple(f"model.layers.{number}." for number in sorted(numbers) if number >= spec.num_hidden_layers)


def _is_unread(arch: Architecture, name: str) -> bool:
    """Whether a tensor is none of the language model's weights."""
    return bool(_HARMLESS.fullmatch(name) or (arch.unread and re.match(arch.unread, name)))


def _is_bias_of_nothing(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor is a bias of zeros beside a quantized matrix, which old versions of AutoGPTQ always stored."""
    weight = f"{name.removesuffix('bias')}weight"
    is_beside = name.endswith(".bias") and weight in checkpoint.names() and checkpoint.blocks(weight) is not None
    return is_beside and not checkpoint.tensor(name).any()


def _transposed(found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    return ", but its transpose" if found == expected[::-1] else ""


def _unread(arch: Architecture, spec: ModelSpec) -> set[str]:
    """Return the tensors that layers which use another one's keys and values would have for their own."""
    unread: set[str] = set()
    for number, layer in enumerate(spec.layers):
        read = {weight.role for weight in spec.weights(number)}
        every = [weight.role for weight in layer_weights(layer, spec.hidden_size)]
        names = [name for name in ("k_proj.bias", "v_proj.bias") if name in arch.sources and not spec.owns_kv(number)]
        unread |= {arch.tensor_name(role, number) for role in (*every, *names) if role not in read}
    return unread


def _unfit_queries(checkpoint: Checkpoint, arch: Architecture, spec: ModelSpec) -> list[str]:
    """Describe the layers whose query heads are wider or narrower than the heads of the K,V that they share."""
    unfit = []
    for layer, producer in enumerate(spec.kv_map):
        if arch.source("q_proj.weight").stacked:
            continue
        attention = spec.layers[layer].attention
        q_name = arch.tensor_name("q_proj.weight", layer)
        k_rows = _rows(checkpoint, arch.tensor_name("k_proj.weight", producer))
        q_rows = _rows(checkpoint, q_name)
        if layer == producer or not q_rows or not k_rows or k_rows % attention.kv_heads:
            continue  # the layer shares nothing, or one of the two tensors is missing or misshapen
        head_dim = k_rows // attention.kv_heads
        if q_rows != (wanted := attention.heads * head_dim):
            unfit.append(
                f"layer {layer} reads K,V of layer {producer}, whose heads are {head_dim} wide: {q_name} must have "
                f"{attention.heads} x {head_dim} = {wanted} rows and has {q_rows}"
            )
    return unfit


def _rows(checkpoint: Checkpoint, name: str) -> int:
    """Return the number of rows of a tensor, 0 if it is missing or has no dimensions."""
    shape = checkpoint.shape(name) if name in checkpoint.names() else ()
    return shape[0] if shape else 0


def _check_same(checkpoint: Checkpoint, embedding: str, head: str) -> None:
    same = checkpoint.shape(embedding) == checkpoint.shape(head) and np.array_equal(
        checkpoint.tensor(embedding).view(np.uint32), checkpoint.tensor(head).view(np.uint32)
    )
    if not same:
        raise CheckpointError(
            f"{checkpoint.config.where('tie_word_embeddings')} is true, but {head} differs from {embedding}",
            remedy="set tie_word_embeddings to false if the model has its own head, else remove that tensor",
        )


def _listed(names: Sequence[str], between: str) -> str:
    shown = between.join(names[:_MAX_LISTED])
    return shown if len(names) <= _MAX_LISTED else f"{shown} and {len(names) - _MAX_LISTED} more"
