"""Reads single nodes of a foreign graph strictly: products, norms, factors, attributes, each refused by its name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from shortstack.export.checkpoint.onnx_graph import Node, OnnxGraph, Tensor
from shortstack.export.checkpoint.onnx_matrix import Matrix
from shortstack.graphs.errors import UnsupportedError

NORM = "SimplifiedLayerNormalization"
PRODUCTS = ("MatMul", "MatMulNBits")
REMEDY = "export the checkpoint that the graph was built from"


@dataclass(frozen=True, slots=True)
class LiftedNorm:
    """A root-mean-square norm: its weight and its epsilon."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Product:
    """A projection, and its bias [rows] if it has one, with the row at which the bias begins."""

    matrix: Matrix
    bias: Tensor | None = None

    def bias_part(self) -> npt.NDArray[np.float32] | None:
        """Return the bias of the rows that are meant."""
        if self.bias is None:
            return None
        first = self.matrix.first
        return np.array(self.bias.read()[first : first + self.matrix.shape[0]], np.float32)


class GraphReader:
    """The nodes of a graph by what they use, and which of them have been read.

    Args:
        graph: The graph.

    Attributes:
        graph: The graph.
        users: The nodes that use a value.
        makers: The node that makes a value.
        seen: The nodes that have been read, by :func:`id`.
    """

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = graph
        self.users: dict[str, list[Node]] = {}
        self.makers: dict[str, Node] = {}
        for node in graph.nodes:
            for name in dict.fromkeys(filter(None, node.inputs)):
                self.users.setdefault(name, []).append(node)
            self.makers |= dict.fromkeys(filter(None, node.outputs), node)
        self.seen: set[int] = set()

    # Parts of a layer

    def product(self, node: Node) -> tuple[Product, str]:
        """Read a projection and the bias after it; return it and its result."""
        self.visit(node)
        data = self.tensor(node.input(1), node)
        out, bias = node.outputs[0], node.input(5)
        if node.op == "MatMul":
            if len(data.shape) != 2:
                self.refuse(node, "a product with a matrix")
            matrix = Matrix(str(node), data, data.shape[1], data.shape[0], is_turned=True)
        else:
            bits, size = self.integer(node, "bits", 4), self.integer(node, "block_size", 32)
            self.check_blocks(node, bits, size)
            self.attributes(node, weight_prepacked=0)
            if node.input(4):
                self.refuse(node, "columns in their own order, without g_idx")
            width, rows = self.integer(node, "K", 0), self.integer(node, "N", 0)
            if min(width, rows) < 1:
                self.refuse(node, "K and N above 0")
            zeros = self.tensor(node.input(3), node) if node.input(3) else None
            scales = self.tensor(node.input(2), node)
            matrix = Matrix(str(node), data, rows, width, bits=bits, block_size=size, scales=scales, zero_points=zeros)
        user = self.first_user(out)
        if not bias and user is not None and user.op == "Add" and len(self.users[out]) == 1:
            bias = next((name for name in user.inputs if name in self.graph.tensors), "")
            if bias:
                out = self.visit(user).outputs[0]
        found = self.tensor(bias, node) if bias else None
        if found is not None and (found.shape != (matrix.rows,) or not found.is_float):
            self.refuse(node, f"a bias of {matrix.rows} floats")
        return Product(matrix, found), out

    def plain_norm(self, value: str, what: str) -> tuple[LiftedNorm, str, Node]:
        """Read the norm of a value; return it, its result and the node."""
        node = next((node for node in self.users.get(value, []) if node.op == NORM), None)
        if node is None:
            self.refuse(self.first_user(value), f"{what}, a {NORM}")
        self.visit(node)
        return self.norm_of(node), node.outputs[0], node

    def norm_of(self, node: Node) -> LiftedNorm:
        """Return the weight and the epsilon of a norm."""
        self.attributes(node, axis=-1)
        return LiftedNorm(self.tensor(node.input(1), node), self.number(node, "epsilon", 1e-5))

    def constant_factor(self, value: str) -> tuple[str, float]:
        """Pass a multiplication or division by a number; return the value after it, and the factor."""
        users = self.users.get(value, [])
        if len(users) != 1 or users[0].op not in ("Mul", "Div"):
            return value, 1.0
        node = users[0]
        other = node.input(1) if node.input(0) == value else node.input(0)
        tensor = self.graph.tensors.get(other)
        if tensor is None or tensor.shape not in ((), (1,)) or (node.op == "Div" and node.input(0) != value):
            return value, 1.0
        return self.visit(node).outputs[0], self.factor_of(node)

    def factor_of(self, node: Node) -> float:
        """Return the number that a node multiplies by."""
        names = [name for name in node.inputs if name in self.graph.tensors]
        if node.op not in ("Mul", "Div") or len(names) != 1:
            self.refuse(node, "a division by a number")
        number = float(np.asarray(self.graph.tensors[names[0]].read(), np.float32).reshape(-1)[0])
        if not np.isfinite(number) or number == 0:
            self.refuse(node, "a finite number that is not 0")
        number = shortest(number)
        return 1.0 / number if node.op == "Div" else number

    # Steps

    def visit(self, node: Node) -> Node:
        """Note that a node has been read."""
        self.seen.add(id(node))
        return node

    def first_user(self, value: str) -> Node | None:
        """Return a node that uses a value; None without any."""
        return next(iter(self.users.get(value, [])), None)

    def one_user(self, value: str, *ops: str) -> Node:
        """Return the only node that uses a value, which must be one of these operators."""
        users = self.users.get(value, [])
        if len(users) != 1 or users[0].op not in ops:
            odd = next((node for node in users if node.op not in ops), self.first_user(value))
            self.refuse(odd or self.makers.get(value), f"{' or '.join(ops)} and nothing else after {value}")
        return users[0]

    def tensor(self, name: str, node: Node) -> Tensor:
        """Return a weight, by its name."""
        if name not in self.graph.tensors:
            self.refuse(node, f"weights that the graph holds, not {name or 'nothing'}")
        return self.graph.tensors[name]

    def integer(self, node: Node, name: str, default: int) -> int:
        """Return an attribute that must be an integer."""
        value = node.attributes.get(name, default)
        if type(value) is not int:
            self.refuse(node, f"an integer {name}")
        return value

    def number(self, node: Node, name: str, default: float) -> float:
        """Return an attribute that must be a finite number, as the shortest decimal."""
        value = node.attributes.get(name, default)
        if type(value) not in (int, float) or not np.isfinite(value):
            self.refuse(node, f"a finite number {name}")
        return shortest(float(value))

    def attributes(self, node: Node, **expected: Any) -> None:
        """Refuse a node whose attribute has another value than one of those that change nothing."""
        for name, values in expected.items():
            found = node.attributes.get(name)
            allowed = values if isinstance(values, tuple) else (values,)
            if found is not None and found not in allowed:
                self.refuse(node, f"{name} = {allowed[0]}, not {found}")

    def check_blocks(self, node: Node, bits: int, size: int) -> None:
        """Refuse blocks that no kernel has."""
        if bits not in (2, 4, 8) or not 16 <= size <= 1 << 16 or size & (size - 1):
            self.refuse(node, f"codes of 2, 4 or 8 bits in blocks of 16, 32, 64, ..., not {bits} bits in {size}")

    def refuse(self, node: Node | None, expected: str) -> NoReturn:
        """Refuse the graph because of a node.

        Raises:
            UnsupportedError: Always.
        """
        what = "the end of the graph" if node is None else str(node)
        raise UnsupportedError(
            f"{self.graph.path}: {what} does not fit the pattern of a decoder", expected=expected, remedy=REMEDY
        )


def shortest(number: float) -> float:
    """Return the shortest decimal that is the same float32: 1e-06 for 9.99999997e-07."""
    return float(str(np.float32(number)))
