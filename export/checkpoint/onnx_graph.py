"""An ONNX file that may be hostile: its nodes, and its tensors, which are read when they are asked for.

Weights lie in the file itself or in others beside it, at an offset. Such a file must be one of the same folder, and the
bytes must be in it. No path leads out of the folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx

from shortstack.export.checkpoint.hf import member
from shortstack.graphs.errors import CheckpointError, UnsupportedError
from shortstack.graphs.read_file import read_file

_LARGEST_GRAPH = 1 << 31  # what protobuf reads
_AGAIN = "copy the folder again as a whole, or build it again"
_DTYPES: Mapping[int, npt.DTypeLike] = MappingProxyType(
    {
        onnx.TensorProto.FLOAT: np.float32,
        onnx.TensorProto.FLOAT16: np.float16,
        onnx.TensorProto.BFLOAT16: ml_dtypes.bfloat16,
        onnx.TensorProto.UINT8: np.uint8,
        onnx.TensorProto.INT8: np.int8,
        onnx.TensorProto.INT32: np.int32,
        onnx.TensorProto.INT64: np.int64,
    }
)
_FLOATS = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16})


@dataclass(frozen=True, slots=True)
class Node:
    """One node; an optional input or output that is left out is an empty name."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    def input(self, index: int) -> str:
        """Return the name of an input; empty if it is left out."""
        return self.inputs[index] if index < len(self.inputs) else ""

    def __str__(self) -> str:
        return f"node {self.name or '(without a name)'}, a {self.op}"


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the graph.

    Attributes:
        where: The file of the graph and the tensor, for messages.
        dtype: Its type.
        shape: Its shape.
        inline: Its values, where they are in the graph itself.
        file: The file beside it that holds them otherwise.
        offset: Where they begin there.
    """

    where: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    inline: npt.NDArray[Any] | None = None
    file: Path | None = None
    offset: int = 0

    @property
    def is_float(self) -> bool:
        """Whether it holds floats of any width."""
        return bool(self.dtype.kind == "f" or self.dtype == np.dtype(ml_dtypes.bfloat16))

    def read(self) -> npt.NDArray[Any]:
        """Return the values as they are stored, mapped from the file; not to be changed."""
        if self.inline is not None:
            return self.inline
        if math.prod(self.shape) == 0:
            return np.zeros(self.shape, self.dtype)
        assert self.file is not None
        try:
            return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.where} cannot be read ({error})", remedy=_AGAIN) from None


class OnnxGraph:
    """A graph and its tensors.

    Args:
        path: The file.
        follow_links: Follow links that lead out of its folder.

    Attributes:
        path: The file.
        nodes: Its nodes, those left out that only give or cast a value.
        inputs: Names of its inputs.
        outputs: Names of its outputs.
        tensors: Initializers and constants by name.
        data_files: The files beside it that hold weights.

    Raises:
        CheckpointError: It cannot be read, or a tensor is not where it says.
        UnsupportedError: It has functions or tensors of an unknown kind.
    """

    def __init__(self, path: Path, *, follow_links: bool = False) -> None:
        self.path = path
        self._follow_links = follow_links
        content = read_file(path, CheckpointError, _AGAIN, limit=_LARGEST_GRAPH)
        try:
            model = onnx.load_model_from_string(content)
        except Exception as error:  # protobuf's own errors have no common base
            raise CheckpointError(f"{path} is not an ONNX graph ({error})", remedy=_AGAIN) from None
        graph = model.graph
        if model.functions or graph.sparse_initializer:
            raise UnsupportedError(f"{path} has functions or sparse tensors", remedy="export the checkpoint itself")
        self.inputs = tuple(port.name for port in graph.input)
        self._files: dict[str, Path] = {}
        self.tensors: dict[str, Tensor] = {}
        for proto in graph.initializer:
            self.tensors[proto.name] = self._tensor(proto, proto.name)
        nodes: list[Node] = []
        same: dict[str, str] = {}  # what casts and identities return, and what it is
        types = {port.name: port.type.tensor_type.elem_type for port in graph.input}
        types |= {proto.name: proto.data_type for proto in graph.initializer}
        for proto in graph.node:
            node = _node(proto, same)
            value = node.attributes.get("value")
            if node.op == "Constant" and isinstance(value, onnx.TensorProto) and len(node.outputs) == 1:
                self.tensors[node.outputs[0]] = self._tensor(value, node.outputs[0])
            elif node.op == "Identity" or (node.op == "Cast" and _keeps_floats(node, types)):
                same[node.outputs[0]] = node.inputs[0]
            else:
                nodes.append(node)
        self.nodes = tuple(nodes)
        self.outputs = tuple(same.get(port.name, port.name) for port in graph.output)
        self.output_names = tuple(port.name for port in graph.output)

    @property
    def data_files(self) -> tuple[Path, ...]:
        """The files beside it that hold weights, by name."""
        return tuple(self._files[name] for name in sorted(self._files))

    def _tensor(self, proto: onnx.TensorProto, name: str) -> Tensor:
        where, shape = f"{self.path}: tensor {name}", tuple(proto.dims)
        if proto.data_type not in _DTYPES:
            found = onnx.TensorProto.DataType.Name(proto.data_type) if proto.data_type in _KNOWN else proto.data_type
            raise UnsupportedError(where, found=f"type {found}", expected="floats, int8, uint8, int32 or int64")
        dtype = np.dtype(_DTYPES[proto.data_type])
        if min(shape, default=0) < 0:
            raise CheckpointError(where, found=f"shape {list(shape)}", remedy=_AGAIN)
        if proto.data_location != onnx.TensorProto.EXTERNAL:
            return Tensor(where, dtype, shape, inline=_inline(proto, where, dtype, shape))
        entries = {entry.key: entry.value for entry in proto.external_data}
        file = self._data_file(entries.get("location", ""), where)
        size, wanted = file.stat().st_size, math.prod(shape) * dtype.itemsize
        offset = _whole_number(entries.get("offset", "0"))
        length = _whole_number(entries.get("length", str(wanted)))
        if offset is None or length != wanted or offset + wanted > size:
            raise CheckpointError(
                where,
                found=f"{entries.get('length', 'no length')} bytes at {entries.get('offset', 0)}",
                expected=f"{wanted} bytes for {dtype} {list(shape)} within the {size} of {file.name}",
                remedy=_AGAIN,
            )
        return Tensor(where, dtype, shape, file=file, offset=offset)

    def _data_file(self, location: str, where: str) -> Path:
        if location not in self._files:
            if Path(location).name != location or location in ("", ".", "..") or "\\" in location or "\0" in location:
                raise CheckpointError(
                    where, found=f"its data in {location!r}", expected="a plain file name in the same folder"
                )
            file = member(self.path.parent, location, follow_links=self._follow_links)
            if file is None:
                raise CheckpointError(f"{where} lies in {location}, which is missing", remedy="finish the download")
            self._files[location] = file
        return self._files[location]


_KNOWN = frozenset(onnx.TensorProto.DataType.values())


def _node(proto: onnx.NodeProto, same: Mapping[str, str]) -> Node:
    attributes: dict[str, Any] = {}
    for attribute in proto.attribute:
        try:
            attributes[attribute.name] = onnx.helper.get_attribute_value(attribute)
        except ValueError:  # of a type that this version does not know
            attributes[attribute.name] = None
    inputs = tuple(same.get(name, name) for name in proto.input)
    return Node(proto.op_type, proto.name, inputs, tuple(proto.output), attributes)


def _keeps_floats(node: Node, types: dict[str, int]) -> bool:
    """Whether a cast is between floats: of a value that no integer can be, since all integers here are known."""
    return node.attributes.get("to") in _FLOATS and types.get(node.input(0), onnx.TensorProto.FLOAT) in _FLOATS


def _whole_number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else None


def _inline(proto: onnx.TensorProto, where: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    try:
        array = np.asarray(onnx.numpy_helper.to_array(proto))
    except Exception as error:  # of many kinds, by what is damaged
        raise CheckpointError(f"{where} cannot be read ({error})", remedy=_AGAIN) from None
    if array.shape != shape or array.dtype != dtype:
        raise CheckpointError(where, found=f"{array.dtype} {list(array.shape)}", expected=f"{dtype} {list(shape)}")
    return array
