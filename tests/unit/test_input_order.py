"""Matrices that read their input in another order: as they are stored, and as onnxruntime's kernels compute them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from helpers.quantized import open_session, product_graph
from shortstack.graphs import names
from shortstack.graphs.ir.block_tensor import BlockTensor, nearest
from shortstack.graphs.ir.weights import WeightStore
from shortstack.graphs.precision import CODE_TYPES, EXACT_BLOCK_SIZE, BlockFormat, Precision

Floats = npt.NDArray[np.float32]
GATE, UP, DOWN = (names.layer_weight(0, f"mlp.{name}_proj.weight") for name in ("gate", "up", "down"))
FORMATS = [BlockFormat(bits, EXACT_BLOCK_SIZE, symmetric) for bits, symmetric in product(CODE_TYPES, (False, True))]
INPUT_ROUNDING = 0.02  # inputs are rounded to 8 bits
ROWS, WIDTH = 48, 96


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def reordered(weight: Floats, order: npt.NDArray[np.int64], block_format: BlockFormat) -> BlockTensor:
    """Round a matrix in blocks of columns that are neighbours in some order."""
    blocks = nearest(np.ascontiguousarray(weight[:, order]), block_format)
    return replace(blocks, format=replace(block_format, is_reordered=True), order=order)


def run(model: ir.Model, outputs: list[str], feeds: list[Floats]) -> list[list[Any]]:
    session = open_session(ir.to_proto(model))
    return [session.run(outputs, {"x": feed}) for feed in feeds]


@pytest.mark.parametrize("block_format", FORMATS, ids=str)
def test_the_floats_of_a_reordered_matrix_stand_as_its_inputs_do(
    block_format: BlockFormat, rng: np.random.Generator
) -> None:
    weight, order = rng.standard_normal((ROWS, WIDTH)).astype(np.float32), rng.permutation(WIDTH)
    sorted_first = nearest(np.ascontiguousarray(weight[:, order]), block_format).dequantize()
    found = reordered(weight, order, block_format).dequantize()
    assert (found[:, order] == sorted_first).all()
    assert (found != sorted_first).any()


@pytest.mark.parametrize("block_format", FORMATS, ids=str)
def test_a_reordered_product_is_the_product_with_its_floats_and_its_rows_do_not_depend_on_each_other(
    block_format: BlockFormat, tmp_path: Path, rng: np.random.Generator
) -> None:
    order = rng.permutation(WIDTH)
    weight = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
    tensor = reordered(weight, order, block_format)
    x = rng.standard_normal((1, 8, WIDTH)).astype(np.float32)
    x[0, 3] *= 40  # a row with large values must not touch the others
    model, _ = product_graph(tmp_path, {DOWN: tensor})
    pairs = [x[:, [i, 3]] for i in range(8)]  # one row alone may be of a class of its own, see docs/exactness.md
    whole, *paired = (found[0] for found in run(model, [DOWN], [x, *pairs]))
    expected = x @ tensor.dequantize().T
    assert np.abs(whole - expected).max() < INPUT_ROUNDING * np.abs(expected).max()
    for i, pair in enumerate(paired):
        np.testing.assert_array_equal(whole[:, i], pair[:, 0])


def test_one_order_is_stored_and_applied_once_for_all_products_of_an_input(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    order = rng.permutation(WIDTH)
    weights = [rng.standard_normal((ROWS, WIDTH)).astype(np.float32) for _ in range(3)]
    tensors = {name: reordered(w, order, FORMATS[0]) for name, w in zip((GATE, UP, DOWN), weights, strict=True)}
    model, file = product_graph(tmp_path, tensors)
    gathers = [node for node in model.graph if node.op_type == "Gather"]
    assert len(gathers) == 2  # gate and up read one input; down has another name for its own
    assert file.read_bytes().count(order.astype(np.int64).tobytes()) == 1


def test_another_order_for_the_same_input_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    weight = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
    first, second = (reordered(weight, rng.permutation(WIDTH), FORMATS[0]) for _ in range(2))
    with WeightStore(tmp_path) as store:
        store.add_blocks(GATE, first, "float32")
        with pytest.raises(ValueError, match="another one"):
            store.add_blocks(UP, second, "float32")


def test_the_manifest_says_which_matrices_are_reordered_and_nothing_new_of_the_others() -> None:
    plain, other = BlockFormat(4), BlockFormat(4, is_reordered=True)
    written = Precision({GATE: plain, UP: other}).to_json()
    assert "is_reordered" not in written["weights"][GATE]
    assert written["weights"][UP]["is_reordered"] is True
    assert Precision.from_json(written) == Precision({GATE: plain, UP: other})
    written["weights"][UP]["is_reordered"] = 1
    with pytest.raises(ValueError, match=r"precision\.weights"):
        Precision.from_json(written)
    assert str(other) == "int4, blocks of 32, inputs in another order"


def test_rows_of_a_reordered_matrix_keep_its_order(rng: np.random.Generator) -> None:
    tensor = reordered(rng.standard_normal((ROWS, WIDTH)).astype(np.float32), rng.permutation(WIDTH), FORMATS[0])
    index = np.array([5, 1, 30])
    assert (tensor.rows(index).dequantize() == tensor.dequantize()[index]).all()
