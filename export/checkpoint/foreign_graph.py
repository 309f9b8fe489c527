"""Refuses folders that hold a model as an ONNX graph of a tool whose graphs are not read, such as optimum-onnx."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shortstack.export.checkpoint.onnx_graph import OnnxGraph
from shortstack.graphs.errors import CheckpointError, ShortstackError, UnsupportedError
from shortstack.graphs.names import GENAI_CONFIG_FILE

_ATTENTION = "GroupQueryAttention"


def graphs_in(folder: Path) -> Sequence[Path]:
    """Return the ONNX graphs of a folder, by name; hub repositories have them in ``onnx/``."""
    return sorted(folder.glob("*.onnx")) or sorted(folder.glob("onnx/*.onnx"))


def refusal(folder: Path, graph: Path, *, follow_links: bool = False) -> ShortstackError:
    """Return why a folder without weights cannot be exported from its graph.

    Args:
        folder: The folder.
        graph: One of its graphs.
        follow_links: Follow links that lead out of the folder.

    Raises:
        CheckpointError: The graph cannot be read.
        UnsupportedError: The graph has functions or tensors of an unknown kind.
    """
    operators = {node.op for node in OnnxGraph(graph, follow_links=follow_links).nodes}
    where = graph.relative_to(folder)
    if _ATTENTION in operators:
        return CheckpointError(
            f"{folder} has {where} and no {GENAI_CONFIG_FILE}",
            expected="both in one folder, as onnxruntime-genai's builder writes them",
            remedy="copy the folder again as a whole, or build it again",
        )
    return UnsupportedError(
        f"{folder} has its model as a graph of plain operators ({where}), as optimum-onnx exports it, and no weights "
        "beside it",
        found=f"attention without the node {_ATTENTION}",
        expected=f"safetensors, a GGUF file, or a graph of onnxruntime-genai's builder with {GENAI_CONFIG_FILE}",
        remedy="export the checkpoint that the graph was made from",
    )
