"""What no graph that drafts or verifies may contain: operators that mix rows, or that are far too slow.

- MatMulNBits at another accuracy level than 4: 8-bit codes would be dequantized on every call, and 4-bit products
  would not be the ones that decoding one by one makes.
- MatMulNBits with ``g_idx``, an order of its inputs: with zero points its results are wrong (onnxruntime 1.32). A
  Gather before it does the same.
- Operators that quantize activations by a scale over all rows (``quantize_dynamic``): a row's result would depend on
  the other rows of the run, so verifying several drafts at once would not equal decoding them one by one.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from shortstack.graphs.errors import ContractError
from shortstack.graphs.precision import ACCURACY_LEVEL

BANNED = frozenset(
    {
        "DynamicQuantizeLinear",
        "DynamicQuantizeMatMul",
        "DynamicQuantizeLSTM",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulInteger16",
        "QLinearMatMul",
        "ConvInteger",
    }
)
_GROUP_INDEX = 4  # the place of g_idx among the inputs


def lint_findings(model: ir.Model) -> list[str]:
    """Return one sentence per node that must not be there; subgraphs and functions included."""
    findings = []
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    for node in (node for graph in graphs for node in graph.all_nodes()):
        if node.op_type in BANNED:
            findings.append(f"{node.name or node.op_type} is a {node.op_type}, whose rows depend on each other")
        if node.op_type == "MatMulNBits":
            level = node.attributes.get_int("accuracy_level", 0)
            if level != ACCURACY_LEVEL:
                findings.append(f"{node.name} has accuracy_level {level} instead of {ACCURACY_LEVEL}")
            if len(node.inputs) > _GROUP_INDEX and node.inputs[_GROUP_INDEX] is not None:
                findings.append(f"{node.name} has g_idx, which gives wrong products with zero points")
    return findings


def lint(model: ir.Model, where: str | Path) -> None:
    """Refuse a graph with findings.

    Raises:
        ContractError: Listing all of them.
    """
    if findings := lint_findings(model):
        raise ContractError(
            f"{where} would not verify what it drafts: {'; '.join(findings)}",
            remedy="quantize with `shortstack quantize`, which keeps rows independent",
        )
