"""What is done to heads between projection and attention kernel: growth by position, and norms of several kinds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from helpers.exit_nodes import CachedGraphs
from helpers.families import MadeFamily
from helpers.family_rows import CONTEXT, ROWS, FamilyRow
from helpers.quantized import INT8, preset
from shortstack.export.assemble import export_bundle
from shortstack.export.spec import ExportSpec
from shortstack.export.twin.layer import query_factors
from shortstack.graphs import names
from shortstack.graphs.layer_spec import Attention, Norm, QueryScale
from shortstack.quant.assemble import quantize_bundle
from shortstack.quant.spec import QuantizeSpec

ROW_OF = {row.name: row for row in ROWS}


def node_names(bundle: Path) -> set[str]:
    return {
        node.name for file in bundle.glob("*.onnx") for node in onnx.load(file, load_external_data=False).graph.node
    }


def test_queries_grow_as_the_formula_says() -> None:
    found = query_factors(QueryScale(0.1, 16), torch.tensor([0, 15, 16, 47, 160]))[:, 0]
    expected = [1.0, 1.0, *(1 + 0.1 * np.log([2.0, 3.0, 11.0]))]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("original", [8, CONTEXT])
def test_graphs_scale_queries_only_where_some_position_makes_them_grow(tmp_path: Path, original: int) -> None:
    rope = {**ROW_OF["Ministral 3"].fields["rope_parameters"], "original_max_position_embeddings": original}
    made = MadeFamily(FamilyRow("ministral3", "x", {"head_dim": 16, "rope_parameters": rope}), tmp_path)
    assert any("/grown" in name for name in node_names(made.bundle)) == (original < CONTEXT)


def test_a_shorter_bundle_needs_no_growth(tmp_path: Path) -> None:
    made = MadeFamily(ROW_OF["Ministral 3"], tmp_path)
    export_bundle(ExportSpec(str(made.checkpoint), tmp_path / "short", (1,), max_length=8))
    assert not any("/grown" in name for name in node_names(tmp_path / "short"))


@pytest.mark.parametrize("cache", ["int8", "float"])
@pytest.mark.parametrize("family", ["Ministral 3", "HunYuan, dense", "StableLM, norms of heads"])
def test_rows_of_a_run_have_the_bits_of_rows_run_alone(tmp_path: Path, family: str, cache: str) -> None:
    """In blocks of 8 bits, whose kernel is exact on all processors; those of 4 bits are in tests/families."""
    made = MadeFamily(ROW_OF[family], tmp_path)
    mix = preset(INT8, "int8" if cache == "int8" else "float")
    quantize_bundle(QuantizeSpec(made.bundle, tmp_path / "int8", mix, calibration_tokens=256))
    text = made.text(13, seed=5)
    together, alone = (CachedGraphs(tmp_path / "int8", 1, CONTEXT + 1) for _ in range(2))

    def run(graphs: CachedGraphs, tokens: list[int], past: int) -> list[np.ndarray]:
        states = np.zeros((1, len(tokens), 64), np.float32)
        found = graphs.run(np.array([tokens], np.int64), past, len(tokens), states)
        return [outputs[names.LOGITS][0] for outputs in found]

    for graphs in (together, alone):
        run(graphs, text[:6], 0)
    at_once = run(together, text[6:], 6)
    for row, token in enumerate(text[6:]):
        for head, logits in enumerate(run(alone, [token], 6 + row)):
            np.testing.assert_array_equal(at_once[head][row], logits[0])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rope": None, "query_scale": QueryScale(0.1, 8)}, "need a rope, and it is null"),
        ({"qk_norm_after_rope": True}, "needs a qk_norm over each head"),
        ({"qk_norm_after_rope": True, "qk_norm": Norm(), "qk_norm_over": "width"}, "needs a qk_norm over each head"),
    ],
)
def test_attention_that_cannot_be_built_is_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(Attention(4, 2, 16), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("beta", "original"), [(-0.1, 8), (0.1, 0)])
def test_a_growth_that_means_nothing_is_refused(beta: float, original: int) -> None:
    with pytest.raises(ValueError, match="or more"):
        QueryScale(beta, original)
