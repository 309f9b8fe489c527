"""From a checkpoint's tensors to the tensors of weights.data: packed, transposed, padded, cast, each stored once.

What differs from the checkpoint, all of it done here so that the graphs stay plain:

- q, k and v are stacked into one projection, and every projection is stored [in, out], as MatMul takes it.
- heads are padded with zeros to a width that the attention kernel takes (:attr:`ModelSpec.cache_head_dim`); rotary
  embedding pairs column i with column i + head_dim / 2, so each half of a head is padded by itself.
- the embedding stays [vocab, hidden]: Gather and the head's Gemm both take it so, and a tied head is the same tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from shortstack.export.arch.architecture import ROPE_FACTORS, Architecture
from shortstack.export.checkpoint import Checkpoint
from shortstack.export.rope import rope_tables
from shortstack.graphs import names
from shortstack.graphs.errors import UnsupportedError
from shortstack.graphs.ir.weights import WeightStore
from shortstack.graphs.spec import DType, ModelSpec

Array = npt.NDArray[np.float32]


def store_weights(
    checkpoint: Checkpoint,
    arch: Architecture,
    spec: ModelSpec,
    dtype: DType,
    max_length: int,
    store: WeightStore,
    advance: Callable[[float], None],
) -> None:
    """Write every tensor of the model, exits excluded, to the store.

    Args:
        checkpoint: Where the tensors are.
        arch: What they are called there.
        spec: The model.
        dtype: Type to store.
        max_length: Rows of the rotary tables.
        store: Where they go.
        advance: Called with 1 after each layer.

    Raises:
        UnsupportedError: A value does not fit ``dtype``.
    """

    def read(role: str, layer: int | None = None) -> Array:
        return checkpoint.tensor(arch.tensor_name(role, layer))

    def put(name: str, array: Array) -> None:
        store.add(name, cast(name, array, dtype))

    put(names.EMBED_TOKENS, read("embed_tokens.weight"))
    for layer in range(spec.num_hidden_layers):
        _store_layer(spec, layer, partial(read, layer=layer), put)
        advance(1)
    put(names.FINAL_NORM, read("final_norm.weight"))
    if not spec.tie_word_embeddings:
        put(names.LM_HEAD, read("lm_head.weight"))
    factors = checkpoint.tensor(ROPE_FACTORS) if spec.rope_scaling.kind == "factors" else None
    for name, table, fill in zip(
        (names.ROPE_COS, names.ROPE_SIN), rope_tables(spec, max_length, factors), (1.0, 0.0), strict=True
    ):
        extra = (spec.cache_head_dim - spec.head_dim) // 2
        put(name, np.pad(table, ((0, 0), (0, extra)), constant_values=fill))


def _store_layer(spec: ModelSpec, layer: int, read: Callable[[str], Array], put: Callable[[str, Array], None]) -> None:
    heads = {"q_proj": spec.num_attention_heads, "k_proj": spec.num_key_value_heads, "v_proj": spec.num_key_value_heads}

    def stacked(kind: str) -> Array:
        return np.concatenate([pad_heads(read(f"{part}.{kind}"), n, spec) for part, n in heads.items()])

    def put_layer(part: str, array: Array) -> None:
        put(names.layer_weight(layer, part), array)

    put_layer("input_norm.weight", read("input_norm.weight"))
    put_layer("attn.qkv_proj.weight", stacked("weight").T)
    if spec.qkv_bias:
        put_layer("attn.qkv_proj.bias", stacked("bias"))
    # o_proj takes heads on its input side: padding its transpose's rows pads its columns.
    put_layer("attn.o_proj.weight", pad_heads(read("o_proj.weight").T, spec.num_attention_heads, spec))
    if spec.attention_out_bias:
        put_layer("attn.o_proj.bias", read("o_proj.bias"))
    put_layer("post_attention_norm.weight", read("post_attention_norm.weight"))
    for part in ("gate_proj", "up_proj", "down_proj"):
        put_layer(f"mlp.{part}.weight", read(f"{part}.weight").T)
        if spec.mlp_bias:
            put_layer(f"mlp.{part}.bias", read(f"{part}.bias"))


def pad_heads(array: Array, heads: int, spec: ModelSpec) -> Array:
    """Pad the leading dimension, heads * head_dim, to heads * cache_head_dim with zeros.

    Args:
        array: [heads * head_dim, ...].
        heads: How many heads it holds.
        spec: The model.
    """
    extra = (spec.cache_head_dim - spec.head_dim) // 2
    if extra == 0:
        return array
    halves = array.reshape(heads, 2, spec.head_dim // 2, *array.shape[1:])
    padded = np.pad(halves, [(0, 0), (0, 0), (0, extra), *[(0, 0)] * (array.ndim - 1)])
    return padded.reshape(heads * spec.cache_head_dim, *array.shape[1:])


def cast(name: str, array: Array, dtype: DType) -> npt.NDArray[np.floating]:
    """Return the array in another dtype.

    Raises:
        UnsupportedError: A finite value becomes infinite.
    """
    if dtype == "float32":
        return array
    with np.errstate(over="ignore"):
        out = array.astype(dtype)
    if not np.isfinite(out).all():
        raise UnsupportedError(
            f"tensor {name} does not fit float16",
            found=f"a value of {np.abs(array).max():.3g}",
            expected="at most 65504",
            remedy="export with --dtype fp32",
        )
    return out
