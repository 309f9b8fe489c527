"""A folder of quantized matrices as a checkpoint of plain weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shortstack.export.checkpoint.checkpoint import Progress, StoredBlocks, StoredExit, unknown_tensor
from shortstack.export.checkpoint.config import Config
from shortstack.export.checkpoint.hf import HuggingFaceCheckpoint
from shortstack.export.checkpoint.quantized.stored import SECTIONS, Quantized, QuantizedMatrix
from shortstack.graphs.errors import CheckpointError
from shortstack.graphs.ir.block_tensor import BlockTensor
from shortstack.graphs.spec import ModelSpec


class QuantizedCheckpoint:
    """A folder whose matrices another tool has quantized; the methods are those of ``Checkpoint``.

    Args:
        folder: The folder as it is stored.
        found: Its quantized matrices.

    Attributes:
        notes: What a user should know about the conversion, one sentence each.

    Raises:
        CheckpointError: A weight is stored twice, quantized and plain.
    """

    def __init__(self, folder: HuggingFaceCheckpoint, found: Quantized) -> None:
        self.source = folder.source
        self.folder_or_file: Path = folder.folder_or_file
        self.config = _without_sections(folder.config)
        self._folder = folder
        self._matrices: Mapping[str, QuantizedMatrix] = found.matrices
        parts = {part for matrix in found.matrices.values() for part in matrix.parts}
        self._plain = folder.names() - parts - found.unread
        if twice := sorted(self._plain & found.matrices.keys()):
            raise CheckpointError(
                f"{folder.folder_or_file} holds {len(twice)} weights twice, quantized and plain ({twice[0]})",
                remedy="remove the one that does not belong to the model",
            )
        self.notes = (*_dequantized(found), *found.notes)

    def names(self) -> frozenset[str]:
        """Return the names of all weights."""
        return self._plain | self._matrices.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a weight's shape without reading its data."""
        return self._matrices[name].shape if name in self._matrices else self._folder.shape(self._known(name))

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """Read one weight as C-contiguous float32."""
        if name in self._matrices:
            return np.ascontiguousarray(self._matrices[name].floats(), np.float32)
        return self._folder.tensor(self._known(name))

    def reads_parts(self, name: str) -> bool:
        """See ``PartReader``; a quantized matrix is read as a whole."""
        return name not in self._matrices and self._folder.reads_parts(self._known(name))

    def part(self, name: str, rows: slice, columns: slice) -> npt.NDArray[np.float32]:
        """See ``PartReader``."""
        return self._folder.part(self._known(name), rows, columns)

    def blocks(self, name: str) -> StoredBlocks | None:
        """Return how a weight is quantized, without reading its codes; None if it is stored as floats."""
        matrix = self._matrices.get(name)
        if matrix is None:
            return self._folder.blocks(self._known(name))
        return StoredBlocks(matrix.kind, matrix.blocks or _no_blocks, matrix.format, order=matrix.order)

    def exits(self, spec: ModelSpec) -> tuple[StoredExit, ...]:
        """Return an empty tuple: the format has no exits."""
        return self._folder.exits(spec)

    def files(self) -> dict[str, bytes]:
        """Return the content of the tokenizer's files that exist, and always a generation config."""
        return self._folder.files()

    def digest(self, progress: Progress | None = None) -> str:
        """Return the SHA-256 over the files as they are."""
        return self._folder.digest(progress)

    def _known(self, name: str) -> str:
        if name not in self._plain:
            raise unknown_tensor(name, self.folder_or_file)
        return name


def _dequantized(found: Quantized) -> list[str]:
    """Return one sentence about the matrices whose blocks no bundle can hold; nothing where there are none."""
    kinds = [matrix.kind for matrix in found.matrices.values() if matrix.format is None]
    if not kinds:
        return []
    count = "1 matrix" if len(kinds) == 1 else f"{len(kinds)} matrices"
    return [f"dequantizing {count} to floats, since no blocks hold such weights ({'; '.join(sorted(set(kinds)))})"]


def _no_blocks() -> BlockTensor:
    raise AssertionError("a matrix without a format has no blocks")


def _without_sections(config: Config) -> Config:
    """Return a config of the model that the folder stands for, which nothing has quantized."""
    data = {key: value for key, value in config.data.items() if key not in SECTIONS}
    return Config(data, config.file, config.prefix, config.remedy)
