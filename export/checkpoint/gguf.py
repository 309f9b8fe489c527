"""Reads GGUF files as if they were Hugging Face checkpoints.

Weights are dequantized one tensor at a time, or passed on in the blocks in which they are stored. What llama.cpp's
converter changed in them is undone (:mod:`shortstack.export.checkpoint.gguf_transforms`). The metadata becomes a
Hugging Face config and tokenizer. What an architecture needs is one table in
:mod:`shortstack.export.checkpoint.gguf_families`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property, partial
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from shortstack.export.checkpoint.checkpoint import (
    HEAD,
    Progress,
    StoredBlocks,
    StoredExit,
    hash_files,
    names_of_heads,
    unknown_tensor,
)
from shortstack.export.checkpoint.config import Config
from shortstack.export.checkpoint.gguf_blocks import BLOCK_TYPES, unpack_blocks
from shortstack.export.checkpoint.gguf_config import family_of, hugging_face_config
from shortstack.export.checkpoint.gguf_families import FAMILIES, unknown_architecture
from shortstack.export.checkpoint.gguf_family import GgufFamily
from shortstack.export.checkpoint.gguf_header import TensorInfo, read_header
from shortstack.export.checkpoint.gguf_model import CONVERT_AGAIN, GgufModel
from shortstack.export.checkpoint.gguf_names import NEXTN_NAMES, stem_of, to_hugging_face
from shortstack.export.checkpoint.gguf_rope import LONGROPE_FACTORS
from shortstack.export.checkpoint.gguf_tokenizer import tokenizer_files
from shortstack.export.checkpoint.gguf_transforms import Rows, Transform, row_order
from shortstack.export.checkpoint.tokenizer_files import complete_files
from shortstack.graphs.errors import CheckpointError, UnsupportedError
from shortstack.graphs.ir.block_tensor import BlockTensor
from shortstack.graphs.precision import BlockFormat
from shortstack.graphs.spec import ModelSpec

_INTEGERS: Mapping[str, str] = {"I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}


class GgufCheckpoint:
    """A GGUF file; the methods are those of ``Checkpoint``.

    Args:
        file: The file.
        source: The name that the user gave, if it is not the file itself.
        families: The architectures that it may have: those of models.

    Attributes:
        architecture: llama.cpp's name of the model's architecture.

    Raises:
        CheckpointError: The file is damaged, or lacks a field or the embedding.
        UnsupportedError: It is a valid model of a kind that this version does not read.
    """

    def __init__(self, file: Path, source: str | None = None, families: Mapping[str, GgufFamily] = FAMILIES) -> None:
        self.source = str(file) if source is None else source
        self.folder_or_file = file
        header = read_header(file)
        self._metadata = Config(header.metadata, str(file), remedy=CONVERT_AGAIN)
        self.architecture = architecture = self._metadata.read(str, "general.architecture")
        if architecture not in families:
            raise unknown_architecture(self._metadata.where("general.architecture"), architecture, families)
        if self._metadata.read(int, "split.count", 1) > 1:
            raise UnsupportedError(
                f"{file} is one part of a split model",
                remedy="join the parts with `llama-gguf-split --merge` and name the result",
            )
        self._infos = header.tensors
        model = GgufModel(architecture, self._metadata, header.tensors, self._dequantized)
        family = family_of(families[architecture], model)
        self.config = Config(hugging_face_config(family, model), str(file))
        layers = model.positive("block_count")
        heads = model.sizes("attention.head_count", layers)[0]
        self._heads = heads, model.sizes("attention.head_count_kv", layers, heads, may_differ=True)[0]
        self._in_config = (*family.in_config, *_longrope_factors(header.tensors))
        stored = [name for name in header.tensors if name not in self._in_config]
        self._stored: dict[str, str] = {}  # GGUF names by ours
        self._row_of: dict[str, int] = {}  # of those of ours that are rows of a tensor
        table = {**family.names, **NEXTN_NAMES}
        for name in stored:
            ours, shape = to_hugging_face(name, table), header.tensors[name].shape
            own = names_of_heads(ours, shape[0]) if HEAD in ours and len(shape) == 2 else (ours,)
            self._stored |= dict.fromkeys(own, name)
            self._row_of |= {head: row for row, head in enumerate(own) if ours != head}
        if hidden := sorted(set(stored) - set(self._stored.values())):
            raise CheckpointError(f"{file} holds tensors twice", found=", ".join(hidden), remedy=CONVERT_AGAIN)
        self._transforms = family.transforms
        for layer in range(layers):  # one for multi-token prediction without a norm before the head uses the model's
            above = f"model.layers.{layer}"
            if f"{above}.eh_proj.weight" in self._stored and "output_norm.weight" in header.tensors:
                self._stored.setdefault(f"{above}.shared_head.norm.weight", "output_norm.weight")

    def names(self) -> frozenset[str]:
        """Return the names of all tensors."""
        return frozenset(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading its data."""
        stored = self._stored_name(name)
        shape = self._infos[stored].shape
        if name in self._row_of:
            return shape[1:]
        return shape[::-1] if self._transform(stored) == "turned" else shape

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """Dequantize one tensor to C-contiguous float32."""
        stored = self._stored_name(name)
        value = self._dequantized(stored)
        if name in self._row_of:
            value = value[self._row_of[name]]
        if (rows := self._rows(stored)) is not None:
            value = value[rows]
        if self._transform(stored) == "minus_one":
            value = value - np.float32(1)
        elif self._transform(stored) == "turned":
            value = value.T
        return np.require(value, np.float32, ("C", "W"))  # a copy of what the file holds as it is, which is read-only

    def raw(self, name: str) -> npt.NDArray[np.generic]:
        """Read one tensor in its stored type, if it holds whole numbers; others as :meth:`tensor` does."""
        info = self._infos[self._stored_name(name)]
        kind = _INTEGERS.get(info.quantization.name)
        return self.tensor(name) if kind is None else np.array(self._bytes(info)).view(kind).reshape(info.shape)

    def reads_parts(self, name: str) -> bool:
        """Return whether a part can be read without the rest: where whole rows are as they are stored, or move."""
        stored = self._stored_name(name)
        is_changed = self._transform(stored) in ("minus_one", "turned") or name in self._row_of
        return not is_changed and len(self._infos[stored].shape) == 2

    def part(self, name: str, rows: slice, columns: slice) -> npt.NDArray[np.float32]:
        """Dequantize a part of a matrix to C-contiguous float32, and of the rest only what shares a block."""
        stored = self._stored_name(name)
        size, size_bytes = gguf.GGML_QUANT_SIZES[self._infos[stored].quantization]
        order, blocks = self._rows(stored), self._bytes(self._infos[stored])
        blocks = blocks[rows if order is None else order[rows]]
        start, end, _ = columns.indices(blocks.shape[1] // size_bytes * size)
        first, last = start // size, -(-end // size)  # of the blocks of a row
        found = np.ascontiguousarray(blocks[:, first * size_bytes : last * size_bytes])
        value = self._floats(stored, found)[:, start - first * size : end - first * size]
        return np.require(value, np.float32, ("C", "W"))

    def blocks(self, name: str) -> StoredBlocks | None:
        """Return how a tensor is quantized, without reading its data; None if it is stored as floats."""
        quantization = self._infos[self._stored_name(name)].quantization
        values_per_block, _ = gguf.GGML_QUANT_SIZES[quantization]
        if values_per_block == 1:
            return None
        read = partial(self._read_blocks, name)
        if (block_type := BLOCK_TYPES.get(quantization.name)) is None:
            return StoredBlocks(quantization.name, read)
        return StoredBlocks(quantization.name, read, block_type.format, block_type.plain_format, read)

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

    def _read_blocks(self, name: str, block_format: BlockFormat | None = None) -> BlockTensor:
        stored = self._stored_name(name)
        assert self._transform(stored) not in ("minus_one", "turned"), f"{stored}: its values change, not its rows"
        info = self._infos[stored]
        _, block_bytes = gguf.GGML_QUANT_SIZES[info.quantization]
        value = unpack_blocks(self._bytes(info), info.quantization.name, block_bytes, block_format)
        rows = self._rows(stored)
        return value if rows is None else value.rows(rows)

    def _dequantized(self, stored: str) -> npt.NDArray[np.float32]:
        """Return a tensor as the file has it, by its GGUF name."""
        return self._floats(stored, self._bytes(self._infos[stored]))

    def _floats(self, stored: str, blocks: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Dequantize some blocks of a tensor."""
        info = self._infos[stored]
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # scales of a damaged file: whoever asks, checks
                value: npt.NDArray[np.float32] = gguf.dequantize(blocks, info.quantization)
        except NotImplementedError:
            raise UnsupportedError(
                f"{self.folder_or_file}: tensor {stored}",
                found=f"type {info.quantization.name}, which the gguf package cannot dequantize",
                remedy="name a file quantized to one of the common types (Q4_K_M, Q8_0, F16)",
            ) from None
        return value

    def _bytes(self, info: TensorInfo) -> npt.NDArray[np.uint8]:
        """Return a tensor's stored bytes, row by row: its shape, but with bytes in place of the last dimension."""
        return self._data[info.offset : info.offset + info.size_bytes].reshape(*info.shape[:-1], -1)

    def _transform(self, stored: str) -> Transform | None:
        return self._transforms.get(stem_of(stored))

    def _rows(self, stored: str) -> Rows | None:
        """Return the order of a tensor's rows, None for that of the file."""
        return row_order(self._transform(stored), self._infos[stored].shape[0], *self._heads)

    def _stored_name(self, name: str) -> str:
        """Return a tensor's GGUF name."""
        if name not in self._stored:
            raise unknown_tensor(name, self.folder_or_file)
        return self._stored[name]


def _longrope_factors(tensors: Collection[str]) -> tuple[str, ...]:
    """Return the tensors that became fields of the config of a model with ``longrope``."""
    return LONGROPE_FACTORS if all(name in tensors for name in LONGROPE_FACTORS) else ()
