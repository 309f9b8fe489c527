"""Assistants: drafters without keys and values of their own, as Google publishes them for Gemma 4.

::

    gemma4_assistant, gemma4_unified_assistant    as transformers saves them
    shortstack_assistant                          the same tensors, for a model of any family, with these differences:
                                                  kv_layers in config.json, one layer of the model for each layer;
                                                  text_config may be of the families of Llama, and rotates as the
                                                  model does where it says nothing of it; token_norm.weight,
                                                  state_norm.weight and d2t may be there, and a head need not be

    pre_projection.weight [H, 2B]        of [scaled embedding ; state], B the model's width, H the assistant's
    model.layers.N...                    q_proj, q_norm, o_proj, MLP and norms as the family of text_config names them
    model.norm.weight, post_projection.weight [B, H]
    model.embed_tokens.weight [V, H]     the head, or lm_head.weight where they are not tied
    masked_embedding.centroids.weight, masked_embedding.token_ordering   of a head with centroids
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from shortstack.export.arch import ARCHITECTURES
from shortstack.export.checkpoint.checkpoint import Checkpoint
from shortstack.export.checkpoint.config import Config, not_one_of, positive
from shortstack.export.drafters.drafter import DECODER_FAMILIES, Drafter, ModelOfDrafter, draft_vocab, read_layers
from shortstack.graphs.drafter_spec import DrafterSpec
from shortstack.graphs.drafter_weights import (
    CENTROIDS,
    FINAL_NORM,
    HEAD,
    INPUT,
    OUTPUT,
    STATE_NORM,
    TOKEN_NORM,
    drafter_layer_weights,
)
from shortstack.graphs.errors import CheckpointError, UnsupportedError
from shortstack.graphs.layer_spec import Layer, Rope
from shortstack.graphs.spec import ModelSpec

_BACKBONES = {"gemma4_assistant": 1536, "gemma4_unified_assistant": 3840}  # the model's width where none is said
OWN_ASSISTANT = "shortstack_assistant"
_GEMMA_TEXT = "gemma4_text"
_TEXT_FAMILIES: Mapping[str, str] = {
    _GEMMA_TEXT: _GEMMA_TEXT,
    "gemma4_unified_text": _GEMMA_TEXT,  # which differs in what surrounds the text alone
    **{family: family for family in DECODER_FAMILIES},
}
_EMBEDDING, _LM_HEAD, _OFFSETS = "model.embed_tokens.weight", "lm_head.weight", "d2t"
_ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")
_CENTROIDS, _ORDERING = "masked_embedding.centroids.weight", "masked_embedding.token_ordering"


def is_assistant(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is an assistant, by its config."""
    return checkpoint.config.data.get("model_type") in (*_BACKBONES, OWN_ASSISTANT)


def read_assistant(checkpoint: Checkpoint, model: ModelOfDrafter) -> Drafter:
    """Read an assistant; errors as in :func:`~shortstack.export.drafters.open_drafter`."""
    config, present = checkpoint.config, checkpoint.names()
    named = config.read(str, "model_type")
    is_own = named == OWN_ASSISTANT
    text = config.section("text_config")
    if text is None:
        raise CheckpointError(
            f"{config.where('text_config')} is missing",
            expected="the config of its layers",
            remedy="take the file from the drafter's original repository",
        )
    kind, read = _read_text(text, is_own)
    if model.spec.ends.final_norm.has_bias:
        raise UnsupportedError(f"{checkpoint.source}: an assistant for a model whose final norm has a bias")
    owners = _owners(config, read, model.spec, is_own)
    problems, layers = _on_model(read, owners, model.spec, is_own, rotates=any(key in text for key in _ROPE_KEYS))
    if read.vocab_size != model.spec.vocab_size:
        problems.append(f"its vocab_size is {read.vocab_size}, and the model's {model.spec.vocab_size}")
    head = _head(config, present, is_own)
    centroids = top = 0
    if config.read(bool, "use_ordered_embeddings", False):
        centroids, top = positive(config, "num_centroids", 2048), positive(config, "centroid_intermediate_top_k", 32)
        if top > centroids:
            raise config.wrong("centroid_intermediate_top_k", f"at most num_centroids = {centroids}")
    trimmed = is_own and _OFFSETS in present and head == _LM_HEAD
    if centroids and (trimmed or head is None):
        raise config.wrong("use_ordered_embeddings", "false for a head that is trimmed, or the model's")
    spec = DrafterSpec(
        kind="assistant",
        hidden_size=read.hidden_size,
        layers=layers,
        norm=read.ends.final_norm,
        has_token_norm=is_own and "token_norm.weight" in present,
        has_state_norm=is_own and "state_norm.weight" in present,
        feedback="projected",
        embed_scale=model.spec.ends.embed_scale,
        has_own_head=head is not None,
        draft_vocab=draft_vocab(checkpoint) if trimmed else None,
        shared=owners,
        state_size=positive(config, "backbone_hidden_size", _BACKBONES.get(named)),
        centroids=centroids,
        top_centroids=top,
    )
    tensors = {
        INPUT: "pre_projection.weight",
        OUTPUT: "post_projection.weight",
        FINAL_NORM: "model.norm.weight",
        TOKEN_NORM: "token_norm.weight",
        STATE_NORM: "state_norm.weight",
        CENTROIDS: _CENTROIDS,
        **({} if head is None else {HEAD: head}),
    }
    arch = ARCHITECTURES[kind]
    found = tuple(
        {weight.role: arch.tensor_name(weight.role, number) for weight in drafter_layer_weights(spec, number)}
        for number in range(len(layers))
    )
    offsets, ordering = _OFFSETS if trimmed else None, _ORDERING if centroids else None
    return Drafter(checkpoint, spec, tensors, found, offsets, ordering=ordering).checked(model, problems)


def _read_text(text: Config, is_own: bool) -> tuple[str, ModelSpec]:
    """Return the family of the layers, and a model of them."""
    named = text.read(str, "model_type", _GEMMA_TEXT)
    known = _TEXT_FAMILIES if is_own else {own: kind for own, kind in _TEXT_FAMILIES.items() if kind == _GEMMA_TEXT}
    if named not in known:
        raise not_one_of(text.where("model_type"), named, known)
    kind = known[named]
    if kind != _GEMMA_TEXT:
        return kind, read_layers(text)
    for key in ("hidden_size_per_layer_input", "use_double_wide_mlp"):
        if text.data.get(key):
            raise UnsupportedError(text.where(key), found=repr(text.data[key]), expected="none, in an assistant")
    # All of its layers use other layers' keys and values: here, so that it is read, each has its own.
    data = {**text.data, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}
    if data.get("use_bidirectional_attention") == "vision":  # of images, which a text has not
        data["use_bidirectional_attention"] = None
    return kind, ARCHITECTURES[kind].read_spec(Config(data, text.file, text.prefix, text.remedy))


def _owners(config: Config, read: ModelSpec, model: ModelSpec, is_own: bool) -> tuple[int, ...]:
    """Return the layer of the model whose keys and values each layer reads: the last of its type, or as is said."""
    if is_own and "kv_layers" in config:
        owners = config.read_ints("kv_layers")
        outside = [owner for owner in owners if not (0 <= owner < model.num_hidden_layers and model.owns_kv(owner))]
        if len(owners) != read.num_hidden_layers or outside:
            having = [layer for layer in range(model.num_hidden_layers) if model.owns_kv(layer)]
            raise config.wrong("kv_layers", f"{read.num_hidden_layers} layers of the model, each one of {having}")
        return owners
    last = {bool(model.window(layer)): layer for layer in range(model.num_hidden_layers) if model.owns_kv(layer)}
    missing = sorted({bool(layer.attention.window) for layer in read.layers} - last.keys())
    if missing:
        kind = "sliding" if missing[0] else "full"
        raise CheckpointError(
            f"{config.file}: {kind} layers of the assistant read keys and values of a {kind} layer of the model",
            found="a model without one",
            remedy="take the drafter that was trained for this model",
        )
    return tuple(last[bool(layer.attention.window)] for layer in read.layers)


def _on_model(
    read: ModelSpec, owners: tuple[int, ...], model: ModelSpec, is_own: bool, *, rotates: bool
) -> tuple[list[str], tuple[Layer, ...]]:
    """Return the layers as they stand on the model's keys and values, and what does not fit these."""
    problems, layers = [], list[Layer]()
    for number, (layer, owner) in enumerate(zip(read.layers, owners, strict=True)):
        own, theirs = layer.attention, model.layers[owner].attention
        ours = None if own.rope is None else read.ropes[own.rope]
        rope = None if theirs.rope is None else model.ropes[theirs.rope]
        if ours != rope and (rotates or not is_own):
            problems.append(
                f"layer {number} rotates by {_rope_words(ours)}, and layer {owner} of the model by {_rope_words(rope)}"
            )
        if not is_own and own.window != theirs.window:
            windows = f"{own.window}, and layer {owner} of the model one of {theirs.window}"
            problems.append(f"layer {number} has a window of {windows}")
        # As many positions as the window says, the newest one beside them.
        window = own.window + 1 if own.window else 0
        attention = replace(own, rope=theirs.rope, window=window, v_norm=None, k_equals_v=False)
        layers.append(replace(layer, attention=attention))
    return problems, tuple(layers)


def _rope_words(rope: Rope | None) -> str:
    if rope is None:
        return "nothing"
    scaling = "" if rope.scaling.kind == "default" else f", {rope.scaling}"
    return f"theta {rope.theta:g} over {rope.dims} of {rope.head_dim} columns{scaling}"


def _head(config: Config, present: frozenset[str], is_own: bool) -> str | None:
    """Return the tensor of the head; None where an assistant of our own format uses the model's."""
    is_tied = config.read(bool, "tie_word_embeddings", True)
    if is_own:
        return next((name for name in (_LM_HEAD, _EMBEDDING) if name in present), None)
    return _EMBEDDING if is_tied and (_EMBEDDING in present or _LM_HEAD not in present) else _LM_HEAD
