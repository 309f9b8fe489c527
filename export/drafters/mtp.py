"""Layers for multi-token prediction inside a model's own checkpoint (https://arxiv.org/abs/2412.19437).

::

    MiMo             model.mtp_layers.0.{token_layernorm, hidden_layernorm, input_proj, final_layernorm, self_attn...}
    DeepSeek, GLM    model.layers.L.{enorm, hnorm, eh_proj, shared_head.norm, self_attn...}, L the number of layers

MiMo's projection reads [state ; token], the others' [token ; state].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from shortstack.export.drafters.drafter import Drafter, ModelOfDrafter, layer_tensors
from shortstack.graphs.drafter_spec import DrafterSpec
from shortstack.graphs.drafter_weights import FINAL_NORM, INPUT, STATE_NORM, TOKEN_NORM
from shortstack.graphs.errors import CheckpointError, UnsupportedError


@dataclass(frozen=True, slots=True)
class _Naming:
    """How a family names such a layer; ``{layer}`` is the number of the model's layers, ``{next}`` that of the next."""

    layer: str
    more: str
    tensors: dict[str, str]
    state_first: bool


_NAMINGS = (
    _Naming(
        "model.mtp_layers.0",
        "model.mtp_layers.1",
        {
            TOKEN_NORM: "token_layernorm",
            STATE_NORM: "hidden_layernorm",
            INPUT: "input_proj",
            FINAL_NORM: "final_layernorm",
        },
        state_first=True,
    ),
    _Naming(
        "model.layers.{layer}",
        "model.layers.{next}",
        {TOKEN_NORM: "enorm", STATE_NORM: "hnorm", INPUT: "eh_proj", FINAL_NORM: "shared_head.norm"},
        state_first=False,
    ),
)


def read_mtp(model: ModelOfDrafter) -> Drafter:
    """Read the layer for multi-token prediction that a model's checkpoint has.

    Raises:
        CheckpointError: It has none, or not all of it.
        UnsupportedError: It has several, or the last layer of the model is not like it.
    """
    checkpoint, spec = model.checkpoint, model.spec
    present, depth = checkpoint.names(), spec.num_hidden_layers
    for naming in _NAMINGS:
        prefix = naming.layer.format(layer=depth)
        if any(name.startswith(f"{prefix}.") for name in present):
            break
    else:
        raise CheckpointError(
            f"{checkpoint.source} has no layer for multi-token prediction",
            expected=f"tensors such as {_NAMINGS[0].layer}.input_proj.weight, or model.layers.{depth}.eh_proj.weight",
            remedy="take the checkpoint from the model's original repository, since copies often leave them out",
        )
    more = naming.more.format(next=depth + 1)
    if any(name.startswith(f"{more}.") for name in present):
        raise UnsupportedError(
            f"{checkpoint.source} has several layers for multi-token prediction",
            found=f"{prefix} and {more}",
            expected="one, which drafts all tokens of a round",
        )
    layer = replace(spec.layers[-1], attention=replace(spec.layers[-1].attention, window=0))
    norm = spec.ends.final_norm
    if layer.per_layer_input is not None or norm.has_bias or not spec.owns_kv(depth - 1):
        raise UnsupportedError(f"{checkpoint.source}: a layer for multi-token prediction in a model of this family")
    found = DrafterSpec(
        kind="mtp",
        hidden_size=spec.hidden_size,
        layers=(layer,),
        norm=norm,
        state_first=naming.state_first,
        feedback="normed",
        embed_scale=spec.ends.embed_scale,
        most_drafts=1,
    )
    tensors = {part: f"{prefix}.{name}.weight" for part, name in naming.tensors.items()}
    return Drafter(checkpoint, found, tensors, (layer_tensors(prefix, found, 0),)).checked(model)
