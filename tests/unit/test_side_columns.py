"""Side products as they are stored and as onnxruntime's kernels compute them."""

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
from shortstack.graphs.errors import RequestError
from shortstack.graphs.ir.block_tensor import BlockTensor, Side, nearest
from shortstack.graphs.ir.weights import WeightStore
from shortstack.graphs.precision import CODE_TYPES, EXACT_BLOCK_SIZE, BlockFormat, Precision
from shortstack.quant.methods.offsets import with_offsets
from shortstack.quant.methods.rtn import rtn
from shortstack.quant.side_product import beside

Floats = npt.NDArray[np.float32]
GATE, UP = (names.layer_weight(0, part) for part in ("mlp.gate_proj.weight", "mlp.up_proj.weight"))
FORMATS = [
    BlockFormat(bits, EXACT_BLOCK_SIZE, symmetric, offsets)
    for bits, symmetric, offsets in product(CODE_TYPES, (False, True), (False, True))
]
INPUT_ROUNDING = 0.02  # inputs are rounded to 8 bits
ROWS, WIDTH = 48, 96


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def factor(rng: np.random.Generator, columns: int = 32, width: int = WIDTH) -> BlockTensor:
    return nearest(rng.standard_normal((columns, width)).astype(np.float32), BlockFormat(8, is_symmetric=True))


def with_side(
    rng: np.random.Generator, block_format: BlockFormat, right: BlockTensor | None = None, rows: int = ROWS
) -> BlockTensor:
    """A random matrix with a side product that is as large as the matrix itself."""
    weight = rng.standard_normal((rows, WIDTH)).astype(np.float32)
    blocks = (
        with_offsets(rtn, weight + 3, block_format, None)
        if block_format.has_offsets
        else rtn(weight, block_format, None)
    )
    right = factor(rng) if right is None else right
    left = rng.standard_normal((rows, right.shape[0])).astype(np.float32) / 6
    return beside(blocks, Side(nearest(left, replace(block_format, has_offsets=False)), right))


def run(
    folder: Path, tensors: dict[str, BlockTensor], feeds: list[Floats], level: int | None = None
) -> list[list[Any]]:
    """The products of each input with all matrices; at another accuracy level if that is asked for."""
    model, _ = product_graph(folder, tensors)
    for node in model.graph:
        if node.op_type == "MatMulNBits" and level is not None:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
    session = open_session(ir.to_proto(model))
    return [session.run(list(tensors), {"x": feed}) for feed in feeds]


@pytest.mark.parametrize("block_format", FORMATS, ids=str)
def test_a_product_is_that_of_the_matrix_and_the_side_product(
    tmp_path: Path, block_format: BlockFormat, rng: np.random.Generator
) -> None:
    tensor = with_side(rng, block_format)
    x = rng.standard_normal((1, 6, WIDTH)).astype(np.float32)
    assert tensor.side is not None
    whole = replace(tensor, format=block_format, side=None).dequantize() + tensor.side.dequantize()
    np.testing.assert_allclose(tensor.dequantize(), whole, atol=1e-6)
    expected = x @ whole.T
    ((as_floats,),) = run(tmp_path, {GATE: tensor}, [x], level=0)
    np.testing.assert_allclose(as_floats, expected, atol=1e-4 * np.abs(expected).max())
    ((as_shipped,),) = run(tmp_path, {GATE: tensor}, [x])
    assert np.sqrt(np.square(as_shipped - expected).mean()) < INPUT_ROUNDING * expected.std()


@pytest.mark.parametrize("block_format", FORMATS, ids=str)
def test_rows_of_a_side_product_do_not_depend_on_how_many_there_are(
    tmp_path: Path, block_format: BlockFormat, rng: np.random.Generator
) -> None:
    """Bit for bit: a run of one row may be of a class of its own, in 4-bit products alone, as without side products."""
    most = 64
    x = (rng.uniform(0.1, 10, (1, most, 1)) * rng.standard_normal((1, most, WIDTH))).astype(np.float32)
    counts = [*range(1, 10), most]
    for rows in (7, 48, 131):
        tensor = with_side(rng, block_format, rows=rows)
        pairs = [x[:, [row, 0]] for row in range(most)]
        found = [outputs[0] for outputs in run(tmp_path, {GATE: tensor}, pairs + [x[:, :count] for count in counts])]
        paired = np.concatenate([pair[:, :1] for pair in found[:most]], axis=1)
        for count, together in zip(counts, found[most:], strict=True):
            if count > 1 or block_format.bits == 8:
                np.testing.assert_array_equal(together, paired[:, :count], f"{count} rows of {rows} outputs")


def test_matrices_of_one_input_store_and_multiply_their_factor_once(tmp_path: Path, rng: np.random.Generator) -> None:
    right = factor(rng)
    tensors = {name: with_side(rng, BlockFormat(4, has_offsets=True), right) for name in (GATE, UP)}
    x = rng.standard_normal((1, 3, WIDTH)).astype(np.float32)
    for tensor, found in zip(tensors.values(), run(tmp_path, tensors, [x])[0], strict=True):
        expected = x @ tensor.dequantize().T
        assert np.sqrt(np.square(found - expected).mean()) < INPUT_ROUNDING * expected.std()
    with WeightStore(tmp_path) as store:
        for name, tensor in tensors.items():
            store.add_blocks(name, tensor, "float32")
    assert sum(name.endswith("side.weight.codes") for name in store) == 1
    assert set(store.formats) == {GATE, UP, names.side_factor(GATE)}


def test_a_second_factor_of_one_input_is_not_stored_over_the_first(tmp_path: Path, rng: np.random.Generator) -> None:
    with WeightStore(tmp_path) as store:
        store.add_blocks(GATE, with_side(rng, BlockFormat(4)), "float32")
        with pytest.raises(ValueError, match=r"gate_up_proj\.side\.weight is stored already, and another one"):
            store.add_blocks(UP, with_side(rng, BlockFormat(4)), "float32")


@pytest.mark.parametrize("block_format", FORMATS, ids=str)
def test_stored_bytes_and_rows_are_those_of_the_packed_tensors(
    block_format: BlockFormat, rng: np.random.Generator
) -> None:
    tensor = with_side(rng, block_format)
    assert tensor.format.stored_bytes(*tensor.shape) == sum(part.nbytes for part in tensor.packed_parts().values())
    index = np.array([4, 0, 0, 2])
    np.testing.assert_allclose(tensor.rows(index).dequantize(), tensor.dequantize()[index], atol=1e-6)


def test_side_columns_survive_json_and_are_left_out_where_there_are_none() -> None:
    precision = Precision({GATE: BlockFormat(4, has_offsets=True, side_columns=64), UP: BlockFormat(4)})
    data = precision.to_json()
    assert Precision.from_json(data) == precision
    assert data["weights"][GATE]["side_columns"] == 64
    assert set(data["weights"][UP]) == {"bits", "block_size", "is_symmetric", "has_offsets"}  # as older versions wrote
    for columns in ("32", 32.0, None, True):
        data["weights"][GATE]["side_columns"] = columns
        with pytest.raises(ValueError, match=r"precision\.weights\.model\.layers"):
            Precision.from_json(data)
    for columns in (16, -32, 1 << 20):
        data["weights"][GATE]["side_columns"] = columns
        with pytest.raises(RequestError, match="side columns"):
            Precision.from_json(data)
    assert str(BlockFormat(4, has_offsets=True, side_columns=32)) == (
        "int4 with offsets and a side product of rank 32, blocks of 32"
    )
