"""EAGLE-3 heads (https://arxiv.org/abs/2503.01840): as EAGLE's own code saves them, and as ``speculators`` does.

::

    EAGLE         midlayer.hidden_norm, midlayer.input_layernorm, midlayer.self_attn..., fc, norm, lm_head, d2t, t2d
    speculators   layers.0. in place of midlayer.; config.json with speculators_model_type and transformer_layer_config

``t2d`` is for training alone, and is not read.
"""

from __future__ import annotations

from dataclasses import replace

from shortstack.export.checkpoint.checkpoint import Checkpoint
from shortstack.export.checkpoint.config import Config
from shortstack.export.checkpoint.gguf_names import EAGLE3_DEPTHS, EAGLE3_IDS
from shortstack.export.drafters.drafter import (
    Drafter,
    ModelOfDrafter,
    draft_vocab,
    layer_tensors,
    matrix_size,
    read_layers,
    with_model_ropes,
)
from shortstack.graphs.drafter_spec import DrafterSpec, FeatureNorm
from shortstack.graphs.drafter_weights import (
    EMBED_TOKENS,
    FEATURE_NORM,
    FINAL_NORM,
    FUSE,
    HEAD,
    STATE_NORM,
    TOKEN_NORM,
    feature_norms,
)
from shortstack.graphs.errors import CheckpointError, UnsupportedError

_FIRST_LAYERS = ("midlayer", "layers.0")
_LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
_MOST_DRAFTS = 1000  # far above any head


def is_eagle3(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is an EAGLE-3 head: a first layer with a norm of states beside that of tokens."""
    return any(f"{layer}.hidden_norm.weight" in checkpoint.names() for layer in _FIRST_LAYERS)


def read_eagle3(checkpoint: Checkpoint, model: ModelOfDrafter) -> Drafter:
    """Read an EAGLE-3 head; errors as in :func:`~shortstack.export.drafters.open_drafter`."""
    config, present = checkpoint.config, checkpoint.names()
    inner = config.section("transformer_layer_config") or config
    first = next(layer for layer in _FIRST_LAYERS if f"{layer}.hidden_norm.weight" in present)
    read = read_layers(_with_head_dim(checkpoint, inner, first))
    if read.hidden_size != model.spec.hidden_size and (
        "embed_tokens.weight" not in present or "lm_head.weight" not in present
    ):
        raise CheckpointError(
            f"{checkpoint.source} does not draft for {model.checkpoint.source}: its states are "
            f"{read.hidden_size} wide, and the model's embedding and head {model.spec.hidden_size}",
            remedy="take the drafter that was trained for this model",
        )
    features = _features(checkpoint, config, model)
    layers = (replace(read.layers[0], before_attention=None), *read.layers[1:])
    layers, ropes = with_model_ropes(layers, read.ropes, model.spec)
    trimmed = "d2t" in present
    norm: FeatureNorm = "none"
    if config.read(bool, "norm_before_fc", False):
        norm = "all"
    elif config.read(bool, "fc_norm", False) or any(name.startswith("fc_norm.") for name in present):
        norm = "each"
    head = "lm_head.weight" if "lm_head.weight" in present else None
    spec = DrafterSpec(
        kind="eagle3",
        hidden_size=read.hidden_size,
        layers=layers,
        norm=read.ends.final_norm,
        ropes=ropes,
        features=features,
        feature_norm=norm,
        is_stacked=True,
        normed_stream=config.read(bool, "norm_before_residual", False),
        feedback="normed" if config.read(bool, "norm_output", False) else "stream",
        has_own_embedding="embed_tokens.weight" in present,
        has_own_head=head is not None,
        draft_vocab=draft_vocab(checkpoint) if trimmed and head is not None else None,
        most_drafts=_trained_drafts(config),
    )
    tensors = {
        FUSE: "fc.weight",
        TOKEN_NORM: f"{first}.input_layernorm.weight",
        STATE_NORM: f"{first}.hidden_norm.weight",
        FINAL_NORM: "norm.weight",
        HEAD: "lm_head.weight",
        EMBED_TOKENS: "embed_tokens.weight",
        **{
            part: "input_norm.weight" if norm == "all" else part.replace(FEATURE_NORM, "fc_norm")
            for part in feature_norms(spec)
        },
    }
    holds_ids = config.read(bool, EAGLE3_IDS, False)
    prefixes = (first, *(f"layers.{number}" for number in range(1, len(layers))))
    found = tuple(layer_tensors(prefix, spec, number) for number, prefix in enumerate(prefixes))
    offsets = "d2t" if spec.draft_vocab is not None else None
    return Drafter(checkpoint, spec, tensors, found, offsets, holds_ids).checked(model)


def _with_head_dim(checkpoint: Checkpoint, config: Config, first: str) -> Config:
    """Return the config with the width of heads that the tensors have: fields and code disagree about its default."""
    name = f"{first}.self_attn.q_proj.weight"
    heads = config.read(int, "num_attention_heads", 0)
    if name not in checkpoint.names() or heads < 1:
        return config
    rows = matrix_size(checkpoint, name, 0)
    data = {**config.data, "head_dim": rows // heads}
    return Config(data, config.file, config.prefix, config.remedy)


def _features(checkpoint: Checkpoint, config: Config, model: ModelOfDrafter) -> tuple[int, ...]:
    """Return the depths that the head reads, each the number of layers run before."""
    depth = model.spec.num_hidden_layers
    where = next(
        (own for own in (config, config.section("eagle_config")) if own is not None and _LAYER_IDS in own), None
    )
    ids = (2, depth // 2, depth - 3) if where is None else where.read_ints(_LAYER_IDS)
    is_depth = config.read(bool, EAGLE3_DEPTHS, False)
    if (
        where is not None and ids and ids[0] == 1 and not is_depth
    ):  # the layers whose output is read; else those whose input is
        ids = tuple(number + 1 for number in ids)
    width, hidden = matrix_size(checkpoint, "fc.weight", 1), model.spec.hidden_size
    if list(ids) != sorted(set(ids)) or not all(0 < number <= depth for number in ids):
        raise CheckpointError(
            f"{checkpoint.source} reads the residual stream of {model.checkpoint.source} at depths that do not exist",
            found=", ".join(map(str, ids)) + ("" if where is not None else ", EAGLE's own for so few layers"),
            expected=f"ascending depths of 1..{depth}",
            remedy=f"correct {_LAYER_IDS} in config.json, or take the drafter that was trained for this model",
        )
    if width != len(ids) * hidden:
        raise CheckpointError(
            f"{checkpoint.source} does not draft for {model.checkpoint.source}: fc.weight reads {width} columns, and "
            f"{len(ids)} depths of the model are {len(ids)} x {hidden} wide",
            remedy=f"take the drafter that was trained for this model, or correct {_LAYER_IDS} in config.json",
        )
    return ids


def _trained_drafts(config: Config) -> int:
    """Return how many tokens of a round the head was made for, 0 where its config does not say."""
    section = config.section("speculators_config")
    methods = [] if section is None else section.data.get("proposal_methods")
    if not isinstance(methods, list) or not methods or not isinstance(methods[0], dict):
        return 0
    count = methods[0].get("speculative_tokens")
    if count is None:
        return 0
    if type(count) is not int or not 1 <= count <= _MOST_DRAFTS:
        raise UnsupportedError(f"{config.file}: speculative_tokens", found=repr(count), expected=f"1..{_MOST_DRAFTS}")
    return count
