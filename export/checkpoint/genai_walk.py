"""Walks a decoder's graph along its data, from the token ids to the logits, and lifts what each layer is made of.

The pattern is that of onnxruntime-genai's model builder; names of nodes do not matter::

    ids ─ Gather (─ Mul) ─┬─ norm ─ q, k, v: one product or three (─ Add) (─ Split) (─ norms of q and k) (─ rotation)
                          │         └─ GroupQueryAttention ─ product (─ Add) (─ Mul) (─ norm) ─┐
                          └────────────────────────────────────────────── sum and norm ───────┤  fused: Skip...
                          ┌───────────────────────────────────────────────────────────────────┘
                          ├─ products gate and up ─ activation ─ Mul ─ product (─ Add) (─ Mul) (─ norm) ─┐
                          └──────────────────────────────────────────────────────── sum and norm ────────┤
    after the last layer ─ product (─ Mul or Div) (─ Div, Tanh, Mul) ─ logits                            ┘ next layer

What is between ``attention_mask`` or ``position_ids`` and the lengths and positions of attention may be anything. Every
other node must be one of these, or the graph is refused by the name of the first that is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from shortstack.export.checkpoint.graph_reader import NORM, PRODUCTS, REMEDY, GraphReader, LiftedNorm, Product, shortest
from shortstack.export.checkpoint.lifted_model import LiftedLayer, LiftedModel
from shortstack.export.checkpoint.onnx_graph import Node, OnnxGraph
from shortstack.export.checkpoint.onnx_matrix import Matrix
from shortstack.graphs.errors import UnsupportedError
from shortstack.graphs.layer_spec import Activation

SKIP = "SkipSimplifiedLayerNormalization"


class Walk:
    """The walk; :meth:`model` makes it.

    Args:
        graph: The graph.
        ids: Its input of token ids.
        logits: Its output.
        side_inputs: Its inputs of masks and positions.
    """

    def __init__(self, graph: OnnxGraph, ids: str, logits: str, side_inputs: Iterable[str]) -> None:
        self._graph, self._ids, self._logits = graph, ids, logits
        self._side_inputs = frozenset(side_inputs)
        self._at = GraphReader(graph)
        self._interleaved = False
        self._side: list[str] = []

    def model(self) -> LiftedModel:
        """Walk the graph.

        Raises:
            UnsupportedError: A node does not fit the pattern.
            CheckpointError: A tensor does not fit its node.
        """
        if self._logits not in self._graph.outputs or self._ids not in self._graph.inputs:
            raise UnsupportedError(
                f"{self._graph.path}: inputs and outputs",
                found=f"{list(self._graph.inputs[:4])} and {list(self._graph.outputs[:4])}",
                expected=f"{self._ids} among the inputs and {self._logits} among the outputs",
                remedy=REMEDY,
            )
        count = sum(node.op == "GroupQueryAttention" for node in self._graph.nodes)
        if not count:
            kinds = sorted({node.op for node in self._graph.nodes if "Attention" in node.op or node.op == "Softmax"})
            raise UnsupportedError(
                f"{self._graph.path} has no GroupQueryAttention node",
                found=", ".join(kinds) or f"{len(self._graph.nodes)} nodes without attention",
                expected="a graph as the builder of onnxruntime-genai makes it for a CPU in fp32, int4 or int8",
                remedy=REMEDY,
            )
        stream, embedding = self._embedding()
        stream, embed_scale = self._at.constant_factor(stream)
        first, normed, _ = self._at.plain_norm(stream, "the first norm")
        layers = []
        for _ in range(count):
            layer, branch, stream = self._attention(normed, first, stream)
            normed, stream = self._branch_end(layer, branch, stream, "after_attention", "before_mlp")
            branch = self._mlp(layer, normed)
            normed, stream = self._branch_end(layer, branch, stream, "after_mlp", "next")
            first = layer.norms.pop("next")
            layers.append(layer)
        head, logits = self._at.product(self._at.one_user(normed, *PRODUCTS))
        if head.bias is not None:
            self._at.refuse(self._at.makers[logits], "an LM head without a bias")
        logits, scale = self._at.constant_factor(logits)
        softcap = 0.0
        if (user := self._at.first_user(logits)) is not None and user.op == "Tanh":
            logits, softcap = self._at.constant_factor(self._at.visit(user).outputs[0])
            scale = shortest(scale * softcap) if abs(scale * softcap - 1.0) > 1e-5 else 1.0
        if logits != self._logits:
            self._at.refuse(self._at.first_user(logits), "the end of the graph")
        self._check_rest()
        return LiftedModel(embedding, head.matrix, first, layers, embed_scale, scale, softcap)

    # Parts of a model

    def _embedding(self) -> tuple[str, Matrix]:
        users = [node for node in self._at.users.get(self._ids, []) if node.op in ("Gather", "GatherBlockQuantized")]
        if len(users) != 1:
            self._at.refuse(self._at.first_user(self._ids), "one look-up of token ids")
        node = self._at.visit(users[0])
        source, is_turned = node.input(0), False
        while source in self._at.makers:  # a tied head, turned or in another shape
            made_by = self._at.visit(self._at.makers[source])
            if made_by.op == "Transpose" and list(made_by.attributes.get("perm") or (1, 0)) == [1, 0]:
                is_turned = not is_turned
            elif made_by.op != "Reshape" or node.op == "Gather":
                self._at.refuse(made_by, "a look-up in a weight")
            source = made_by.input(0)
        data = self._at.tensor(source, node)
        if node.op == "Gather":
            self._at.attributes(node, axis=0)
            if len(data.shape) != 2:
                self._at.refuse(node, "a matrix")
            rows, width = data.shape[::-1] if is_turned else data.shape
            return node.outputs[0], Matrix(str(node), data, rows, width, is_turned)
        self._at.attributes(node, gather_axis=0, quantize_axis=1)
        bits, size = self._at.integer(node, "bits", 4), self._at.integer(node, "block_size", 128)
        self._at.check_blocks(node, bits, size)
        looked_up = self._graph.tensors.get(node.input(0), data)
        rows = data.shape[0] if data.shape else 0
        scales = self._at.tensor(node.input(2), node)
        per_row = int(np.prod(looked_up.shape[1:])) if len(looked_up.shape) > 1 else 0
        zeros = self._graph.tensors.get(node.input(3)) if node.input(3) else None
        return node.outputs[0], Matrix(
            str(node), data, rows, per_row * 8 // bits, bits=bits, block_size=size, scales=scales, zero_points=zeros
        )

    def _attention(self, normed: str, first: LiftedNorm, stream: str) -> tuple[LiftedLayer, str, str]:
        products = self._at.users.get(normed, [])
        if not products or any(node.op not in PRODUCTS for node in products) or len(products) not in (1, 3):
            odd = next((node for node in products if node.op not in PRODUCTS), self._at.first_user(normed))
            self._at.refuse(odd, "one product of queries, keys and values, or three")
        made = [self._at.product(node) for node in products]
        norms: dict[int, LiftedNorm] = {}
        turned: dict[int, tuple[str, str]] = {}
        if len(made) == 1:
            product, packed = made[0]
            user = self._at.first_user(packed)
            parts = [packed] if user is None or user.op != "Split" else list(self._at.visit(user).outputs)
        else:
            parts = [value for _, value in made]
        ends = [self._to_attention(part, norms, turned, number) for number, part in enumerate(parts)]
        nodes = {id(node): node for node, _ in ends}
        node = self._at.visit(ends[0][0])
        if len(nodes) != 1:
            self._at.refuse(ends[1][0], "one GroupQueryAttention for queries, keys and values")
        self._check_attention(node)
        places = [place for _, place in ends]
        heads, kv_heads = self._at.integer(node, "num_heads", 0), self._at.integer(node, "kv_num_heads", 0)
        if min(heads, kv_heads) < 1 or heads % max(kv_heads, 1) or sorted(places) != list(range(len(places))):
            self._at.refuse(node, "queries, keys and values of a whole number of heads")
        if len(made) == 1:
            matrix, bias = product.matrix, product.bias
            width, rest = divmod(matrix.rows, heads + 2 * kv_heads)
            if rest or width < 1:
                self._at.refuse(node, f"a product with a multiple of {heads + 2 * kv_heads} rows")
            starts = (0, heads * width, (heads + kv_heads) * width)
            counts = (heads * width, kv_heads * width, kv_heads * width)
            if len(parts) == 3 and self._split_sizes(self._at.makers[parts[0]]) != list(counts):
                self._at.refuse(self._at.makers[parts[0]], f"parts of {list(counts)} columns")
            if len(parts) not in (1, 3):
                self._at.refuse(self._at.makers[parts[0]], "three parts")
            q, k, v = (Product(matrix.part(at, count), bias) for at, count in zip(starts, counts, strict=True))
        else:
            q, k, v = (made[places.index(place)][0] for place in range(3))
        o, mixed = self._at.product(self._at.one_user(node.outputs[0], *PRODUCTS))
        layer = LiftedLayer(node, q, k, v, o, {"before_attention": first})
        by_place = {places[number]: norm for number, norm in norms.items()}
        for place, name in ((0, node.input(14)), (1, node.input(15))):  # fused norms, of graphs for CUDA
            if name:
                eps = self._at.number(node, "qk_norm_epsilon", 1e-6)
                by_place[place] = LiftedNorm(self._at.tensor(name, node), eps)
        if by_place:
            if by_place.keys() != {0, 1}:
                self._at.refuse(node, "norms of both queries and keys, or none")
            layer.qk_norms = by_place[0], by_place[1]
        self._rope(layer, node, {places[number]: tables for number, tables in turned.items()})
        return layer, mixed, stream

    def _to_attention(
        self, value: str, norms: dict[int, LiftedNorm], turned: dict[int, tuple[str, str]], number: int
    ) -> tuple[Node, int]:
        """Follow queries, keys or values to the kernel; return it and the place at which they enter."""
        while True:
            node = self._at.one_user(value, "GroupQueryAttention", "Reshape", NORM, "RotaryEmbedding", "Split")
            if node.op == "GroupQueryAttention":
                return node, node.inputs.index(value)
            if node.op == "Split":
                self._at.refuse(node, "GroupQueryAttention")
            self._at.visit(node)
            if node.op == NORM:
                norms[number] = self._at.norm_of(node)
            elif node.op == "RotaryEmbedding":
                self._side.append(node.input(1))
                self._at.attributes(node, rotary_embedding_dim=0, scale=1.0, is_packed_batching=0)
                turned[number] = node.input(2), node.input(3)
                self._interleaved = bool(self._at.integer(node, "interleaved", 0))
            value = node.outputs[0]

    def _rope(self, layer: LiftedLayer, node: Node, turned: Mapping[int, tuple[str, str]]) -> None:
        if self._at.integer(node, "do_rotary", 0):
            if turned:
                self._at.refuse(node, "one rotation of queries and keys")
            layer.rope = node.input(7), node.input(8)
            layer.is_interleaved = bool(self._at.integer(node, "rotary_interleaved", 0))
        elif turned:
            if turned.keys() != {0, 1} or turned[0] != turned[1]:
                self._at.refuse(node, "the same rotation of queries and keys")
            layer.rope = turned[0]
            layer.is_interleaved = self._interleaved
        for name in layer.rope or ():
            self._at.tensor(name, node)

    def _check_attention(self, node: Node) -> None:
        self._side += [node.input(5), node.input(6), node.input(9)]
        self._at.attributes(node, smooth_softmax=(0, -1), qk_output=0, causal=1)
        for place, what in ((10, "attention_bias"), (11, "head_sink"), (12, "k_scale"), (13, "v_scale")):
            if node.input(place):
                self._at.refuse(node, f"attention without {what}")
        for place in (3, 4):
            if node.input(place) not in self._graph.inputs:
                self._at.refuse(node, "a cache that is an input of the graph")

    def _branch_end(self, layer: LiftedLayer, branch: str, stream: str, after: str, before: str) -> tuple[str, str]:
        """Follow a branch into the stream; return what the next branch reads, and the stream."""
        branch, scale = self._at.constant_factor(branch)
        if after == "after_attention":
            layer.scale = scale
        elif scale != layer.scale:
            self._at.refuse(self._at.makers[branch], f"a factor of {layer.scale}, as in the attention's branch")
        user = self._at.one_user(branch, NORM, SKIP)
        if user.op == NORM:
            layer.norms[after], branch, _ = self._at.plain_norm(branch, after)
            user = self._at.one_user(branch, SKIP)
        node = self._at.visit(user)
        if {node.input(0), node.input(1)} != {stream, branch}:
            self._at.refuse(node, "the sum of the residual stream and one branch")
        if node.input(3):
            self._at.refuse(node, "a sum without a bias")
        layer.norms[before] = LiftedNorm(self._at.tensor(node.input(2), node), self._at.number(node, "epsilon", 1e-5))
        return node.outputs[0], node.outputs[3] if len(node.outputs) > 3 else ""

    def _mlp(self, layer: LiftedLayer, normed: str) -> str:
        products = self._at.users.get(normed, [])
        if len(products) not in (1, 2) or any(node.op not in PRODUCTS for node in products):
            odd = next((node for node in products if node.op not in PRODUCTS), self._at.first_user(normed))
            self._at.refuse(odd, "the products of an MLP")
        made = [self._at.product(node) for node in products]
        active: list[tuple[int, str, Activation]] = []
        for number, (_, value) in enumerate(made):
            if (found := self._activation(value)) is not None:
                active.append((number, *found))
        if len(active) != 1:
            self._at.refuse(self._at.first_user(made[0][1]), "one activation: silu, gelu or its approximation")
        gate, value, layer.activation = active[0]
        if len(made) == 2:
            layer.mlp = {"gate_proj": made[gate][0], "up_proj": made[1 - gate][0]}
            node = self._at.visit(self._at.one_user(value, "Mul"))
            if {node.input(0), node.input(1)} != {value, made[1 - gate][1]}:
                self._at.refuse(node, "the product of gate and up")
            value = node.outputs[0]
        else:
            layer.mlp = {"up_proj": made[0][0]}
        layer.mlp["down_proj"], out = self._at.product(self._at.one_user(value, *PRODUCTS))
        return out

    def _activation(self, value: str) -> tuple[str, Activation] | None:
        users = self._at.users.get(value, [])
        by_op = {node.op: node for node in users}
        if by_op.keys() == {"Sigmoid", "Mul"} and len(users) == 2:
            sigmoid, product = by_op["Sigmoid"], by_op["Mul"]
            if {product.input(0), product.input(1)} == {value, sigmoid.outputs[0]}:
                self._at.visit(sigmoid)
                return self._at.visit(product).outputs[0], "silu"
        if len(users) != 1:
            return None
        node = users[0]
        if node.op == "QuickGelu" and self._at.number(node, "alpha", 1.702) == 1.0:
            return self._at.visit(node).outputs[0], "silu"
        if node.op == "FastGelu" and not node.input(1):
            return self._at.visit(node).outputs[0], "gelu_tanh"
        if node.op == "Gelu":
            kind: Activation = "gelu_tanh" if node.attributes.get("approximate") == b"tanh" else "gelu"
            return self._at.visit(node).outputs[0], kind
        return None

    def _split_sizes(self, node: Node) -> list[int]:
        tensor = self._graph.tensors.get(node.input(1))
        return [] if tensor is None else [int(size) for size in tensor.read().reshape(-1)]

    def _check_rest(self) -> None:
        """Refuse a node that is neither a part of the model nor of what attention knows of lengths and positions."""
        pending, sources = [name for name in self._side if name], set[str]()
        while pending:
            name = pending.pop()
            if name in sources:
                continue
            sources.add(name)
            if (node := self._at.makers.get(name)) is not None:
                if id(node) in self._at.seen:
                    self._at.refuse(node, "lengths and positions that do not depend on the layers")
                pending += [other for other in node.inputs if other]
        foreign = sources & (set(self._graph.inputs) - self._side_inputs - {self._ids})
        if foreign:
            raise UnsupportedError(
                f"{self._graph.path}: input {sorted(foreign)[0]}", expected="one that a bundle can do without"
            )
        for node in self._graph.nodes:
            if id(node) not in self._at.seen and not sources & set(node.outputs):
                self._at.refuse(node, "a node of the pattern")
