"""A graph under construction: ports from the contract, weights from the store, one node per call.

Node names follow the layer tree (``/model/layers.7/attn/qkv_proj/MatMul``); a node's first output carries its name.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from shortstack.graphs.contract import GraphContract, Port
from shortstack.graphs.ir.weights import BlockMatrix, WeightStore

MICROSOFT = "com.microsoft"
OPSETS = {"": 21, MICROSOFT: 1}
IR_VERSION = 10  # read since onnxruntime 1.18, so by the GPU builds for JetPack 6 too

Attribute = int | float | str | Sequence[int]


class GraphBuilder:
    """Collects the nodes of one graph.

    Args:
        name: The graph's name.
        store: Where its weights are.
    """

    def __init__(self, name: str, store: WeightStore) -> None:
        self._name = name
        self._store = store
        self._nodes: list[ir.Node] = []
        self._inputs: dict[str, ir.Value] = {}
        self._initializers: dict[str, ir.Value] = {}
        self._made: dict[Hashable, ir.Value] = {}
        self.projected: dict[str, ir.Value] = {}  # what each matrix multiplies, by the matrix's name

    def input(self, port: Port) -> ir.Value:
        """Declare a graph input."""
        value = ir.Value(name=port.name, shape=ir.Shape(port.shape), type=ir.TensorType(_data_type(port)))
        self._inputs[port.name] = value
        return value

    def input_named(self, name: str) -> ir.Value:
        """Return an input that was declared before."""
        return self._inputs[name]

    def has_input(self, name: str) -> bool:
        """Return whether an input of this name was declared."""
        return name in self._inputs

    def weight(self, name: str) -> ir.Value:
        """Return the initializer that stands for a stored tensor."""
        return self._initializer(self._store[name])

    def once(self, key: Hashable, make: Callable[[], ir.Value]) -> ir.Value:
        """Return what ``make`` appended when it was first asked for under this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def has_weight(self, name: str) -> bool:
        """Return whether a tensor or matrix of this name is stored."""
        return name in self._store

    def block_matrix(self, name: str) -> BlockMatrix | None:
        """Return the layout of a matrix stored in blocks; None if it is stored as floats."""
        return self._store.blocks(name)

    def reshaped_weight(self, name: str, shape: tuple[int, ...]) -> ir.Value:
        """Return the initializer that stands for a stored tensor under another shape."""
        return self._initializer(self._store.reshaped(name, shape))

    def constant(self, value: int | Sequence[int], dtype: npt.DTypeLike = np.int64) -> ir.Value:
        """Return a small integer constant kept inside the graph file; one initializer per value and type."""
        array = np.asarray(value, dtype=dtype)
        label = "x".join(map(str, array.reshape(-1))) if array.ndim else f"scalar_{array}"
        return self._initializer(
            ir.Tensor(array, name=f"const.{label}" if array.dtype == np.int64 else f"const.{array.dtype}.{label}")
        )

    def filled(self, size: int, value: float) -> ir.Value:
        """Return a vector of one number, float32 [size], kept inside the graph file."""
        return self._initializer(ir.Tensor(np.full(size, value, np.float32), name=f"const.float32.{size}x{value!r}"))

    def numbers(self, values: npt.NDArray[np.float32], label: str) -> ir.Value:
        """Return a few numbers that a label names, float32, kept inside the graph file."""
        return self._initializer(ir.Tensor(values, name=f"const.float32.{label}"))

    def scaled(self, x: ir.Value, factor: float, name: str) -> ir.Value:
        """Append ``x * factor``; the factor has the type of ``x``."""
        number = self._initializer(ir.Tensor(np.array(factor, np.float32), name=f"const.float32.{factor!r}"))
        return self.op("Mul", [x, self.op("CastLike", [number, x], f"{name}/factor")], name)

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        domain: str = "",
        **attributes: Attribute,
    ) -> ir.Value:
        """Append a node with one output and return that output."""
        return self.ops(op_type, inputs, name, ("",), domain=domain, **attributes)[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        suffixes: Sequence[str | None],
        *,
        domain: str = "",
        **attributes: Attribute,
    ) -> list[ir.Value]:
        """Append a node with several outputs.

        Args:
            op_type: The operator.
            inputs: Its inputs; None for an optional one left out.
            name: The node's name.
            suffixes: One per output, appended to the node's name; None for an optional output left out.
            domain: The operator's domain.
            **attributes: The operator's attributes.
        """
        outputs = [ir.Value(name="" if suffix is None else name + suffix) for suffix in suffixes]
        self._nodes.append(
            ir.Node(
                domain,
                op_type,
                inputs,
                ir.convenience.convert_attributes(attributes),
                outputs=outputs,
                name=name,
            )
        )
        return outputs

    def finish(self, contract: GraphContract, outputs: dict[str, ir.Value], producer: str) -> ir.Model:
        """Return the model, its ports named and typed by the contract.

        Args:
            contract: The border.
            outputs: One value per output port, by port name.
            producer: What made the graph, with its version.
        """
        for port in contract.outputs:
            value = outputs[port.name]
            value.name = port.name
            value.shape = ir.Shape(port.shape)
            value.type = ir.TensorType(_data_type(port))
        graph = ir.Graph(
            [self._inputs[port.name] for port in contract.inputs],
            [outputs[port.name] for port in contract.outputs],
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports=OPSETS,
            name=self._name,
        )
        tool, version = producer.split(" ")
        return ir.Model(graph, ir_version=IR_VERSION, producer_name=tool, producer_version=version)

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        name = tensor.name or ""
        if name not in self._initializers:
            self._initializers[name] = ir.Value(
                name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return self._initializers[name]


def _data_type(port: Port) -> ir.DataType:
    return ir.DataType.from_numpy(np.dtype(port.dtype))
