"""weights.data: every tensor of a bundle once, streamed to disk as it comes.

Graphs refer to a tensor by file, offset and length, so two graphs that use one tensor (a tied embedding, a shared head)
share its bytes on disk and its pages in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import onnx_ir as ir

from shortstack.graphs import names

# onnxruntime maps external tensors straight from the file; a cache line keeps vector loads aligned.
_ALIGNMENT_BYTES = 64


class WeightStore:
    """Writes tensors to ``weights.data`` and hands out references to them.

    Use as a context manager; the file is complete when the block ends.

    Args:
        folder: The bundle being written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = (folder / names.WEIGHTS_FILE).open("wb")
        self._tensors: dict[str, ir.ExternalTensor] = {}

    def __enter__(self) -> WeightStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __getitem__(self, name: str) -> ir.ExternalTensor:
        return self._tensors[name]

    def add(self, name: str, array: np.ndarray) -> None:
        """Append one tensor.

        Args:
            name: Its name in every graph, from :mod:`shortstack.graphs.names`.
            array: Its values, in the dtype to be stored.

        Raises:
            ValueError: A tensor of that name is already stored.
        """
        if name in self._tensors:
            raise ValueError(f"{name} is stored already")
        array = np.ascontiguousarray(array)
        self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT_BYTES))
        offset = self._file.tell()
        self._file.write(array.data)
        self._file.flush()
        self._tensors[name] = ir.ExternalTensor(
            names.WEIGHTS_FILE,
            offset,
            array.nbytes,
            ir.DataType.from_numpy(array.dtype),
            shape=ir.Shape(array.shape),
            name=name,
            base_dir=self._folder,
        )

    def alias(self, name: str, existing: str) -> None:
        """Give a stored tensor a second name, for a graph that calls it so."""
        tensor = self._tensors[existing]
        self._tensors[name] = ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=name,
            base_dir=self._folder,
        )
