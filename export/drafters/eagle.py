"""EAGLE-1 and EAGLE-2 heads (https://arxiv.org/abs/2401.15077): one layer that predicts the model's next state.

Their weights are the same; EAGLE-2 drafts a tree, shortstack a chain.
"""

from __future__ import annotations

from dataclasses import replace

from shortstack.export.checkpoint.checkpoint import Checkpoint
from shortstack.export.drafters.drafter import (
    Drafter,
    ModelOfDrafter,
    layer_tensors,
    read_layers,
    with_model_ropes,
)
from shortstack.graphs.drafter_spec import DrafterSpec
from shortstack.graphs.drafter_weights import EMBED_TOKENS, INPUT, INPUT_BIAS


def read_eagle(checkpoint: Checkpoint, model: ModelOfDrafter) -> Drafter:
    """Read an EAGLE head; errors as in :func:`~shortstack.export.drafters.open_drafter`."""
    config, present = checkpoint.config, checkpoint.names()
    read = read_layers(config)
    layers = (replace(read.layers[0], before_attention=None), *read.layers[1:])
    layers, ropes = with_model_ropes(layers, read.ropes, model.spec)
    spec = DrafterSpec(
        kind="eagle",
        hidden_size=read.hidden_size,
        layers=layers,
        norm=read.ends.final_norm,
        ropes=ropes,
        has_token_norm=False,
        has_state_norm=False,
        input_bias=config.read(bool, "bias", True) and "fc.bias" in present,
        has_final_norm=False,
        has_own_embedding="embed_tokens.weight" in present,
    )
    tensors = {INPUT: "fc.weight", INPUT_BIAS: "fc.bias", EMBED_TOKENS: "embed_tokens.weight"}
    found = tuple(layer_tensors(f"layers.{number}", spec, number) for number in range(len(layers)))
    return Drafter(checkpoint, spec, tensors, found).checked(model)
