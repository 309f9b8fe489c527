"""What each matrix of a bundle is made of: tensors of the checkpoint, stacked along rows, heads padded or not.

q, k and v are one matrix; every other one is one tensor. Names and numbers only: nothing is read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shortstack.export.arch.architecture import Architecture
from shortstack.graphs import names
from shortstack.graphs.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class MatrixSource:
    """Where one matrix [out, in] comes from.

    Attributes:
        tensors: Tensors [out, in] of the checkpoint, stacked along rows.
        row_heads: Heads that the rows of each tensor are padded to cache_head_dim in; empty if rows stay as they are.
        column_heads: The same for the columns of the one tensor; 0 if columns stay as they are.
    """

    tensors: tuple[str, ...]
    row_heads: tuple[int, ...] = ()
    column_heads: int = 0

    @property
    def pads_columns(self) -> bool:
        """Whether columns move, so that blocks along them cannot be kept."""
        return self.column_heads > 0


def qkv_heads(spec: ModelSpec) -> dict[str, int]:
    """Return how many heads the rows of q, k and v hold, in the order in which they are stacked."""
    return {"q_proj": spec.num_attention_heads, "k_proj": spec.num_key_value_heads, "v_proj": spec.num_key_value_heads}


def matrix_sources(arch: Architecture, spec: ModelSpec) -> Mapping[str, MatrixSource]:
    """Return what each matrix of the model is made of, by its name in a bundle; exits excluded."""
    is_padded = spec.cache_head_dim != spec.head_dim
    heads = qkv_heads(spec)
    found = {names.EMBED_TOKENS: MatrixSource((arch.tensor_name("embed_tokens.weight"),))}
    for layer in range(spec.num_hidden_layers):
        found[names.layer_weight(layer, "attn.qkv_proj.weight")] = MatrixSource(
            tuple(arch.tensor_name(f"{part}.weight", layer) for part in heads),
            row_heads=tuple(heads.values()) if is_padded else (),
        )
        found[names.layer_weight(layer, "attn.o_proj.weight")] = MatrixSource(
            (arch.tensor_name("o_proj.weight", layer),),
            column_heads=spec.num_attention_heads if is_padded else 0,
        )
        for part in ("gate_proj", "up_proj", "down_proj"):
            found[names.layer_weight(layer, f"mlp.{part}.weight")] = MatrixSource(
                (arch.tensor_name(f"{part}.weight", layer),)
            )
    if not spec.tie_word_embeddings:
        found[names.LM_HEAD] = MatrixSource((arch.tensor_name("lm_head.weight"),))
    return found
