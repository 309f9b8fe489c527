"""The interface of every checkpoint reader: lazy tensors by Hugging Face name, a config, the tokenizer's files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from shortstack.export.checkpoint.config import Config
from shortstack.export.stacked_blocks import widened
from shortstack.graphs.errors import CheckpointError
from shortstack.graphs.ir.block_tensor import BlockTensor, Order
from shortstack.graphs.plan import ExitSpec
from shortstack.graphs.precision import BlockFormat
from shortstack.graphs.spec import ModelSpec

MAX_LAYERS = 4096
"""The most layers that a checkpoint may say it has: a damaged file must not make us list billions of tensors."""

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor that holds the divisors of the rotary frequencies, float32 [head_dim / 2], when ``rope_scaling.kind`` is
``factors``. The name is GGUF's; llama.cpp's converter writes it for Llama 3.1 and later."""

HEAD = "{head}"
"""Stands for the number of a head in the name of a tensor of which each head has one."""

Progress = Callable[[int, int], None]
"""Called with the bytes done so far and the bytes in total."""


@dataclass(frozen=True, slots=True)
class StoredBlocks:
    """A matrix that is stored in blocks of small integers.

    Attributes:
        kind: The type of its blocks, by the name of the tool that made them, such as ggml's ``Q4_0``.
        read: Reads these blocks in ``format``. Call it only where there is one.
        format: The narrowest format that holds these blocks, exactly or nearly; None if the kernels have none.
        plain_format: Where ``format`` has offsets, the narrowest one without; None if there is none.
        read_as: Reads these blocks in ``plain_format`` or a wider one. None where moving what ``read`` returns to a
            wider format is as good.
        order: The input that each column of these blocks multiplies; None where columns stand as their inputs do.
    """

    kind: str
    read: Callable[[], BlockTensor]
    format: BlockFormat | None = None
    plain_format: BlockFormat | None = None
    read_as: Callable[[BlockFormat], BlockTensor] | None = None
    order: Order | None = None

    @property
    def without_offsets(self) -> BlockFormat | None:
        """The narrowest format without offsets that holds these blocks."""
        has_offsets = self.format is not None and self.format.has_offsets
        return self.plain_format if has_offsets else self.format

    def in_format(self, block_format: BlockFormat) -> BlockTensor:
        """Read these blocks in ``format``, or in one that is as wide as ``without_offsets``."""
        if block_format == self.format:
            return self.read()
        return widened(self.read(), block_format) if self.read_as is None else self.read_as(block_format)


@dataclass(frozen=True, slots=True)
class StoredExit:
    """An exit that was trained with a model and is stored in the model's own checkpoint.

    Attributes:
        spec: The exit.
        read: Reads its weights, by :func:`shortstack.graphs.names.exit_weight`: float32, C-contiguous, [out, in].
    """

    spec: ExitSpec
    read: Callable[[], dict[str, npt.NDArray[np.float32]]]


@runtime_checkable
class PartReader(Protocol):
    """A reader that can read a part of a matrix without the rest."""

    def reads_parts(self, name: str) -> bool:
        """Return whether it can with this tensor."""

    def part(self, name: str, rows: slice, columns: slice) -> npt.NDArray[np.float32]:
        """Read a part of a matrix as C-contiguous float32; errors as in ``tensor``."""


def reads_parts(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a part of a matrix can be read without the rest."""
    return isinstance(checkpoint, PartReader) and checkpoint.reads_parts(name)


def read_part(checkpoint: Checkpoint, name: str, rows: slice, columns: slice) -> npt.NDArray[np.float32]:
    """Read a part of a matrix as C-contiguous float32, without the rest if the reader can; errors as in ``tensor``."""
    if isinstance(checkpoint, PartReader) and checkpoint.reads_parts(name):
        return np.ascontiguousarray(checkpoint.part(name, rows, columns))
    return np.ascontiguousarray(checkpoint.tensor(name)[rows, columns])


def notes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return what a user should know about how a checkpoint is read, one sentence each."""
    return tuple(getattr(checkpoint, "notes", ()))


class Checkpoint(Protocol):
    """A trained model on disk.

    Whatever the file format, tensors have Hugging Face names and layouts. A linear weight is [out, in]. The rows of q
    and k are in the rotate-half order of transformers.
    """

    @property
    def source(self) -> str:
        """The folder, file or hub id that the user named."""

    @property
    def folder_or_file(self) -> Path:
        """Its path on disk."""

    @property
    def config(self) -> Config:
        """The model's config under Hugging Face names."""

    def names(self) -> frozenset[str]:
        """Return the names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading its data.

        Raises:
            CheckpointError: There is no such tensor.
        """

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """Read one tensor as C-contiguous float32.

        Raises:
            CheckpointError: There is no such tensor, or its data cannot be read.
            UnsupportedError: This version does not read its stored type.
        """

    def blocks(self, name: str) -> StoredBlocks | None:
        """Return how a tensor is quantized, without reading its data; None if it is stored as floats.

        Raises:
            CheckpointError: There is no such tensor.
        """

    def exits(self, spec: ModelSpec) -> tuple[StoredExit, ...]:
        """Return the exits that the checkpoint itself holds, by ascending depth, without reading their data.

        Args:
            spec: The model, as its family reads it from the config.

        Raises:
            CheckpointError: Tensors of an exit are missing or misshapen; the message lists all of them.
        """

    def files(self) -> dict[str, bytes]:
        """Return the content of those of ``names.TEXT_FILES`` that exist; ``generation_config.json`` always does.

        Raises:
            CheckpointError: One of them is damaged.
        """

    def digest(self, progress: Progress | None = None) -> str:
        """Read the weights and the config as one stream, and return its SHA-256 in hex."""


def names_of_heads(name: str, heads: int) -> tuple[str, ...]:
    """Return the tensors of the heads, by a name in which :data:`HEAD` stands for the number of one."""
    return tuple(name.replace(HEAD, str(head)) for head in range(heads))


def unknown_tensor(name: str, where: Path) -> CheckpointError:
    """Return the error for a tensor that the checkpoint does not hold."""
    return CheckpointError(f"{where} has no tensor {name}")


def hash_files(files: Iterable[Path], *, label: bool, progress: Progress | None = None) -> str:
    """Hash files in the given order as one stream.

    Args:
        files: The files to hash.
        label: Hash each file's name and size too, so that moving bytes between files changes the hash. Without it, the
            hash of a single file is what ``sha256sum`` prints.
        progress: Called after every chunk.

    Raises:
        CheckpointError: A file cannot be read.
    """
    chosen = tuple(files)
    hasher = hashlib.sha256()
    try:
        sizes = [file.stat().st_size for file in chosen]
        done_bytes, total_bytes = 0, sum(sizes)
        for file, size in zip(chosen, sizes, strict=True):
            if label:
                hasher.update(f"{file.name}\0{size}\0".encode())
            with file.open("rb") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    hasher.update(chunk)
                    done_bytes += len(chunk)
                    if progress is not None:
                        progress(done_bytes, total_bytes)
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read ({error.strerror})") from None
    return hasher.hexdigest()


_CHUNK_BYTES = 1 << 22
