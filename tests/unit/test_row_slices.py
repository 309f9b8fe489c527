"""A matrix that is rounded and stored slice by slice is, byte for byte, the one that is rounded and stored at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shortstack.graphs import names
from shortstack.graphs.ir.block_tensor import block_ranges, stacked
from shortstack.graphs.ir.weights import WeightStore
from shortstack.graphs.precision import BlockFormat
from shortstack.quant import rows
from shortstack.quant.method import METHODS
from shortstack.quant.methods.offsets import with_offsets
from shortstack.quant.methods.stats import InputStatsBuilder, output_error
from shortstack.quant.rows import by_rows, relative_error, round_rows

PLAIN = [method.name for method in METHODS.values() if not method.needs_text]
FORMATS = (BlockFormat(4), BlockFormat(8, is_symmetric=True), BlockFormat(4, 16), BlockFormat(4, has_offsets=True))


@pytest.fixture
def weight(seed: int) -> rows.Floats:
    return np.random.default_rng(seed).standard_normal((53, 96)).astype(np.float32)


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("block_format", FORMATS, ids=str)
def test_rows_on_many_threads_are_those_of_one(
    weight: rows.Floats, method: str, block_format: BlockFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_matrix = METHODS[method].round
    monkeypatch.setattr(rows, "usable_cores", lambda: 4)
    found = round_rows(round_matrix, 5, weight, block_format, None)
    if block_format.has_offsets:
        whole = with_offsets(round_matrix, weight, block_format, None)
    else:
        whole = round_matrix(weight, block_format, None)
    for part, array in whole.packed_parts().items():
        np.testing.assert_array_equal(found.tensor.packed_parts()[part], array)
    expected = output_error(weight, whole.dequantize(), None)
    assert relative_error(found.left, found.whole) == pytest.approx(expected, rel=1e-6)


def test_slices_come_back_in_order_and_errors_come_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "usable_cores", lambda: 3)
    assert by_rows(lambda some: (some.start, some.stop), 10, 4) == [(0, 4), (4, 8), (8, 10)]

    def broken(some: slice) -> None:
        raise ValueError(f"row {some.start}")

    with pytest.raises(ValueError, match="row 0"):
        by_rows(broken, 10, 4)


@pytest.mark.parametrize("block_format", FORMATS[:3], ids=str)
def test_a_store_writes_the_same_bytes_in_slices(
    tmp_path: Path, weight: rows.Floats, block_format: BlockFormat
) -> None:
    whole = METHODS["rtn"].round(weight, block_format, None)
    slices = [METHODS["rtn"].round(weight[start : start + 9], block_format, None) for start in range(0, 53, 9)]
    for name in ("whole", "slices"):
        (tmp_path / name).mkdir()
    with WeightStore(tmp_path / "whole") as store:
        store.add("before", weight[0])
        store.add_blocks("w", whole, "float16")
        store.add("after", weight)
    with WeightStore(tmp_path / "slices") as sliced:
        sliced.add("before", weight[0])
        sliced.add_block_slices("w", whole.shape, iter(slices), "float16")
        sliced.add_slices("after", weight.shape, iter(np.array_split(weight, 4)))
    same = [(tmp_path / name / names.WEIGHTS_FILE).read_bytes() for name in ("whole", "slices")]
    assert same[0] == same[1]
    assert store.formats == sliced.formats
    assert stacked(slices).codes.tobytes() == whole.codes.tobytes()


def test_a_store_refuses_slices_that_are_not_all_of_a_tensor(tmp_path: Path, weight: rows.Floats) -> None:
    with WeightStore(tmp_path) as store, pytest.raises(ValueError, match="slices hold 960 values"):
        store.add_slices("w", weight.shape, [weight[:10]])


def test_a_store_goes_on_from_what_it_said_and_forgets_the_rest(tmp_path: Path, weight: rows.Floats) -> None:
    blocks = METHODS["rtn"].round(weight, BlockFormat(4), None)
    with WeightStore(tmp_path) as store:
        store.add("first", weight)
        store.add_blocks("blocks", blocks, "float32")
        contents = store.contents()
        store.add("lost", weight)
    with WeightStore(tmp_path, contents) as again:
        assert "lost" not in again
        again.add("second", weight[3])
        assert again.formats == store.formats
        np.testing.assert_array_equal(again["first"].numpy(), weight)
        np.testing.assert_array_equal(again["second"].numpy(), weight[3])
        np.testing.assert_array_equal(again[names.block_scales("blocks")].numpy(), blocks.scales)


def test_ranges_of_blocks_are_their_smallest_and_largest_values(weight: rows.Floats) -> None:
    x = weight.reshape(53, 3, 32)
    low, high = block_ranges(x)
    np.testing.assert_array_equal(low, x.min(axis=2))
    np.testing.assert_array_equal(high, x.max(axis=2))


def test_gptqs_factor_is_that_of_the_inverse(seed: int) -> None:
    """U^T U is the inverse of the damped gram matrix, also where a triangular matrix is inverted in quarters."""
    width = 600
    x = np.random.default_rng(seed).standard_normal((900, width)).astype(np.float32)
    builder = InputStatsBuilder()
    builder.add(x[:400])
    builder.add(x[400:])
    stats = builder.finish()
    upper = stats.inverse_factor()
    assert upper is stats.inverse_factor()
    assert not np.tril(upper, -1).any()
    damped = stats.gram.astype(np.float64) + 0.01 * np.diag(stats.gram).mean() * np.eye(width)
    inverse = np.linalg.inv(damped)
    np.testing.assert_allclose(upper.astype(np.float64).T @ upper, inverse, atol=1e-6 * np.abs(inverse).max())
