"""Matrices in blocks: what is refused, what the bytes are, and what onnxruntime's kernels make of them.

Rounding methods are compared with each other and with onnxruntime's in test_quant_methods.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from helpers.quantized import open_session, unpacked
from shortstack.graphs import names
from shortstack.graphs.contract import GraphContract, Port, PortType
from shortstack.graphs.errors import RequestError
from shortstack.graphs.ir.block_tensor import BlockTensor, encode, nearest, pack
from shortstack.graphs.ir.builder import GraphBuilder
from shortstack.graphs.ir.matrix import embed, head_product, project
from shortstack.graphs.ir.weights import WeightStore
from shortstack.graphs.precision import BLOCK_SIZES, CODE_TYPES, EXACT_BLOCK_SIZE, BlockFormat, CodeType, Precision
from shortstack.quant.methods.offsets import with_offsets
from shortstack.quant.methods.rtn import rtn

Floats = npt.NDArray[np.float32]
MOST_ROWS = 8
WEIGHT = "lm_head.weight"
FORMATS = [BlockFormat(*shape) for shape in product(CODE_TYPES, (16, 32, 128), (False, True))]
EXACT = [BlockFormat(bits, EXACT_BLOCK_SIZE, symmetric) for bits, symmetric in product(CODE_TYPES, (False, True))]
OFFSETS = [replace(block_format, has_offsets=True) for block_format in EXACT]
# Whole blocks, one weight more or less, a width that is not even.
WIDTHS = (64, 96, 33, 63, 100)
# Inputs are rounded to 8 bits, each block by its largest: half of 1 / 127 of that at most, on average much less.
INPUT_ROUNDING = 0.02
FLOAT32 = 1e-6


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def matrix(rng: np.random.Generator, rows: int, width: int, block_format: BlockFormat) -> BlockTensor:
    """A random matrix, its blocks far from zero where there are offsets."""
    weight = rng.standard_normal((rows, width)).astype(np.float32)
    if not block_format.has_offsets:
        return nearest(weight, block_format)
    weight += np.repeat(rng.uniform(3, 9, (rows, block_format.blocks(width))), block_format.block_size, axis=1)
    return with_offsets(rtn, weight.astype(np.float32), block_format, None)


# Formats


@pytest.mark.parametrize("bits", [0, 2, 3, 5, 16, -4])
def test_bits_that_the_kernels_do_not_have_are_refused(bits: int) -> None:
    with pytest.raises(RequestError, match=rf"bits: found {bits}, expected 4 or 8"):
        BlockFormat(bits)


@pytest.mark.parametrize("bits", [0, 3, 5, 6, 16])
def test_a_width_that_does_not_fill_bytes_cannot_be_added(bits: int) -> None:
    with pytest.raises(ValueError, match=f"codes of {bits} bits do not fill a byte"):
        CodeType(bits, tried_ranges=(0.9, 1.0, 2), gains_from_offsets=False)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_codes_of_every_width_are_packed_lowest_bits_first(bits: int, rng: np.random.Generator) -> None:
    for count in (1, 7, 16, 33):
        codes = rng.integers(0, 1 << bits, (3, count)).astype(np.uint8)
        packed = pack(codes, bits)
        assert packed.shape == (3, -(-count * bits // 8))
        np.testing.assert_array_equal(unpacked(packed, bits, count), codes)


@pytest.mark.parametrize("size", [0, 1, 8, 24, 31, 512, -32])
def test_block_sizes_that_the_kernels_do_not_have_are_refused(size: int) -> None:
    with pytest.raises(RequestError, match=rf"block size: found {size}, expected one of 16, 32, 64, 128, 256"):
        BlockFormat(4, size)


def test_formats_are_named_as_people_call_them() -> None:
    assert [str(BlockFormat(8)), str(BlockFormat(4, 128, True)), str(BlockFormat(4, has_offsets=True))] == [
        "int8, blocks of 32",
        "int4 symmetric, blocks of 128",
        "int4 with offsets, blocks of 32",
    ]


def test_offsets_are_given_up_where_the_last_block_is_shorter() -> None:
    block_format = BlockFormat(4, 32, has_offsets=True)
    assert block_format.fitted(96) == block_format
    assert block_format.fitted(97) == BlockFormat(4, 32)
    assert BlockFormat(4).fitted(97) == BlockFormat(4)
    assert (block_format.stored_width(96), BlockFormat(4).stored_width(96)) == (99, 96)


@pytest.mark.parametrize("scale_dtype", [np.float32, np.float16])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("width", [64, 96, 2048, 33])
def test_stored_bytes_are_those_of_the_packed_tensors(
    width: int, rows: int, scale_dtype: type[np.floating[Any]], rng: np.random.Generator
) -> None:
    for block_format in [*FORMATS, *OFFSETS]:
        fitted = block_format.fitted(width)
        tensor = matrix(rng, rows, width, fitted)
        zeros = tensor.packed_zero_points()
        packed = [tensor.packed_codes(), tensor.all_scales().astype(scale_dtype), *([] if zeros is None else [zeros])]
        expected = sum(array.nbytes for array in packed)
        assert fitted.stored_bytes(rows, width, np.dtype(scale_dtype).itemsize) == expected, fitted


def test_a_precision_survives_json_and_refuses_what_is_not_one() -> None:
    precision = Precision({"b": BlockFormat(4, 64, True), "a": BlockFormat(8, has_offsets=True)}, "int8")
    data = precision.to_json()
    assert list(data["weights"]) == ["a", "b"]
    assert Precision.from_json(data) == precision
    good = data["weights"]["b"]
    for changes in ({"bits": "4"}, {"bits": 4.0}, {"block_size": True}, {"is_symmetric": 1}, {"has_offsets": None}):
        with pytest.raises(ValueError, match=r"precision\.weights\.b"):
            Precision.from_json({"weights": {"b": good | changes}, "kv_cache": "float"})
    with pytest.raises(RequestError):
        Precision.from_json({"weights": {"b": good | {"bits": 5}}, "kv_cache": "float"})
    with pytest.raises(KeyError):
        Precision.from_json({"weights": {"b": {"bits": 4}}, "kv_cache": "float"})
    with pytest.raises(ValueError, match="int4"):
        Precision.from_json({"weights": {}, "kv_cache": "int4"})


def test_only_blocks_over_a_float32_cache_need_a_spare_row() -> None:
    weights = {"a": BlockFormat(4)}
    assert Precision(weights).has_spare_row("float32")
    assert not Precision(weights).has_spare_row("float16")
    assert not Precision(weights, "int8").has_spare_row("float32")
    assert not Precision().has_spare_row("float32")
    assert Precision().is_float
    assert not Precision({}, "int8").is_float


# Bytes


@pytest.mark.parametrize("block_format", OFFSETS, ids=str)
def test_offsets_stand_behind_the_blocks_of_the_weights(block_format: BlockFormat, rng: np.random.Generator) -> None:
    rows, width, size = 5, 5 * EXACT_BLOCK_SIZE, block_format.block_size  # an odd number of blocks
    tensor = matrix(rng, rows, width, block_format)
    blocks, total = 5, 6  # five offsets fill one block more
    scales = tensor.all_scales().astype(np.float64)
    assert scales.shape == (rows, total)
    codes = unpacked(tensor.packed_codes(), block_format.bits, total * size)
    packed_zeros = tensor.packed_zero_points()
    zeros = np.full((rows, total), 1 << (block_format.bits - 1), np.float64)
    if packed_zeros is not None:
        zeros = unpacked(packed_zeros, block_format.bits, total)
    whole = np.repeat(scales, size, axis=1) * (codes - np.repeat(zeros, size, axis=1))
    assert not whole[:, width + blocks :].any(), "what pads the offsets is zero"
    expected = whole[:, :width] + np.repeat(whole[:, width : width + blocks], size, axis=1)
    np.testing.assert_allclose(tensor.dequantize(), expected, rtol=FLOAT32, atol=FLOAT32 * 9)
    assert np.abs(whole[:, width : width + blocks]).max() > 0, "no offset to speak of"


@pytest.mark.parametrize("block_format", FORMATS, ids=str)
def test_what_pads_the_last_block_is_zero(block_format: BlockFormat, rng: np.random.Generator) -> None:
    tensor = matrix(rng, 4, 37, block_format)
    blocks, size = block_format.blocks(37), block_format.block_size
    codes = unpacked(tensor.packed_codes(), block_format.bits, blocks * size)
    zeros = np.full((4, 1), 1 << (block_format.bits - 1)) if tensor.zero_points is None else tensor.zero_points[:, -1:]
    assert (codes[:, 37:] == zeros).all()


@pytest.mark.parametrize("block_format", FORMATS, ids=str)
def test_blocks_of_one_value_or_one_sign_are_kept(block_format: BlockFormat) -> None:
    size = block_format.block_size
    weight = np.zeros((5, 2 * size), np.float32)
    weight[1] = 0.75  # one value
    weight[2] = -0.75
    weight[3] = np.linspace(1, 2, 2 * size)  # one sign, far from zero
    weight[4, 3] = 1e-30  # next to nothing
    tensor = nearest(weight, block_format)
    found = tensor.dequantize()
    assert np.isfinite(found).all()
    assert not found[0].any()
    # Half a step of a grid that reaches from zero to the largest; symmetric ones have half as many.
    step = np.abs(weight).max() / ((1 << (block_format.bits - block_format.is_symmetric)) - 1)
    assert np.abs(found - weight).max() <= step


@pytest.mark.parametrize("block_format", FORMATS, ids=str)
def test_blocks_of_one_value_or_one_sign_are_rounded_as_onnxruntime_does(block_format: BlockFormat) -> None:
    quantizer = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    size = block_format.block_size
    weight = np.zeros((4, 2 * size), np.float32)
    weight[1] = 0.75
    weight[2] = -0.75
    weight[3] = np.linspace(1, 2, 2 * size)
    config = quantizer.DefaultWeightOnlyQuantConfig(
        block_size=size, is_symmetric=block_format.is_symmetric, bits=block_format.bits
    )
    codes, scales, zeros = quantizer.DefaultWeightOnlyQuantizer(config).qbits_block_quant(
        np.ascontiguousarray(weight.T)
    )
    ours = nearest(weight, block_format)
    np.testing.assert_array_equal(ours.scales, scales.reshape(ours.scales.shape))
    whole = unpacked(codes, block_format.bits, 2 * size)
    np.testing.assert_array_equal(ours.codes, whole)
    if ours.zero_points is not None:
        np.testing.assert_array_equal(ours.zero_points, unpacked(zeros.reshape(4, -1), block_format.bits, 2))


def test_a_choice_of_rows_is_that_of_the_whole_matrix(rng: np.random.Generator) -> None:
    index = np.array([4, 0, 0, 2])
    for block_format in (BlockFormat(4), BlockFormat(8, is_symmetric=True), OFFSETS[0]):
        tensor = matrix(rng, 5, 64, block_format)
        np.testing.assert_array_equal(tensor.rows(index).dequantize(), tensor.dequantize()[index])


def test_given_grids_round_to_their_nearest_code(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((3, 64)).astype(np.float32)
    scales = np.array([[0.1, -0.2], [0.0, 0.3], [0.05, 1.0]], np.float32)
    zeros = np.array([[0, 15], [7, 8], [3, 4]], np.uint8)
    found = encode(weight, scales, zeros, BlockFormat(4))
    for row, block in product(range(3), range(2)):
        scale, zero, part = scales[row, block], int(zeros[row, block]), slice(32 * block, 32 * block + 32)
        grid = scale * (np.arange(16) - zero)
        best = np.abs(weight[row, part, None] - grid).min(axis=1)
        np.testing.assert_allclose(np.abs(weight[row, part] - found.dequantize()[row, part]), best, atol=FLOAT32)


# Kernels


Use = Callable[[GraphBuilder, ir.Value, str, str], ir.Value]


def run(
    folder: Path, use: Use, tensors: dict[str, BlockTensor], feeds: list[npt.NDArray[Any]], level: int | None = None
) -> list[Floats]:
    """What one use of a matrix makes of each input, in one session; at another accuracy level if that is asked for."""
    with WeightStore(folder) as store:
        for name, tensor in tensors.items():
            store.add_blocks(name, tensor, "float32")
    dtype: PortType = "int64" if use is embed else "float32"
    shape = tuple(f"d{axis}" for axis in range(feeds[0].ndim))
    source, result = Port("x", dtype, shape), Port("y", "float32", tuple("abc"[: 2 if use is head_product else 3]))
    g = GraphBuilder("test", store)
    y = use(g, g.input(source), WEIGHT, "/test")
    model = g.finish(GraphContract((source,), (result,)), {"y": y}, "test 0")
    ir.external_data.load_to_model(model)
    for node in model.graph:
        if node.op_type == "MatMulNBits" and level is not None:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
    session = open_session(ir.to_proto(model))
    return [session.run(["y"], {"x": x})[0] for x in feeds]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("block_format", [*FORMATS, *OFFSETS], ids=str)
def test_products_are_those_of_the_dequantized_matrix(
    tmp_path: Path, block_format: BlockFormat, width: int, rng: np.random.Generator
) -> None:
    tensor = matrix(rng, 19, width, block_format.fitted(width))
    x = rng.standard_normal((1, 6, width)).astype(np.float32)
    expected = x.astype(np.float64) @ tensor.dequantize().astype(np.float64).T
    (as_floats,) = run(tmp_path, project, {WEIGHT: tensor}, [x], level=0)
    largest = np.abs(x).sum(axis=2).max() * np.abs(tensor.dequantize()).max()
    np.testing.assert_allclose(as_floats, expected, atol=FLOAT32 * largest)
    (as_shipped,) = run(tmp_path, project, {WEIGHT: tensor}, [x])
    assert np.sqrt(np.square(as_shipped - expected).mean()) < INPUT_ROUNDING * expected.std()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("block_format", FORMATS, ids=str)
def test_rows_that_are_looked_up_are_those_of_the_dequantized_matrix(
    tmp_path: Path, block_format: BlockFormat, width: int, rng: np.random.Generator
) -> None:
    tensor = matrix(rng, 23, width, block_format)
    ids = np.array([[0, 22, 7, 7, 1]])
    (found,) = run(tmp_path, embed, {WEIGHT: tensor}, [ids])
    np.testing.assert_allclose(found, tensor.dequantize()[ids], rtol=FLOAT32)


@pytest.mark.parametrize("first", [1, 8, 22])
@pytest.mark.parametrize("width", [64, 33])
def test_first_rows_of_a_format_of_their_own_stand_before_the_others(
    tmp_path: Path, width: int, first: int, rng: np.random.Generator
) -> None:
    tensors = {
        names.first_rows(WEIGHT): matrix(rng, first, width, BlockFormat(8)),
        WEIGHT: matrix(rng, 23 - first, width, BlockFormat(4)),
    }
    whole = np.concatenate([tensor.dequantize() for tensor in tensors.values()])
    ids = np.arange(23)[None]
    (found,) = run(tmp_path, embed, tensors, [ids])
    np.testing.assert_allclose(found, whole[ids], rtol=FLOAT32)
    x = rng.standard_normal((4, width)).astype(np.float32)
    (logits,) = run(tmp_path, head_product, tensors, [x], level=0)
    np.testing.assert_allclose(logits, x @ whole.T, atol=1e-4)


@pytest.mark.parametrize("width", [*WIDTHS, 576])
@pytest.mark.parametrize("block_format", [*EXACT, *OFFSETS], ids=str)
def test_rows_of_a_product_do_not_depend_on_how_many_there_are(
    tmp_path: Path, block_format: BlockFormat, width: int, rng: np.random.Generator
) -> None:
    """Bit for bit, on this machine: what verifying several drafts in one run rests on.

    A run of one row may differ from all longer ones, in 4-bit products alone and in every value or none: stacks measure
    that and append a spare row (runtime/engine/row_classes.py).
    """
    size = rng.uniform(0.1, 10, (1, 2 * MOST_ROWS, 1))
    x = (size * rng.standard_normal((1, 2 * MOST_ROWS, width))).astype(np.float32)
    counts = [*range(1, MOST_ROWS + 1), 2 * MOST_ROWS]
    for outputs in (1, 7, 48, 131):
        tensor = matrix(rng, outputs, width, block_format.fitted(width))
        rows = 2 * MOST_ROWS
        singles = [x[:, row : row + 1] for row in range(rows)]
        pairs = [np.concatenate([single, singles[0]], axis=1) for single in singles]
        found = run(tmp_path, project, {WEIGHT: tensor}, singles + pairs + [x[:, :count] for count in counts])
        alone = np.concatenate(found[:rows], axis=1)
        paired = np.concatenate([pair[:, :1] for pair in found[rows : 2 * rows]], axis=1)
        for count, together in zip(counts, found[2 * rows :], strict=True):
            expected = alone if count == 1 else paired
            np.testing.assert_array_equal(together, expected[:, :count], err_msg=f"{outputs} outputs, {count} rows")
        if block_format.bits == 8:
            np.testing.assert_array_equal(alone, paired, err_msg="8-bit products have one class of runs")


def test_every_block_size_of_the_kernels_is_known() -> None:
    assert EXACT_BLOCK_SIZE in BLOCK_SIZES
    assert all(size & (size - 1) == 0 for size in BLOCK_SIZES)


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_a_block_of_the_smallest_numbers_becomes_zeros(is_symmetric: bool) -> None:
    """One over their scale is infinite, and infinity times zero is no code."""
    weight = np.zeros((2, 64), np.float32)
    weight[0, :3] = 1e-40, -2e-40, 0.0
    weight[1] = np.linspace(-1, 1, 64)
    stored = nearest(weight, BlockFormat(4, 32, is_symmetric=is_symmetric))
    found = stored.dequantize()
    assert np.abs(found[0]).max() <= 2e-40
    np.testing.assert_allclose(found[1], weight[1], atol=0.08)
