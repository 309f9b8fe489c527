"""Converts the block of a trained exit, a whole decoder layer, to the names and shapes in which a bundle stores it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from shortstack.export.sources import layer_sources
from shortstack.export.tensors import Floats, packed_matrix, packed_vector
from shortstack.graphs import names
from shortstack.graphs.exit_parts import BLOCK
from shortstack.graphs.layer_parts import layer_parts
from shortstack.graphs.spec import ModelSpec

# The module of each role in a folder of exits, named as in transformers' Llama.
_MODULES = {
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    **{role: f"self_attn.{role}" for role in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{role: f"mlp.{role}" for role in ("gate_proj", "up_proj", "down_proj")},
}


def pack_block(spec: ModelSpec, exit_layer: int, weights: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, Floats]:
    """Return the weights of an exit's block in the form that layers have: q, k and v in one matrix, heads padded.

    Args:
        spec: The model.
        exit_layer: Layers run before the exit.
        weights: The exit's weights, by :func:`names.exit_weight` of the parts of :func:`exit_parts`; matrices
            [out, in].

    Returns:
        The block's weights, by :func:`names.exit_weight` of the parts of :func:`stored_parts`; matrices [out, in].
    """

    def tensor(role: str) -> Floats:
        module, kind = role.rsplit(".", 1)
        name = names.exit_weight(exit_layer, f"{BLOCK}.{_MODULES[module]}.{kind}")
        return np.asarray(weights[name], np.float32)

    sources = layer_sources(spec, lambda role: role)
    packed = {}
    for part in layer_parts(spec):
        if (source := sources.get(part)) is not None:
            array = packed_matrix([tensor(role) for role in source.tensors], source, spec)
        else:
            array = packed_vector(part, tensor, spec)
        packed[names.exit_weight(exit_layer, f"{BLOCK}.{part}")] = array
    return packed
