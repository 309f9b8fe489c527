"""Reads GGUF files of the ``llama`` architecture as if they were Hugging Face checkpoints.

Weights are dequantized one tensor at a time, or passed on in the blocks in which they are stored. The rows of q and k
are moved from llama.cpp's interleaved rotary order back to the rotate-half order of transformers. The metadata becomes
a Hugging Face config and tokenizer.
"""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import gguf
import numpy as np
import numpy.typing as npt

from shortstack.export.checkpoint.checkpoint import (
    ROPE_FACTORS,
    Progress,
    StoredBlocks,
    StoredExit,
    hash_files,
    unknown_tensor,
)
from shortstack.export.checkpoint.config import Config, not_one_of
from shortstack.export.checkpoint.gguf_blocks import unpack_blocks
from shortstack.export.checkpoint.gguf_end_tokens import end_token_ids
from shortstack.export.checkpoint.gguf_header import Header, TensorInfo, read_header
from shortstack.export.checkpoint.gguf_names import to_hugging_face
from shortstack.export.checkpoint.gguf_tokenizer import token_texts, tokenizer_files
from shortstack.export.checkpoint.tokenizer_files import complete_files
from shortstack.graphs.errors import CheckpointError, UnsupportedError
from shortstack.graphs.ir.block_tensor import BlockTensor
from shortstack.graphs.spec import ModelSpec

Number = TypeVar("Number", bound=np.generic)

ARCHITECTURES = ("llama",)


class GgufCheckpoint:
    """A GGUF file; the methods are those of ``Checkpoint``.

    Args:
        file: The file.
        source: The name that the user gave, if it is not the file itself.

    Raises:
        CheckpointError: The file is damaged, or lacks a field or the embedding.
        UnsupportedError: It is a valid model of a kind that this version does not read.
    """

    def __init__(self, file: Path, source: str | None = None) -> None:
        self.source = str(file) if source is None else source
        self.folder_or_file = file
        header = read_header(file)
        self._metadata = Config(header.metadata, str(file))
        architecture = self._metadata.read(str, "general.architecture")
        if architecture not in ARCHITECTURES:
            raise not_one_of(self._metadata.where("general.architecture"), architecture, ARCHITECTURES)
        if self._metadata.read(int, "split.count", 1) > 1:
            raise UnsupportedError(
                f"{file} is one part of a split model",
                remedy="join the parts with `llama-gguf-split --merge` and name the result",
            )
        self._tensors: dict[str, tuple[str, TensorInfo]] = {}  # Hugging Face name -> GGUF name, info
        for name, info in header.tensors.items():
            self._tensors[to_hugging_face(name)] = (name, info)
        self.config = Config(hugging_face_config(self._metadata, header), str(file))

    def names(self) -> frozenset[str]:
        """Return the names of all tensors."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading its data."""
        return self._entry(name)[1].shape

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """Dequantize one tensor to C-contiguous float32."""
        gguf_name, info = self._entry(name)
        try:
            value = gguf.dequantize(self._bytes(info), info.quantization)
        except NotImplementedError:
            raise UnsupportedError(
                f"{self.folder_or_file}: tensor {gguf_name}",
                found=f"type {info.quantization.name}, which the gguf package cannot dequantize",
                remedy="name a file quantized to one of the common types (Q4_K_M, Q8_0, F16)",
            ) from None
        if (heads := self._rotated_heads(gguf_name)) is not None:
            value = unpermute(value, heads)
        return np.ascontiguousarray(value, dtype=np.float32)

    def blocks(self, name: str) -> StoredBlocks | None:
        """Return how a tensor is quantized, without reading its data; None if it is stored as floats."""
        quantization = self._entry(name)[1].quantization
        values_per_block, _ = gguf.GGML_QUANT_SIZES[quantization]
        return None if values_per_block == 1 else StoredBlocks(quantization.name, partial(self._read_blocks, name))

    def exits(self, spec: ModelSpec) -> tuple[StoredExit, ...]:
        """Return an empty tuple: the format has no exits."""
        return ()

    def files(self) -> dict[str, bytes]:
        """Return the tokenizer's files, built from the metadata, with its chat template and a generation config."""
        return complete_files(tokenizer_files(self._metadata), self.config, str(self.folder_or_file))

    def digest(self, progress: Progress | None = None) -> str:
        """Return the SHA-256 of the file, as ``sha256sum`` prints it."""
        return hash_files((self.folder_or_file,), label=False, progress=progress)

    @cached_property
    def _data(self) -> npt.NDArray[np.uint8]:
        try:
            return np.memmap(self.folder_or_file, mode="r", dtype=np.uint8)
        except OSError as error:
            raise CheckpointError(f"{self.folder_or_file} cannot be read ({error.strerror})") from None

    def _read_blocks(self, name: str) -> BlockTensor:
        gguf_name, info = self._entry(name)
        value = unpack_blocks(self._bytes(info), info.quantization.name)
        if (heads := self._rotated_heads(gguf_name)) is not None:
            value = value.rows(unpermute(np.arange(info.shape[0]), heads))
        return value

    def _bytes(self, info: TensorInfo) -> npt.NDArray[np.uint8]:
        """Return a tensor's stored bytes, row by row: its shape, but with bytes in place of the last dimension."""
        return self._data[info.offset : info.offset + info.size_bytes].reshape(*info.shape[:-1], -1)

    def _rotated_heads(self, gguf_name: str) -> int | None:
        """Return how many heads the rows of a q or k tensor hold; None for other tensors, whose rows are in order."""
        if gguf_name.endswith((".attn_q.weight", ".attn_q.bias")):
            return self.config.read(int, "num_attention_heads")
        if gguf_name.endswith((".attn_k.weight", ".attn_k.bias")):
            return self.config.read(int, "num_key_value_heads")
        return None

    def _entry(self, name: str) -> tuple[str, TensorInfo]:
        if name not in self._tensors:
            raise unknown_tensor(name, self.folder_or_file)
        return self._tensors[name]


def unpermute(value: npt.NDArray[Number], heads: int) -> npt.NDArray[Number]:
    """Undo the row permutation of llama.cpp's ``LlamaModel.permute``.

    llama.cpp rotates neighbouring rows (2i, 2i + 1) of a head; transformers rotates rows i and i + head_dim / 2.

    Args:
        value: A weight of q or k [heads * head_dim, hidden], or a bias or row numbers [heads * head_dim].
        heads: Query heads for q, key/value heads for k.

    Raises:
        CheckpointError: The rows do not divide into heads of even width.
    """
    if heads <= 0 or value.shape[0] % (2 * heads):
        raise CheckpointError(
            f"{value.shape[0]} rows of a q or k projection do not divide into {heads} heads of even width"
        )
    pairs = value.reshape(heads, value.shape[0] // heads // 2, 2, *value.shape[1:])
    return pairs.swapaxes(1, 2).reshape(value.shape)


def hugging_face_config(metadata: Config, header: Header) -> dict[str, object]:
    """Translate the metadata of a ``llama`` GGUF file into a ``config.json`` of ``model_type`` llama.

    Raises:
        CheckpointError: A field is missing or has the wrong type, or there is no embedding.
        UnsupportedError: The model has experts, a partial rotary embedding, or keys and values of different widths.
    """
    where = metadata.where
    if metadata.read(int, "llama.expert_count", 0) > 0:
        raise UnsupportedError(f"{where('llama.expert_count')}: mixtures of experts cannot be exported")
    if "token_embd.weight" not in header.tensors:
        raise CheckpointError(
            f"{metadata.file} has no tensor token_embd.weight", remedy="name a file that holds a whole model"
        )
    heads = metadata.read(int, "llama.attention.head_count")
    hidden_size = metadata.read(int, "llama.embedding_length")
    if heads <= 0:
        raise metadata.wrong("llama.attention.head_count", "a positive integer")
    rotary_dim = metadata.read(int, "llama.rope.dimension_count", None)
    head_dim = metadata.read(int, "llama.attention.key_length", None)
    if head_dim is None:
        head_dim = hidden_size // heads if hidden_size % heads == 0 or rotary_dim is None else rotary_dim
    if rotary_dim not in (None, head_dim):
        raise UnsupportedError(
            f"{where('llama.rope.dimension_count')}: partial rotary embedding",
            found=rotary_dim,
            expected=f"the head size {head_dim}",
        )
    if metadata.read(int, "llama.attention.value_length", head_dim) != head_dim:
        raise UnsupportedError(
            where("llama.attention.value_length"),
            found=metadata.read(int, "llama.attention.value_length"),
            expected=f"the width of the keys, {head_dim}",
        )
    config: dict[str, object] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": metadata.read(int, "llama.block_count"),
        "hidden_size": hidden_size,
        "intermediate_size": metadata.read(int, "llama.feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.read(int, "llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_act": "silu",
        "rms_norm_eps": metadata.read(float, "llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.read(float, "llama.rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(metadata, header),
        "max_position_embeddings": metadata.read(int, "llama.context_length"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "attention_out_bias": "blk.0.attn_output.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in header.tensors,
    }
    for key, field in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
        index = metadata.read(int, f"tokenizer.ggml.{field}_token_id", None)
        if index is not None:
            config[key] = index
    ends = end_token_ids(metadata, token_texts(metadata))
    if ends:
        config["eos_token_id"] = ends[0] if len(ends) == 1 else list(ends)
    return config


def _rope_scaling(metadata: Config, header: Header) -> dict[str, object] | None:
    attention_factor = metadata.read(float, "llama.rope.scaling.attn_factor", 1.0)
    if attention_factor != 1.0:  # llama.cpp multiplies cos and sin by it, whatever the kind of scaling
        raise UnsupportedError(metadata.where("llama.rope.scaling.attn_factor"), found=attention_factor, expected="1.0")
    kind = metadata.read(str, "llama.rope.scaling.type", None)
    factor = metadata.read(float, "llama.rope.scaling.factor", None)
    if factor is None:
        factor = metadata.read(float, "llama.rope.scale_linear", None)  # the name before 2023-10
    if kind is None:
        kind = "linear" if factor is not None else "none"  # llama.cpp's own default
    unscaled = kind == "none" or (kind == "linear" and factor in (None, 0.0, 1.0))
    if ROPE_FACTORS in header.tensors:
        if not unscaled:
            raise UnsupportedError(
                f"{metadata.where('llama.rope.scaling.type')}: {kind} on top of {ROPE_FACTORS} cannot be exported"
            )
        return {"rope_type": "factors"}
    if unscaled:
        return None
    return {"rope_type": kind, "factor": 1.0 if factor is None else factor}
