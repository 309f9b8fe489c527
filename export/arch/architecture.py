"""Describes a model family to the exporter, as data: how its config is read and what its tensors are called.

Shared code asks an :class:`Architecture` for tensors by role and never asks which family it has. Roles::

    embed_tokens.weight                               [vocab, hidden]
    per layer: input_norm.weight                      [hidden]
               q_proj  k_proj  v_proj                 [heads * head_dim, hidden], kv_heads for k and v
               o_proj                                 [hidden, heads * head_dim]
               post_attention_norm.weight             [hidden]
               gate_proj  up_proj                     [intermediate, hidden]
               down_proj                              [hidden, intermediate]
    final_norm.weight                                 [hidden]
    lm_head.weight                                    [vocab, hidden], absent from a tied model

A projection has the roles ``<name>.weight`` and, if the family's config says so, ``<name>.bias``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from shortstack.export.checkpoint.checkpoint import ROPE_FACTORS
from shortstack.export.checkpoint.config import Config
from shortstack.graphs.spec import ModelSpec

EMBEDDING, LM_HEAD = "embed_tokens.weight", "lm_head.weight"
"""Roles of the two matrices that a tied model has as one."""


@dataclass(frozen=True)
class Architecture:
    """One model family.

    Attributes:
        model_type: Its name in ``config.json``.
        read_spec: Turns a config into a spec, or raises a CheckpointError.
        tensor_names: Tensor names by role; ``{layer}`` stands for the layer's number.
    """

    model_type: str
    read_spec: Callable[[Config], ModelSpec]
    tensor_names: Mapping[str, str]

    def tensor_name(self, role: str, layer: int | None = None) -> str:
        """Return the name of the tensor that plays ``role``; a role that every layer has needs ``layer``.

        Raises:
            KeyError: There is no such role.
            ValueError: Every layer has the role and no layer is given, or the other way round.
        """
        pattern = self.tensor_names[role]
        if ("{layer}" in pattern) != (layer is not None):
            raise ValueError(f"role {role} is {'one per layer' if layer is None else 'not one per layer'}")
        return pattern if layer is None else pattern.replace("{layer}", str(layer))


def layer_shapes(spec: ModelSpec, layer: int) -> dict[str, tuple[int, ...]]:
    """Return the tensor shapes of one layer, by role; a K,V consumer has no k and v projections."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q_rows, kv_rows = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    projections = {
        "q_proj": ((q_rows, hidden), spec.qkv_bias),
        "k_proj": ((kv_rows, hidden), spec.qkv_bias),
        "v_proj": ((kv_rows, hidden), spec.qkv_bias),
        "o_proj": ((hidden, q_rows), spec.attention_out_bias),
        "gate_proj": ((inner, hidden), spec.mlp_bias),
        "up_proj": ((inner, hidden), spec.mlp_bias),
        "down_proj": ((hidden, inner), spec.mlp_bias),
    }
    if spec.kv_map[layer] != layer:
        del projections["k_proj"], projections["v_proj"]
    shapes: dict[str, tuple[int, ...]] = {"input_norm.weight": (hidden,), "post_attention_norm.weight": (hidden,)}
    for name, (shape, has_bias) in projections.items():
        shapes[f"{name}.weight"] = shape
        if has_bias:
            shapes[f"{name}.bias"] = shape[:1]
    return shapes


def expected_tensors(arch: Architecture, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that a checkpoint of this family and spec must hold, by tensor name."""
    expected = {
        arch.tensor_name(EMBEDDING): (spec.vocab_size, spec.hidden_size),
        arch.tensor_name("final_norm.weight"): (spec.hidden_size,),
    }
    if not spec.tie_word_embeddings:
        expected[arch.tensor_name(LM_HEAD)] = (spec.vocab_size, spec.hidden_size)
    if spec.rope_scaling.kind == "factors":
        expected[ROPE_FACTORS] = (spec.head_dim // 2,)
    for layer in range(spec.num_hidden_layers):
        for role, shape in layer_shapes(spec, layer).items():
            expected[arch.tensor_name(role, layer)] = shape
    return expected
