"""What a GGUF file says about its model: metadata under its architecture's prefix, and which tensors there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from shortstack.export.checkpoint.config import LARGEST_SIZE, Config
from shortstack.export.checkpoint.gguf_header import TensorInfo
from shortstack.graphs.errors import UnsupportedError

T = TypeVar("T", bound=bool | int | float | str)
D = TypeVar("D", bound=bool | int | float | str | None)
Floats = npt.NDArray[np.float32]

ANOTHER_MODEL: Final = "export another model"
CONVERT_AGAIN: Final = "convert the model again with a current llama.cpp, or export its safetensors"


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A GGUF file's model.

    Attributes:
        architecture: llama.cpp's name of it, the prefix of its metadata.
        metadata: All metadata.
        tensors: Its tensors, by GGUF name.
        read_tensor: Reads one of them, dequantized.
    """

    architecture: str
    metadata: Config
    tensors: Mapping[str, TensorInfo]
    read_tensor: Callable[[str], Floats]

    def key(self, key: str) -> str:
        """Return the full name of a field of the architecture."""
        return f"{self.architecture}.{key}"

    def where(self, key: str) -> str:
        """Return the file and the full name of a field, for messages."""
        return self.metadata.where(self.key(key))

    def read(self, kind: type[T], key: str, default: D) -> T | D:
        """Read a field that may be absent; errors as in :meth:`Config.read`."""
        return self.metadata.read(kind, self.key(key), default)

    def has(self, tensor: str) -> bool:
        """Return whether the file has a tensor; ``.weight`` is added to a name without a kind."""
        return (tensor if tensor.endswith((".weight", ".bias")) else f"{tensor}.weight") in self.tensors

    def positive(self, key: str, default: int | None = None) -> int:
        """Read an integer above 0; without a default it is required.

        Raises:
            CheckpointError: It is absent, of another type, or not positive.
        """
        full = self.key(key)
        value = self.metadata.read(int, full) if default is None else self.metadata.read(int, full, default)
        if not 0 < value <= LARGEST_SIZE:
            raise self.metadata.wrong(full, "a positive integer" if value <= 0 else f"at most {LARGEST_SIZE}")
        return value

    def sizes(self, key: str, layers: int, default: int | None = None, *, may_differ: bool = False) -> tuple[int, ...]:
        """Read a size of each layer: the file has one integer for all of them, or lists them.

        Raises:
            CheckpointError: It is absent without a default, of another type or length, or not positive.
            UnsupportedError: The layers differ, and the architecture's may not.
        """
        full = self.key(key)
        listed = self.metadata.data.get(full)
        if not isinstance(listed, list):
            return (self.positive(key, default),) * layers
        if len(listed) != layers or not all(type(size) is int and 0 < size <= LARGEST_SIZE for size in listed):
            raise self.metadata.wrong(full, f"a positive integer, or one for each of {layers} layers")
        if len(set(listed)) > 1 and not may_differ:
            raise self.unsupported(key, "layers of different sizes", "one number for all layers")
        return tuple(listed)

    def number(self, key: str, default: float | None = None) -> float:
        """Read a number; without a default it is required. Errors as in :meth:`Config.read`."""
        full = self.key(key)
        value = self.metadata.read(float, full) if default is None else self.metadata.read(float, full, default)
        return shortest(value)

    def positive_number(self, key: str, default: float | None = None) -> float:
        """Read a number above 0; errors as in :meth:`number`, and for one that is not positive."""
        value = self.number(key, default)
        if value <= 0:
            raise self.metadata.wrong(self.key(key), "a positive number")
        return value

    def unsupported(self, key: str, what: str, expected: object) -> UnsupportedError:
        """Return the error for a field whose value this version cannot export."""
        found = self.metadata.data.get(self.key(key))
        return UnsupportedError(f"{self.where(key)}: {what}", found=found, expected=expected, remedy=ANOTHER_MODEL)


def shortest(value: float) -> float:
    """Return the shortest decimal number that is the same float32, which is what the converter read.

    >>> shortest(9.999999974752427e-07)
    1e-06
    """
    if not abs(value) <= float(np.finfo(np.float32).max):
        return value
    single = np.float32(value)
    return float(np.format_float_positional(single, unique=True)) if float(single) == value else value
