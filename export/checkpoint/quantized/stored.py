"""What the readers of quantized folders share: the folder's tensors as they are stored, and what a reader returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from shortstack.export.checkpoint.config import Config
from shortstack.graphs.errors import CheckpointError
from shortstack.graphs.ir.block_tensor import BlockTensor, Order
from shortstack.graphs.precision import BlockFormat

Floats = npt.NDArray[np.float32]
SECTIONS = ("quantization_config", "compression_config")
"""The fields of a config that say how a model is quantized."""

SCALE_TYPES = ("F16", "BF16", "F32")
SAME_REVISION = "take config.json and weights from one revision of the model"
_MAX_LISTED = 6
_AGAIN = "download the checkpoint again, all files from one revision"


class StoredTensors(Protocol):
    """A folder's tensors as they are stored; ``HuggingFaceCheckpoint`` is one."""

    @property
    def folder_or_file(self) -> Path:
        """The folder."""

    def names(self) -> frozenset[str]:
        """Return the names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""

    def stored_type(self, name: str) -> str:
        """Return a tensor's type by the name that safetensors has for it, such as ``I32``."""

    def raw(self, name: str) -> npt.NDArray[Any]:
        """Read a tensor in its stored type; those of 8-bit floats as bytes."""

    def where(self, name: str) -> str:
        """Return a tensor and its file, for messages."""


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """One matrix [out, in] that is quantized.

    Attributes:
        kind: What it is, for people, such as ``GPTQ int4, groups of 128``.
        shape: Rows and width.
        parts: The stored tensors that it consists of.
        floats: Reads it as floats.
        blocks: Reads exactly its blocks; None if the kernels have no such format.
        format: Their format; None as well.
        order: The order of its columns in these blocks; None as they are.
    """

    kind: str
    shape: tuple[int, int]
    parts: tuple[str, ...]
    floats: Callable[[], Floats]
    blocks: Callable[[], BlockTensor] | None = None
    format: BlockFormat | None = None
    order: Order | None = None


@dataclass(frozen=True, slots=True)
class Quantized:
    """What one reader found in a folder.

    Attributes:
        matrices: By the name of the plain weight, such as ``model.layers.0.mlp.up_proj.weight``.
        unread: Stored tensors that no weight consists of, such as scales of activations.
        notes: What a user should know about the conversion, one sentence each.
    """

    matrices: Mapping[str, QuantizedMatrix]
    unread: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


def stems(stored: StoredTensors, suffix: str) -> list[str]:
    """Return what stands before a suffix in the names of tensors, sorted."""
    return sorted(name.removesuffix(suffix) for name in stored.names() if name.endswith(suffix))


def require(stored: StoredTensors, names: Iterable[str], because: str) -> None:
    """Check that tensors are there.

    Args:
        stored: The folder.
        names: The tensors.
        because: What needs them.

    Raises:
        CheckpointError: Listing those that are not.
    """
    present = stored.names()
    if missing := sorted(set(names) - present):
        shown = ", ".join(missing[:_MAX_LISTED]) + ("" if len(missing) <= _MAX_LISTED else ", ...")
        raise CheckpointError(
            f"{stored.folder_or_file} lacks {len(missing)} tensors of quantized matrices ({shown})",
            expected=because,
            remedy=f"finish the download, or {_AGAIN}",
        )


def check_type(stored: StoredTensors, name: str, types: Sequence[str]) -> None:
    """Check the type of a tensor, and that it holds something.

    Raises:
        CheckpointError: It is another one, or the tensor is empty.
    """
    if (found := stored.stored_type(name)) not in types:
        raise CheckpointError(
            f"{stored.where(name)}", found=f"type {found}", expected=" or ".join(types), remedy=_AGAIN
        )
    if 0 in stored.shape(name):
        raise misfit(stored, name, "no empty dimension")


def misfit(stored: StoredTensors, name: str, expected: object, remedy: str | None = None) -> CheckpointError:
    """Return the error for a tensor of another shape than the others of its matrix ask for."""
    found = f"shape {list(stored.shape(name))}"
    return CheckpointError(stored.where(name), found=found, expected=expected, remedy=remedy or _AGAIN)


def contradiction(section: Config, key: str, expected: str) -> CheckpointError:
    """Return the error for a field of the config that is not what the tensors are."""
    found = section.data.get(key)
    return CheckpointError(
        section.where(key),
        found="nothing" if found is None else repr(found),
        expected=expected,
        remedy=SAME_REVISION,
    )


def nothing_quantized(stored: StoredTensors, section: Config, tool: str, suffix: str) -> CheckpointError:
    """Return the error for a config that describes what no tensor is."""
    return CheckpointError(
        f"{section.file}: {section.prefix.rstrip('.')} says that {tool} has quantized the model, and no tensor of "
        f"{stored.folder_or_file} is",
        expected=f"tensors called {suffix}",
        remedy="finish the download; if the weights are floats, remove that field from config.json",
    )
