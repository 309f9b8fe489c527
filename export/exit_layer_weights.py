"""Converts the block of a trained exit, a whole decoder layer, to the names and shapes in which a bundle stores it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from shortstack.export.tensors import Floats, packed
from shortstack.graphs import names
from shortstack.graphs.exit_parts import BLOCK
from shortstack.graphs.layer_weights import parameter_name, stored_shapes
from shortstack.graphs.spec import ModelSpec


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
    attention, table = spec.exit_block_layer(exit_layer).attention, spec.exit_block_weights(exit_layer)

    def tensor(role: str) -> Floats:
        name = names.exit_weight(exit_layer, f"{BLOCK}.{parameter_name(role)}")
        return np.asarray(weights[name], np.float32)

    roles = {weight.role: tensor(weight.role) for weight in table}
    return {
        names.exit_weight(exit_layer, f"{BLOCK}.{part}"): packed(part, table, roles, attention)
        for part in stored_shapes(table, attention)
    }
