"""Reads GGUF files as if they were Hugging Face checkpoints.

Weights are dequantized one tensor at a time, or passed on in the blocks in which they are stored. What llama.cpp's
converter changed in them is undone (:mod:`shortstack.export.checkpoint.gguf_transforms`). The metadata becomes a
Hugging Face config and tokenizer. What an architecture needs is one table in
:mod:`shortstack.export.checkpoint.gguf_families`.
"""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from shortstack.export.checkpoint.checkpoint import Progress, StoredBlocks, StoredExit, hash_files, unknown_tensor
from shortstack.export.checkpoint.config import Config
from shortstack.export.checkpoint.gguf_blocks import EXACT_FORMATS, unpack_blocks
from shortstack.export.checkpoint.gguf_config import family_of, hugging_face_config
from shortstack.export.checkpoint.gguf_families import FAMILIES, unknown_architecture
from shortstack.export.checkpoint.gguf_header import TensorInfo, read_header
from shortstack.export.checkpoint.gguf_model import CONVERT_AGAIN, GgufModel
from shortstack.export.checkpoint.gguf_names import stem_of, to_hugging_face
from shortstack.export.checkpoint.gguf_rope import LONGROPE_FACTORS
from shortstack.export.checkpoint.gguf_tokenizer import tokenizer_files
from shortstack.export.checkpoint.gguf_transforms import Rows, Transform, row_order
from shortstack.export.checkpoint.tokenizer_files import complete_files
from shortstack.graphs.errors import CheckpointError, UnsupportedError
from shortstack.graphs.ir.block_tensor import BlockTensor
from shortstack.graphs.spec import ModelSpec


class GgufCheckpoint:
    """A GGUF file; the methods are those of ``Checkpoint``.

    Args:
        file: The file.
        source: The name that the user gave, if it is not the file itself.

    Attributes:
        architecture: llama.cpp's name of the model's architecture.

    Raises:
        CheckpointError: The file is damaged, or lacks a field or the embedding.
        UnsupportedError: It is a valid model of a kind that this version does not read.
    """

    def __init__(self, file: Path, source: str | None = None) -> None:
        self.source = str(file) if source is None else source
        self.folder_or_file = file
        header = read_header(file)
        self._metadata = Config(header.metadata, str(file), remedy=CONVERT_AGAIN)
        self.architecture = architecture = self._metadata.read(str, "general.architecture")
        if architecture not in FAMILIES:
            raise unknown_architecture(self._metadata.where("general.architecture"), architecture)
        if self._metadata.read(int, "split.count", 1) > 1:
            raise UnsupportedError(
                f"{file} is one part of a split model",
                remedy="join the parts with `llama-gguf-split --merge` and name the result",
            )
        self._infos = header.tensors
        model = GgufModel(architecture, self._metadata, header.tensors, self._dequantized)
        family = family_of(FAMILIES[architecture], model)
        self.config = Config(hugging_face_config(family, model), str(file))
        heads = model.positive("attention.head_count")
        self._heads = heads, model.positive("attention.head_count_kv", heads)
        stored = [name for name in header.tensors if not self._is_in_config(name)]
        self._stored = {to_hugging_face(name, family.names): name for name in stored}  # GGUF names by ours
        if hidden := sorted(set(stored) - set(self._stored.values())):
            raise CheckpointError(f"{file} holds tensors twice", found=", ".join(hidden), remedy=CONVERT_AGAIN)
        self._transforms = family.transforms

    def names(self) -> frozenset[str]:
        """Return the names of all tensors."""
        return frozenset(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading its data."""
        stored = self._stored_name(name)
        shape = self._infos[stored].shape
        return shape[::-1] if self._transform(stored) == "turned" else shape

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """Dequantize one tensor to C-contiguous float32."""
        stored = self._stored_name(name)
        value = self._dequantized(stored)
        if (rows := self._rows(stored)) is not None:
            value = value[rows]
        if self._transform(stored) == "minus_one":
            value = value - np.float32(1)
        elif self._transform(stored) == "turned":
            value = value.T
        return np.require(value, np.float32, ("C", "W"))  # a copy of what the file holds as it is, which is read-only

    def reads_parts(self, name: str) -> bool:
        """Return whether a part can be read without the rest: where the converter changed nothing."""
        stored = self._stored_name(name)
        return self._transform(stored) is None and len(self._infos[stored].shape) == 2

    def part(self, name: str, rows: slice, columns: slice) -> npt.NDArray[np.float32]:
        """Dequantize a part of a matrix to C-contiguous float32."""
        value = self._dequantized(self._stored_name(name), rows)[:, columns]
        return np.require(value, np.float32, ("C", "W"))

    def blocks(self, name: str) -> StoredBlocks | None:
        """Return how a tensor is quantized, without reading its data; None if it is stored as floats."""
        quantization = self._infos[self._stored_name(name)].quantization
        values_per_block, _ = gguf.GGML_QUANT_SIZES[quantization]
        if values_per_block == 1:
            return None
        read = partial(self._read_blocks, name)
        return StoredBlocks(quantization.name, read, EXACT_FORMATS.get(quantization.name))

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
        stored = self._stored_name(name)
        assert self._transform(stored) not in ("minus_one", "turned"), f"{stored}: its values change, not its rows"
        info = self._infos[stored]
        value = unpack_blocks(self._bytes(info), info.quantization.name)
        rows = self._rows(stored)
        return value if rows is None else value.rows(rows)

    def _dequantized(self, stored: str, rows: slice | None = None) -> npt.NDArray[np.float32]:
        """Return a tensor as the file has it, or some rows of it, by its GGUF name."""
        info = self._infos[stored]
        content = self._bytes(info) if rows is None else self._bytes(info)[rows]
        try:
            value: npt.NDArray[np.float32] = gguf.dequantize(content, info.quantization)
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

    def _is_in_config(self, stored: str) -> bool:
        """Return whether the config says what a tensor holds."""
        return stored in LONGROPE_FACTORS and all(name in self._infos for name in LONGROPE_FACTORS)

    def _stored_name(self, name: str) -> str:
        """Return a tensor's GGUF name."""
        if name not in self._stored:
            raise unknown_tensor(name, self.folder_or_file)
        return self._stored[name]
