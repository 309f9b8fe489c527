"""Every block type of GGUF: the bundle's blocks hold the same weights, or are as near as the table says."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest

from helpers.block_kinds import PACKERS, Kind, dequantized, quantize
from shortstack.export.checkpoint.gguf_blocks import BLOCK_TYPES, unpack_blocks
from shortstack.export.stacked_blocks import joint_format, relative_error, widened
from shortstack.graphs.ir.block_tensor import BlockTensor, nearest
from shortstack.graphs.precision import BlockFormat

EXACT = sorted(kind for kind, block_type in BLOCK_TYPES.items() if block_type.is_exact)
NEAR = sorted(BLOCK_TYPES.keys() - set(EXACT))
WRITTEN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "TQ1_0", "TQ2_0", *PACKERS)

NEAREST = {"Q4_1": 0.008, "Q4_K": 0.008, "Q2_K": 0.008, "Q5_1": 0.004, "Q5_K": 0.004}
"""Largest relative error of normal weights. Measured: Q4_1 0.0058, Q4_K 0.0061, Q2_K 0.0054, Q5_1 0.0021, Q5_K 0.0021.
An integer zero point of 4 bits alone leaves 0.08."""


def block_bytes(kind: str) -> int:
    return int(gguf.GGML_QUANT_SIZES[Kind[kind]][1])


def read(raw: np.ndarray, kind: str, block_format: BlockFormat | None = None) -> BlockTensor:
    return unpack_blocks(raw, kind, block_bytes(kind), block_format)


def random_bytes(kind: str, rows: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Rows of random bytes whose weights are finite, and these weights as gguf reads them."""
    raw = np.random.randint(0, 256, (rows, 4 * block_bytes(kind)), np.uint8)
    with np.errstate(all="ignore"):
        weights = np.asarray(gguf.dequantize(raw, Kind[kind]), np.float32)
    is_finite = np.isfinite(weights).all(axis=1)
    assert is_finite.sum() > rows // 4
    return raw[is_finite], weights[is_finite]


def normal_weights(rows: int = 24, width: int = 1024) -> np.ndarray:
    return np.random.standard_normal((rows, width)).astype(np.float32)


def test_every_type_that_gguf_dequantizes_can_be_kept() -> None:
    blocks = {kind.name for kind in gguf.quants._type_traits if gguf.GGML_QUANT_SIZES[kind][0] > 1}
    assert BLOCK_TYPES.keys() == blocks


@pytest.mark.parametrize("kind", EXACT)
def test_random_bytes_of_an_exact_type_are_the_weights_of_gguf_bit_for_bit(kind: str) -> None:
    raw, weights = random_bytes(kind)
    matrix = read(raw, kind)
    assert matrix.format == BLOCK_TYPES[kind].format
    assert relative_error(matrix, weights) == 0.0
    # A zero may have another sign, where a scale is 0 and the code comes from a grid.
    found, zero = matrix.dequantize(), np.float32(0)
    np.testing.assert_array_equal((found + zero).view(np.uint32), (weights + zero).view(np.uint32))


@pytest.mark.parametrize("kind", EXACT)
def test_an_exact_type_is_exact_in_every_wider_format_too(kind: str) -> None:
    raw, weights = random_bytes(kind)
    own = BLOCK_TYPES[kind].format
    wider = [
        BlockFormat(bits, size, is_symmetric=is_symmetric)
        for bits in (4, 8)
        for size in (16, 32)
        for is_symmetric in (True, False)
        if bits >= own.bits and size <= own.block_size
    ]
    for block_format in wider:
        for matrix in (read(raw, kind, block_format), widened(read(raw, kind), block_format)):
            assert matrix.format == block_format
            np.testing.assert_array_equal(matrix.dequantize(), weights)


@pytest.mark.parametrize("kind", sorted(PACKERS))
def test_the_packers_of_the_tests_write_what_gguf_reads(kind: str) -> None:
    weights = normal_weights()
    steps = {"Q2_K": 0.4, "Q3_K": 0.25, "Q4_K": 0.1, "Q5_K": 0.05, "Q6_K": 0.025, "IQ4_NL": 0.11, "IQ4_XS": 0.11}
    assert np.square(dequantized(weights, Kind[kind]) - weights).mean() ** 0.5 < steps[kind]


@pytest.mark.parametrize("kind", WRITTEN)
def test_weights_of_a_file_are_kept_as_near_as_the_table_says(kind: str) -> None:
    weights = normal_weights()
    raw, file = quantize(weights, Kind[kind]), dequantized(weights, Kind[kind])
    error = relative_error(read(raw, kind), file)
    print(f"{kind}: {error:.2e}")
    if BLOCK_TYPES[kind].is_exact:
        assert error == 0.0
    else:
        assert 0 < error < NEAREST[kind]


@pytest.mark.parametrize("kind", NEAR)
def test_types_with_minima_are_nearer_in_8_bits_without_offsets_than_rounded(kind: str) -> None:
    weights = normal_weights()
    raw, file = quantize(weights, Kind[kind]), dequantized(weights, Kind[kind])
    plain = BLOCK_TYPES[kind].plain_format
    assert (plain.bits, plain.has_offsets) == (8, False)
    error = relative_error(read(raw, kind, plain), file)
    assert error < NEAREST[kind]
    print(f"{kind}: {error:.2e}")
    assert error < relative_error(nearest(file, BlockFormat(8)), file) * 0.8


@pytest.mark.parametrize("kind", NEAR)
def test_random_bytes_of_a_type_with_minima_stay_near(kind: str) -> None:
    raw, weights = random_bytes(kind)
    block_type = BLOCK_TYPES[kind]
    inner = replace(block_type.format, has_offsets=False)
    blocks = weights.reshape(len(weights), -1, inner.block_size)
    # Many such blocks do not contain zero and are rounded to nearest: within half a step of the range with zero in it.
    reach = np.maximum(blocks.max(axis=2), 0) - np.minimum(blocks.min(axis=2), 0)
    rounded = reach / inner.largest_code
    # The others are off by half a step of their own scale over the factor, which is at least half of the largest one.
    scales = block_type.unpack(raw.reshape(len(raw), -1, block_bytes(kind))).scales
    shifted = np.abs(scales) / max(1, inner.largest_code // block_type.largest_code // 2) / 2
    codes_alone = replace(read(raw, kind), format=inner, offsets=None)
    off = np.abs(codes_alone.dequantize().reshape(blocks.shape) - blocks).max(axis=2)
    assert (off <= np.maximum(rounded, shifted) * 1.01).all()


def test_minima_that_are_whole_steps_are_kept_exactly() -> None:
    weights = np.random.randint(-7, 9, (6, 256)).astype(np.float32)
    weights[:, ::32] = -7
    weights[:, 1::32] = 8
    for kind in ("Q4_1", "Q4_K"):
        raw, file = quantize(weights, Kind[kind]), dequantized(weights, Kind[kind])
        assert relative_error(read(raw, kind), file) < 1e-3
    assert relative_error(read(quantize(weights, Kind.Q4_1), "Q4_1"), weights) == 0.0


@pytest.mark.parametrize("value", [0.0, 1.5, -2.0])
def test_blocks_of_one_value_keep_it(value: float) -> None:
    weights = np.full((2, 256), value, np.float32)
    weights[1, 32:] = 0
    for kind in NEAR:
        raw, file = quantize(weights, Kind[kind]), dequantized(weights, Kind[kind])
        np.testing.assert_allclose(read(raw, kind).dequantize(), file, atol=0.01 * abs(value))


@pytest.mark.parametrize("kind", NEAR)
@pytest.mark.parametrize("half", [0x7C00, 0xFC00, 0x7E00], ids=["inf", "-inf", "nan"])
def test_scales_or_minima_that_are_not_finite_never_become_finite_numbers(kind: str, half: int) -> None:
    raw = quantize(normal_weights(2, 512), Kind[kind])
    places = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 82)}[kind]
    for place in places:
        damaged = raw.copy()
        damaged[1, place : place + 2] = [half & 0xFF, half >> 8]
        assert not np.isfinite(read(damaged, kind).all_scales()).all()


def test_joint_formats_are_the_narrowest_that_hold_all() -> None:
    int4, int8 = BlockFormat(4, 32, is_symmetric=True), BlockFormat(8, 32, is_symmetric=True)
    assert joint_format([int4, int4]) == int4
    assert joint_format([int4, int8]) == int8
    assert joint_format([BlockFormat(4, 16, is_symmetric=True), int8]) == BlockFormat(8, 16, is_symmetric=True)
    assert joint_format([int4, BlockFormat(4, 32)]) == BlockFormat(4, 32)
    assert joint_format([BlockFormat(8, 32), BlockFormat(8, 16, is_symmetric=True)]) == BlockFormat(8, 16)
    offsets = BlockFormat(4, 32, has_offsets=True)
    assert joint_format([offsets, offsets]) == offsets


@pytest.mark.parametrize("width", [64, 80, 96])
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_a_wider_format_holds_the_same_weights_in_incomplete_blocks_too(width: int, is_symmetric: bool) -> None:
    narrow = nearest(normal_weights(5, width), BlockFormat(4, 64, is_symmetric=is_symmetric))
    for size in (16, 32, 64):
        wide = widened(narrow, BlockFormat(8, size))
        np.testing.assert_array_equal(wide.dequantize(), narrow.dequantize())


def test_the_error_is_that_of_the_scales_as_the_bundle_stores_them() -> None:
    raw = quantize(normal_weights(), Kind.Q6_K)
    matrix, file = read(raw, "Q6_K"), np.asarray(gguf.dequantize(raw, Kind.Q6_K), np.float32)
    assert relative_error(matrix, file) == 0.0
    assert 1e-5 < relative_error(matrix, file, "float16") < 5e-4
    assert relative_error(matrix, file * 2) == pytest.approx(0.5)
    assert relative_error(matrix, np.zeros_like(file)) == 1.0
