"""Describes a model family to the exporter, as data: how its config is read, and which tensors its weights come from.

Shared code asks an :class:`Architecture` for tensors by role and never asks which family it has. The roles of a layer
are those of :mod:`shortstack.graphs.layer_weights`; those of the whole model are::

    embed_tokens.weight                  [vocab, hidden]
    embed_positions.weight               [positions, hidden], of a model with learned positions
    final_norm.weight, final_norm.bias   [hidden]; a bias where the norm has one
    lm_head.weight                       [vocab, hidden], absent from a tied model
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from shortstack.export.checkpoint.checkpoint import HEAD, ROPE_FACTORS, names_of_heads
from shortstack.export.checkpoint.config import Config
from shortstack.graphs.layer_weights import Shape
from shortstack.graphs.spec import ModelSpec

EMBEDDING, LM_HEAD, FINAL_NORM = "embed_tokens.weight", "lm_head.weight", "final_norm.weight"
POSITIONS = "embed_positions.weight"
"""Roles; a tied model has the first two as one."""

RopePairs = Literal["halves", "neighbours"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a checkpoint has one weight.

    Attributes:
        tensor: The tensor's name; ``{layer}`` stands for the layer's number. ``{head}``: each head has a tensor of its
            own, with its number in the name.
        stacked: The roles, without ``.weight`` or ``.bias``, whose rows the tensor holds one after the other; empty if
            it holds this one alone.
        by_head: The rows of the stacked roles alternate head by head, as in GPT-NeoX.
        transposed: The tensor is [in, out], as in GPT-2.
        plus: What is added to each value, such as 1 to the norms of Gemma.
        layers: The tensor holds all layers side by side, along its ``rows`` or its ``columns``, or is the ``same`` for
            all; empty if it is one layer's.
    """

    tensor: str
    stacked: tuple[str, ...] = ()
    by_head: bool = False
    transposed: bool = False
    plus: float = 0.0
    layers: Literal["", "rows", "columns", "same"] = ""


@dataclass(frozen=True)
class Architecture:
    """One model family.

    Attributes:
        model_type: Its name in ``config.json``.
        read_spec: Turns a config into a spec, or raises a CheckpointError.
        write_config: Turns a spec into the fields of a config that :attr:`read_spec` reads back.
        sources: The tensor of each role.
        prefixes: What the names of tensors begin with: first in ``sources``, then in other files of the family.
        unread: A regular expression of the tensors that are no part of the language model.
        rope_pairs: Which columns of a head the checkpoint rotates together: ``halves``, i with i + dims / 2, or
            ``neighbours``, 2i with 2i + 1.
        is_in_transformers: Whether transformers has such a model, so that it can be the reference of a parity check.
    """

    model_type: str
    read_spec: Callable[[Config], ModelSpec]
    write_config: Callable[[ModelSpec], dict[str, Any]]
    sources: Mapping[str, Source]
    prefixes: tuple[str, ...] = ("",)
    unread: str = ""
    rope_pairs: RopePairs = "halves"
    is_in_transformers: Callable[[ModelSpec], bool] = field(default=lambda spec: True)

    def source(self, role: str) -> Source:
        """Return where the checkpoint has a role.

        Raises:
            KeyError: There is no such role.
        """
        return self.sources[role]

    def tensor_name(self, role: str, layer: int | None = None) -> str:
        """Return the name of the tensor that plays ``role``; a role that every layer has needs ``layer``.

        Raises:
            KeyError: There is no such role.
            ValueError: Every layer has the role and no layer is given, or the other way round.
        """
        pattern, holds_all = self.sources[role].tensor, bool(self.sources[role].layers)
        if holds_all and layer is not None:
            return pattern
        if ("{layer}" in pattern) != (layer is not None):
            raise ValueError(f"role {role} is {'one per layer' if layer is None else 'not one per layer'}")
        return pattern if layer is None else pattern.replace("{layer}", str(layer))


def end_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Return the shapes of the weights outside the layers, by role."""
    table = (spec.vocab_size, spec.hidden_size)
    shapes: dict[str, Shape] = {EMBEDDING: table, FINAL_NORM: (spec.hidden_size,)}
    if spec.ends.learned_positions:
        shapes[POSITIONS] = (spec.ends.learned_positions, spec.hidden_size)
    if spec.ends.final_norm.has_bias:
        shapes["final_norm.bias"] = (spec.hidden_size,)
    return shapes if spec.tie_word_embeddings else {**shapes, LM_HEAD: table}


def layer_shapes(spec: ModelSpec, layer: int) -> dict[str, Shape]:
    """Return the shapes of the weights of one layer, by role."""
    return {weight.role: weight.shape for weight in spec.weights(layer)}


def expected_tensors(arch: Architecture, spec: ModelSpec) -> dict[str, Shape]:
    """Return the shape of every tensor that a checkpoint of this family and spec must hold, by tensor name."""
    expected = {arch.tensor_name(role): shape for role, shape in end_shapes(spec).items()}
    for rope in spec.ropes:
        if rope.scaling.kind == "factors":
            expected[ROPE_FACTORS] = (rope.head_dim // 2,)
    for layer in range(spec.num_hidden_layers):
        shapes = layer_shapes(spec, layer)
        for role, shape in shapes.items():
            source, kind = arch.source(role), role.rsplit(".", 1)[1]
            own = (shapes.get(f"{name}.{kind}") for name in source.stacked)  # queries alone, where K,V are another's
            rows = sum(stacked[0] for stacked in own if stacked is not None) or shape[0]
            stored = (rows, *shape[1:])
            if source.layers in ("rows", "columns"):
                axis = ("rows", "columns").index(source.layers)
                stored = tuple(n * (spec.num_hidden_layers if i == axis else 1) for i, n in enumerate(stored))
            name, head_dim = arch.tensor_name(role, layer), spec.layers[layer].attention.head_dim
            if HEAD in name:
                expected |= dict.fromkeys(names_of_heads(name, shape[0] // head_dim), (head_dim,))
                continue
            expected[name] = stored[::-1] if source.transposed else stored
    return expected
