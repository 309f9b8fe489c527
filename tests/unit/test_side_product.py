"""A fine-tuning that rounding would erase is found by what rounding leaves, and kept where it has a low rank."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from helpers.tiny_models import LAYER_MATRICES
from shortstack.graphs import names
from shortstack.graphs.ir.block_tensor import BlockTensor, nearest
from shortstack.graphs.precision import BlockFormat
from shortstack.quant.methods.offsets import with_offsets
from shortstack.quant.methods.rtn import rtn
from shortstack.quant.side_product import beside, find_sides

Floats = npt.NDArray[np.float32]
ROWS, WIDTH, RANK = 192, 256, 8
SYMMETRIC, INT4, INT8 = BlockFormat(4, is_symmetric=True), BlockFormat(4), BlockFormat(8)
OFFSETS = BlockFormat(4, has_offsets=True)


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def gaussian(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.standard_normal(shape).astype(np.float32)


def rounded(weight: Floats, block_format: BlockFormat) -> BlockTensor:
    return with_offsets(rtn, weight, block_format, None) if block_format.has_offsets else nearest(weight, block_format)


@dataclass(frozen=True)
class FromFile:
    """Weights as a quantized file gives them, and half of their step."""

    weights: Floats
    half_step: float


def on_a_grid(rng: np.random.Generator, block_format: BlockFormat = OFFSETS) -> FromFile:
    """Weights that lie on a grid: of Q4_1 where blocks are shifted by any number, else of the format itself."""
    blocks = gaussian(rng, ROWS, WIDTH // 32, 32)
    if block_format.has_offsets:
        low, high = blocks.min(axis=2, keepdims=True), blocks.max(axis=2, keepdims=True)
        step = (high - low) / 15
        weights = (np.rint((blocks - low) / step) * step + low).reshape(ROWS, WIDTH)
        return FromFile(weights, float(step.mean()) / 2)
    found = nearest(blocks.reshape(ROWS, WIDTH), block_format)
    return FromFile(found.dequantize(), float(np.abs(found.scales).mean()) / 2)


def adapter(rng: np.random.Generator, size: float, rows: int = ROWS) -> Floats:
    """A product of low rank whose values have this root mean square."""
    product = gaussian(rng, rows, RANK) @ gaussian(rng, RANK, WIDTH)
    return np.asarray(product * (size / np.sqrt(np.square(product).mean())), np.float32)


def within_blocks(errors: Floats) -> Floats:
    """Errors without the mean of each block, which is how closely offsets are stored."""
    blocks = errors.reshape(len(errors), -1, 32)
    return blocks - blocks.mean(axis=2, keepdims=True)


@pytest.mark.parametrize("size", [0.05, 0.15, 0.25])
@pytest.mark.parametrize("block_format", [OFFSETS, SYMMETRIC, INT4, INT8], ids=str)
def test_a_merged_adapter_is_kept_beside_the_blocks_of_the_file(
    block_format: BlockFormat, size: float, rng: np.random.Generator
) -> None:
    file = on_a_grid(rng, block_format)
    delta = adapter(rng, size * file.half_step)
    finding = find_sides([file.weights + delta], [block_format])
    assert finding.fate == "kept"
    (side,) = finding.sides
    found = beside(rounded(file.weights + delta - side.dequantize(), block_format), side)
    assert found.format.side_columns == 32
    # Rounding alone loses most of the adapter, all of the smallest.
    alone = rounded(file.weights + delta, block_format)
    left_alone, left = (np.linalg.norm(within_blocks(m.dequantize() - file.weights - delta)) for m in (alone, found))
    assert left_alone > 0.75 * np.linalg.norm(delta)
    assert left < 0.25 * np.linalg.norm(delta)
    assert (found.codes == rounded(file.weights, block_format).codes).mean() > 0.99


def test_matrices_of_one_input_share_the_factor_that_multiplies_it(rng: np.random.Generator) -> None:
    files = [on_a_grid(rng), on_a_grid(rng, SYMMETRIC)]
    formats = [OFFSETS, SYMMETRIC]
    deltas = [adapter(rng, 0.2 * file.half_step) for file in files]
    finding = find_sides([file.weights + delta for file, delta in zip(files, deltas, strict=True)], formats)
    assert finding.fate == "kept"
    first, second = finding.sides
    assert first.right is second.right
    assert [side.left.format for side in finding.sides] == [BlockFormat(4), SYMMETRIC]
    for side, delta in zip(finding.sides, deltas, strict=True):
        assert np.linalg.norm(within_blocks(side.dequantize() - delta)) < 0.35 * np.linalg.norm(delta)


def test_the_same_matrix_gives_the_same_side_product(rng: np.random.Generator) -> None:
    file = on_a_grid(rng)
    weights = file.weights + adapter(rng, 0.2 * file.half_step)
    one, other = (find_sides([weights], [OFFSETS]).sides[0] for _ in range(2))
    np.testing.assert_array_equal(one.left.codes, other.left.codes)
    np.testing.assert_array_equal(one.right.codes, other.right.codes)


@pytest.mark.parametrize("block_format", [OFFSETS, SYMMETRIC, INT4, INT8], ids=str)
def test_weights_that_know_no_grid_or_lie_on_one_have_no_side_product(
    block_format: BlockFormat, rng: np.random.Generator
) -> None:
    file = on_a_grid(rng, block_format)
    trained = gaussian(rng, ROWS, WIDTH)
    stored = [file.weights.astype(dtype).astype(np.float32) for dtype in (np.float16, ml_dtypes.bfloat16)]
    moved_far = file.weights + adapter(rng, 6 * file.half_step)
    for weights in (trained, trained + adapter(rng, 0.3), file.weights, moved_far, np.zeros_like(trained), *stored):
        assert find_sides([weights], [block_format]).fate == "ordinary"


@pytest.mark.parametrize("block_format", [OFFSETS, SYMMETRIC, INT4], ids=str)
def test_a_small_change_without_a_low_rank_is_at_risk(block_format: BlockFormat, rng: np.random.Generator) -> None:
    file = on_a_grid(rng, block_format)
    change = 0.2 * file.half_step * gaussian(rng, ROWS, WIDTH)
    assert find_sides([file.weights + change], [block_format]).fate == "at risk"


def test_a_matrix_too_small_for_a_low_rank_has_no_side_product(rng: np.random.Generator) -> None:
    file = on_a_grid(rng)
    weights = file.weights + adapter(rng, 0.2 * file.half_step)
    assert find_sides([weights[:127]], [OFFSETS]).fate == "at risk"
    assert find_sides([weights[:128]], [OFFSETS]).fate == "kept"


def test_a_width_that_is_no_multiple_of_a_block_has_no_further_columns(rng: np.random.Generator) -> None:
    file = on_a_grid(rng)
    weights = file.weights + adapter(rng, 0.2 * file.half_step)
    assert find_sides([weights[:, :-1]], [INT4]).fate == "ordinary"
    assert BlockFormat(4, side_columns=32).fitted(WIDTH - 1) == BlockFormat(4)


def test_gate_and_up_have_one_factor_and_other_matrices_their_own() -> None:
    factors = [names.side_factor(names.layer_weight(7, part)) for part in LAYER_MATRICES]
    assert factors == [
        "model.layers.7.attn.qkv_proj.side.weight",
        "model.layers.7.attn.o_proj.side.weight",
        "model.layers.7.mlp.gate_up_proj.side.weight",
        "model.layers.7.mlp.gate_up_proj.side.weight",
        "model.layers.7.mlp.down_proj.side.weight",
    ]
