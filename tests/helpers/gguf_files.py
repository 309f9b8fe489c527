"""Writes GGUF files of Llama models with the gguf package, from random weights or from those of a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import gguf
import numpy as np

from helpers.block_kinds import quantize
from helpers.tiny_models import TinyModel
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.checkpoint.gguf_names import LLAMA_NAMES, to_hugging_face

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 32, 64, 4, 2, 8, 40
SMALL = TinyModel(
    "gguf", 1, hidden=HIDDEN, intermediate=INNER, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, context=64
)
Kind = gguf.GGMLQuantizationType
Edit = Callable[[gguf.GGUFWriter], None]


def rows(*shape: int) -> np.ndarray:
    return np.random.standard_normal(shape).astype(np.float32)


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Permute the rows of q or k as llama.cpp's converter does (LlamaModel.permute)."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def weights(bias: bool = False) -> dict[str, np.ndarray]:
    """Return random weights in Hugging Face layout under GGUF names."""
    kv_rows = KV_HEADS * HEAD_DIM
    found = {
        "token_embd.weight": rows(VOCAB, HIDDEN),
        "output_norm.weight": rows(HIDDEN),
        "blk.0.attn_norm.weight": rows(HIDDEN),
        "blk.0.attn_q.weight": rows(HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": rows(kv_rows, HIDDEN),
        "blk.0.attn_v.weight": rows(kv_rows, HIDDEN),
        "blk.0.attn_output.weight": rows(HIDDEN, HIDDEN),
        "blk.0.ffn_norm.weight": rows(HIDDEN),
        "blk.0.ffn_gate.weight": rows(INNER, HIDDEN),
        "blk.0.ffn_up.weight": rows(INNER, HIDDEN),
        "blk.0.ffn_down.weight": rows(HIDDEN, INNER),
    }
    if bias:
        found |= {
            "blk.0.attn_q.bias": rows(HIDDEN),
            "blk.0.attn_k.bias": rows(kv_rows),
            "blk.0.attn_v.bias": rows(kv_rows),
        }
    return found


def write(
    file: Path,
    tensors: dict[str, np.ndarray],
    *,
    edit: Edit | None = None,
    architecture: str = "llama",
    skip: tuple[str, ...] = (),
    quantization: Kind | None = None,
    kinds: Mapping[str, Kind] = MappingProxyType({}),
    tiny: TinyModel = SMALL,
) -> Path:
    """Write a GGUF file.

    Args:
        file: The file to write.
        tensors: The tensors in Hugging Face layout, under GGUF names.
        edit: Adds fields to the metadata.
        architecture: The value of ``general.architecture``.
        skip: Metadata fields to leave out.
        quantization: Type of all matrices; None leaves them in float32.
        kinds: Types of individual matrices, by name.
        tiny: The model, which gives the sizes.
    """
    writer = gguf.GGUFWriter(file, architecture)
    fields: dict[str, Callable[[], None]] = {
        "block_count": lambda: writer.add_block_count(tiny.layers),
        "context_length": lambda: writer.add_context_length(tiny.context),
        "embedding_length": lambda: writer.add_embedding_length(tiny.hidden),
        "feed_forward_length": lambda: writer.add_feed_forward_length(tiny.intermediate),
        "head_count": lambda: writer.add_head_count(tiny.heads),
        "head_count_kv": lambda: writer.add_head_count_kv(tiny.kv_heads),
        "eps": lambda: writer.add_layer_norm_rms_eps(1e-5),
        "dimension_count": lambda: writer.add_rope_dimension_count(tiny.head_dim),
    }
    if tiny.heads * tiny.head_dim != tiny.hidden:  # otherwise readers derive it
        fields["key_length"] = lambda: writer.add_key_length(tiny.head_dim)
        fields["value_length"] = lambda: writer.add_value_length(tiny.head_dim)
    for name, add in fields.items():
        if name not in skip:
            add()
    if edit is not None:
        edit(writer)
    for name, value in tensors.items():
        stored = value
        if ".attn_q." in name:
            stored = permute(value, tiny.heads)
        elif ".attn_k." in name:
            stored = permute(value, tiny.kv_heads)
        kind = kinds.get(name, quantization)
        if kind is not None and value.ndim == 2:
            writer.add_tensor(name, quantize(stored, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def of_checkpoint(folder: Path, layers: int) -> dict[str, np.ndarray]:
    """Return the tensors of a Llama folder under GGUF names."""
    checkpoint = open_checkpoint(str(folder))
    found = {}
    for stem in LLAMA_NAMES:
        for layer in range(layers if "{layer}" in stem else 1):
            for part in ("weight", "bias"):
                name = f"{stem.replace('{layer}', str(layer))}.{part}"
                if (hugging_face := to_hugging_face(name)) in checkpoint.names():
                    found[name] = checkpoint.tensor(hugging_face)
    return found


def byte_level(writer: gguf.GGUFWriter, pre: str | None = "smollm") -> None:
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(["<s>", "</s>", "a", "b", "1", "2", "12", "ab", "Ġ", "<think>", "Ġab"])
    writer.add_token_types([3, 3, 1, 1, 1, 1, 1, 1, 1, 4, 1])
    writer.add_token_merges(["a b", "1 2", "Ġ ab"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def listed(key: str, values: list[int] | list[bool]) -> Edit:
    """Return the edit that replaces a field of the architecture by a list."""

    def edit(writer: gguf.GGUFWriter) -> None:
        name = f"{writer.arch}.{key}"
        writer.kv_data[0].pop(name, None)
        writer.add_array(name, values)

    return edit
