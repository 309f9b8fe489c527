"""The tensors of a bundle's graphs, by name, read lazily from its weights.data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from shortstack.graphs import names
from shortstack.graphs.bundle import Bundle
from shortstack.graphs.errors import BundleError


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in weights.data.

    onnx-ir's own external tensors refuse a file with several hard links, which is what backups make of a bundle, or one
    that is a link, as in the hub's cache. Here the file is the one that bundle.json lists, with its size and hash.

    Attributes:
        path: The bundle's weights.data.
        offset: Its first byte there.
        dtype: Its type.
        shape: Its shape.
    """

    path: Path
    offset: int
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]

    def numpy(self) -> npt.NDArray[np.generic]:
        """Return the values, mapped from the file."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)


def read_tensors(bundle: Bundle) -> Mapping[str, StoredTensor]:
    """Return every external tensor of a bundle; values are mapped from the file when they are asked for.

    Nothing else of a graph is looked at: onnx-ir would log what is wrong with its nodes.

    Raises:
        BundleError: A graph cannot be read, or refers to another file than the bundle's own weights.data, or to bytes
            that are not in it.
    """
    found: dict[str, StoredTensor] = {}
    size = bundle.manifest.files[names.WEIGHTS_FILE].bytes
    paths = [bundle.graph_path(segment) for segment in bundle.manifest.plan.segments]
    paths += [bundle.folder / file for file in bundle.manifest.drafter_contracts()]
    for path in paths:
        try:
            graph = onnx.load_model(path, load_external_data=False).graph
            tensors = [ir.serde.deserialize_tensor(proto) for proto in graph.initializer]
        except Exception as error:  # protobuf's own errors have no common base
            raise BundleError(f"{path} is not an ONNX graph: {error}", remedy="re-export the bundle") from None
        for tensor in tensors:
            name = tensor.name or ""
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            if str(tensor.location) != names.WEIGHTS_FILE:  # a path out of the folder, perhaps
                raise BundleError(
                    f"{path}: tensor {name} lies in another file",
                    found=repr(str(tensor.location)),
                    expected=names.WEIGHTS_FILE,
                    remedy="re-export the bundle",
                )
            found.setdefault(name, _stored(bundle, path, name, tensor, size))
    return found


def _stored(bundle: Bundle, graph: Path, name: str, tensor: ir.ExternalTensor, size: int) -> StoredTensor:
    try:
        dtype = np.dtype(tensor.dtype.numpy())
    except TypeError:  # a tensor without a type
        raise BundleError(
            f"{graph}: tensor {name}", found=tensor.dtype, expected="a type of numbers", remedy="re-export the bundle"
        ) from None
    shape = tuple(int(dim) for dim in tensor.shape.numpy())
    offset, length = tensor.offset or 0, prod(shape) * dtype.itemsize
    if min(offset, length) < 0 or offset + length > size or tensor.length not in (None, length):
        raise BundleError(
            f"{graph}: tensor {name}",
            found=f"bytes {offset} to {offset + (tensor.length or length)} for {dtype} {list(shape)}",
            expected=f"{length} bytes within the {size} of {names.WEIGHTS_FILE}",
            remedy="re-export the bundle",
        )
    return StoredTensor(bundle.folder / names.WEIGHTS_FILE, offset, dtype, shape)
