"""Which tensors of a checkpoint make up each matrix of a bundle, and whether their heads are padded.

A *role* is shortstack's own name for a tensor of a layer, such as ``q_proj.weight``, whatever the checkpoint calls it.
q, k and v are stacked along their rows into one matrix. Every other matrix is one tensor. This module holds names and
numbers only and reads no tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from shortstack.export.arch.architecture import Architecture
from shortstack.graphs import names
from shortstack.graphs.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class MatrixSource:
    """Where one matrix [out, in] comes from.

    Attributes:
        tensors: Tensors [out, in] of the checkpoint, stacked along rows.
        row_heads: How many heads the rows of each tensor hold, each of which is padded to cache_head_dim. Empty if no
            rows are padded.
        column_heads: The same for the columns, of a matrix that is one tensor. 0 if no columns are padded.
    """

    tensors: tuple[str, ...]
    row_heads: tuple[int, ...] = ()
    column_heads: int = 0

    @property
    def pads_columns(self) -> bool:
        """Whether padding moves columns, so that blocks along them cannot be kept."""
        return self.column_heads > 0


def qkv_heads(spec: ModelSpec, *, owns_kv: bool = True) -> dict[str, int]:
    """Return how many heads the rows of q, k and v hold, in the order in which they are stacked.

    Args:
        spec: The model.
        owns_kv: The layer computes its own keys and values. A layer that uses another one's has q only.
    """
    heads = {"q_proj": spec.num_attention_heads}
    return heads | dict.fromkeys(("k_proj", "v_proj"), spec.num_key_value_heads) if owns_kv else heads


def layer_sources(
    spec: ModelSpec, tensor_name: Callable[[str], str], *, owns_kv: bool = True
) -> dict[str, MatrixSource]:
    """Return the source of each matrix of one layer, by part.

    Args:
        spec: The model.
        tensor_name: Gives the name of the tensor that plays a role.
        owns_kv: See :func:`qkv_heads`.
    """
    is_padded = spec.cache_head_dim != spec.head_dim
    heads = qkv_heads(spec, owns_kv=owns_kv)
    found = {
        names.QKV_PROJ: MatrixSource(
            tuple(tensor_name(f"{role}.weight") for role in heads), row_heads=tuple(heads.values()) if is_padded else ()
        ),
        "attn.o_proj.weight": MatrixSource(
            (tensor_name("o_proj.weight"),), column_heads=spec.num_attention_heads if is_padded else 0
        ),
    }
    for role in ("gate_proj", "up_proj", "down_proj"):
        found[f"mlp.{role}.weight"] = MatrixSource((tensor_name(f"{role}.weight"),))
    return found


def matrix_sources(arch: Architecture, spec: ModelSpec) -> Mapping[str, MatrixSource]:
    """Return the source of each matrix of the model, without its exits, by the matrix's name in a bundle."""
    found = {names.EMBED_TOKENS: MatrixSource((arch.tensor_name("embed_tokens.weight"),))}
    for layer in range(spec.num_hidden_layers):
        name_in_layer = functools.partial(arch.tensor_name, layer=layer)
        sources = layer_sources(spec, name_in_layer, owns_kv=spec.kv_map[layer] == layer)
        found |= {names.layer_weight(layer, part): source for part, source in sources.items()}
    if not spec.tie_word_embeddings:
        found[names.LM_HEAD] = MatrixSource((arch.tensor_name("lm_head.weight"),))
    return found
