"""What lint finds in graphs whose rows would depend on each other, wherever in a graph it stands."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from shortstack.graphs.errors import ContractError
from shortstack.graphs.ir.builder import MICROSOFT
from shortstack.graphs.ir.lint import BANNED, lint, lint_findings
from shortstack.graphs.precision import ACCURACY_LEVEL


def nbits(name: str, **attributes: Any) -> onnx.NodeProto:
    fields = {"K": 32, "N": 4, "bits": 4, "block_size": 32, **attributes}
    return helper.make_node("MatMulNBits", ["x", "codes", "scales"], [f"{name}.y"], name, domain=MICROSOFT, **fields)


def good(name: str) -> onnx.NodeProto:
    return nbits(name, accuracy_level=ACCURACY_LEVEL)


def graph_of(name: str, *nodes: onnx.NodeProto) -> onnx.GraphProto:
    output = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
    return helper.make_graph(list(nodes), name, [], [output])


def model_of(*nodes: onnx.NodeProto, functions: tuple[onnx.FunctionProto, ...] = ()) -> ir.Model:
    graph = graph_of("main", *nodes)
    graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 32]))
    graph.initializer.append(numpy_helper.from_array(np.zeros((4, 1, 16), np.uint8), "codes"))
    graph.initializer.append(numpy_helper.from_array(np.zeros((4, 1), np.float32), "scales"))
    graph.initializer.append(numpy_helper.from_array(np.array(True), "condition"))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1), helper.make_opsetid("local", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, functions=list(functions)))


def inside_if(*nodes: onnx.NodeProto) -> onnx.NodeProto:
    branches = {"then_branch": graph_of("then", good("then")), "else_branch": graph_of("else", *nodes)}
    return helper.make_node("If", ["condition"], ["chosen"], "choice", **branches)


def test_products_at_the_level_of_integer_kernels_pass() -> None:
    model = model_of(good("first"), inside_if(good("second")), helper.make_node("MatMul", ["x", "x"], ["y"], "third"))
    assert lint_findings(model) == []
    lint(model, "graph.onnx")


@pytest.mark.parametrize(("attributes", "level"), [({}, 0), *(({"accuracy_level": n}, n) for n in (0, 1, 2, 3))])
@pytest.mark.parametrize("is_inside", [False, True])
def test_another_accuracy_level_or_none_is_found(attributes: dict[str, int], level: int, is_inside: bool) -> None:
    node = nbits("/model/layers.0/q", **attributes)
    model = model_of(good("first"), inside_if(node) if is_inside else node)
    assert lint_findings(model) == [f"/model/layers.0/q has accuracy_level {level} instead of {ACCURACY_LEVEL}"]
    with pytest.raises(ContractError, match=r"layers-00-01.onnx would not verify what it drafts: /model/layers.0/q"):
        lint(model, "layers-00-01.onnx")


@pytest.mark.parametrize("op_type", sorted(BANNED))
@pytest.mark.parametrize("is_inside", [False, True])
def test_operators_with_one_scale_for_all_rows_are_found(op_type: str, is_inside: bool) -> None:
    node = helper.make_node(op_type, ["x"], ["y"], "mixer")
    (finding,) = lint_findings(model_of(inside_if(node) if is_inside else node))
    assert finding == f"mixer is a {op_type}, whose rows depend on each other"


def test_the_operators_of_dynamic_quantization_are_banned() -> None:
    assert {"DynamicQuantizeLinear", "MatMulInteger", "DynamicQuantizeMatMul"} <= BANNED


def test_a_node_without_a_name_is_called_by_its_type() -> None:
    (finding,) = lint_findings(model_of(helper.make_node("MatMulInteger", ["x", "x"], ["y"])))
    assert finding.startswith("MatMulInteger is a MatMulInteger")


def test_a_branch_of_a_branch_and_a_function_are_looked_into() -> None:
    deep = inside_if(helper.make_node("DynamicQuantizeLinear", ["x"], ["a", "b", "c"], "deep"))
    function = helper.make_function(
        "local",
        "Hidden",
        ["x"],
        ["y"],
        [helper.make_node("MatMulInteger", ["x", "x"], ["y"], "within")],
        [helper.make_opsetid("", 21)],
    )
    call = helper.make_node("Hidden", ["x"], ["z"], "call", domain="local")
    findings = lint_findings(model_of(inside_if(deep), call, functions=(function,)))
    assert {finding.split(" ")[0] for finding in findings} == {"deep", "within"}


def test_all_findings_are_listed_at_once() -> None:
    model = model_of(nbits("first"), inside_if(nbits("second", accuracy_level=1)), nbits("third"))
    with pytest.raises(ContractError) as caught:
        lint(model, "graph.onnx")
    message = str(caught.value)
    assert all(name in message for name in ("first has", "second has", "third has", "shortstack quantize"))


def test_an_order_inside_a_product_is_found() -> None:
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales", "", "order"], ["y"], "/q", domain=MICROSOFT,
        K=32, N=4, bits=4, block_size=32, accuracy_level=ACCURACY_LEVEL,
    )  # fmt: skip
    assert lint_findings(model_of(node)) == ["/q has g_idx, which gives wrong products with zero points"]
