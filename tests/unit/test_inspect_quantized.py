"""The numbers of `shortstack inspect` for quantized bundles: blocks of 32 hold rows of 8, 10 and 32, one each."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from click.testing import CliRunner

from helpers.inspect_bundles import LAYER, NORMS, Q_ALONE, QKV, TABLE, MakeBundle, Page, report_of, tiny_spec
from helpers.tiny_models import LAYER_MATRICES
from shortstack.graphs import names
from shortstack.graphs.plan import ExitSpec
from shortstack.graphs.precision import BlockFormat, Precision
from shortstack.runtime.commands.inspect_bundle import inspect
from shortstack.runtime.inspection.page import render_html
from shortstack.runtime.inspection.words import precision_note, precision_words

INT4, INT8 = BlockFormat(4), BlockFormat(8)
INT4_ROW = 32 // 2 + 4 + 1  # codes, a float32 scale, half a byte of zero points
INT8_ROW = 32 + 4 + 1
LAYER_ROWS = (2 + 2 * 1) * 16 + 8 + 10 + 10 + 8  # outputs of qkv, o, gate, up, down
KV_SCALES = 2 * 16 * 4  # key and value, float32


def everywhere(block_format: BlockFormat, layers: int = 4) -> dict[str, BlockFormat]:
    parts = [names.layer_weight(layer, part) for layer in range(layers) for part in LAYER_MATRICES]
    return dict.fromkeys([names.EMBED_TOKENS, *parts], block_format)


def test_blocks_are_counted_with_their_scales_and_zero_points(make_bundle: MakeBundle) -> None:
    report = report_of(make_bundle(tiny_spec(), ExitSpec(1), precision=Precision(everywhere(INT4))))
    layer, head = LAYER_ROWS * INT4_ROW + NORMS * 4, 100 * INT4_ROW + 8 * 4
    assert [found.weight_bytes for found in report.layers] == 4 * [layer]
    assert report.weights.layers == 4 * layer
    assert report.weights.embedding == 100 * INT4_ROW
    assert report.weights.lm_head == report.weights.draft_heads == 0
    assert report.weights.other == 4 * (8 + 33 * 16)  # the norm, and rotary tables with a spare row
    assert [found.weight_bytes for found in (report.exits[0], report.segments[-1].head)] == [head, head]
    assert report.exits[0].draft_cost == pytest.approx((layer + head) / (4 * layer + head), abs=1e-6)
    assert report.parameters.total == TABLE + 4 * LAYER + 8  # as many as before


def test_scales_have_the_type_of_the_activations(make_bundle: MakeBundle) -> None:
    report = report_of(make_bundle(tiny_spec(), dtype="float16", precision=Precision(everywhere(INT8))))
    assert report.layers[0].weight_bytes == LAYER_ROWS * (INT8_ROW - 2) + NORMS * 2


def test_symmetric_blocks_store_no_zero_points_and_offsets_are_columns(make_bundle: MakeBundle) -> None:
    wide = replace(tiny_spec(), hidden_size=64)
    for block_format, bytes_per_row in (
        (BlockFormat(8, is_symmetric=True), 2 * (32 + 4)),
        (BlockFormat(4, has_offsets=True), 3 * (16 + 4) + 2),  # two blocks, a third with two offsets
    ):
        weights = {names.layer_weight(0, "mlp.gate_proj.weight"): block_format}
        folder = make_bundle(wide, precision=Precision(weights))
        saved = [layer.weight_bytes for layer in report_of(folder).layers]
        assert saved[1] - saved[0] == 10 * (64 * 4 - bytes_per_row)
        shutil.rmtree(folder)


def test_a_side_product_is_counted_with_the_factor_that_gate_and_up_share(make_bundle: MakeBundle) -> None:
    wide = replace(tiny_spec(), hidden_size=64)
    plain = BlockFormat(4, has_offsets=True)
    gate, up = (names.layer_weight(0, f"mlp.{part}_proj.weight") for part in ("gate", "up"))
    taken = []
    for block_format in (plain, replace(plain, side_columns=32)):
        weights = dict.fromkeys((gate, up), block_format)
        if block_format.side_columns:
            weights[names.side_factor(gate)] = BlockFormat(8, is_symmetric=True)
        folder = make_bundle(wide, precision=Precision(weights))
        taken.append(report_of(folder).layers[0].weight_bytes)
        shutil.rmtree(folder)
    # A block more in each of 10 rows, and 32 rows of two blocks; zero points of 3 and of 4 blocks take two bytes.
    assert taken[1] - taken[0] == 2 * 10 * (16 + 4) + 32 * 2 * (32 + 4)


def test_an_int8_cache_takes_a_byte_a_value_and_has_scales(make_bundle: MakeBundle) -> None:
    spec = tiny_spec(kv_map=(0, 1, 1, 1))
    report = report_of(make_bundle(spec, ExitSpec(1), precision=Precision({}, "int8")))
    assert [s.cache_bytes_per_token for s in report.segments] == [2 * 16, 2 * 16]
    assert report.cache_bytes_per_token == 2 * 2 * 16
    plain = (LAYER * 4, LAYER * 4, (LAYER - QKV + Q_ALONE) * 4)
    assert [layer.weight_bytes for layer in report.layers[:3]] == [
        plain[0] + KV_SCALES,
        plain[1] + KV_SCALES,
        plain[2],  # uses the cache of another
    ]


def test_a_full_head_of_an_exit_that_has_its_own_is_counted(make_bundle: MakeBundle) -> None:
    own = names.exit_weight(1, "head.weight")
    precision = Precision(everywhere(INT8) | {own: INT4})
    report = report_of(make_bundle(tiny_spec(), ExitSpec(1), ExitSpec(2), precision=precision))
    lower, upper = report.exits
    assert (lower.owns_weights, lower.stored_as) == (True, "int4, blocks of 32")
    assert (upper.owns_weights, upper.stored_as) == (False, "int8, blocks of 32")
    assert lower.weight_bytes == 100 * INT4_ROW + 8 * 4
    assert upper.weight_bytes == 100 * INT8_ROW + 8 * 4
    assert report.weights.draft_heads == 100 * INT4_ROW
    layer = LAYER_ROWS * INT8_ROW + NORMS * 4
    assert lower.draft_cost == pytest.approx((layer + lower.weight_bytes) / (4 * layer + upper.weight_bytes), abs=1e-6)


@pytest.mark.parametrize("is_shared", [False, True])
def test_equal_heads_of_exits_count_once_if_the_file_is_that_small(make_bundle: MakeBundle, is_shared: bool) -> None:
    heads = {names.exit_weight(e, "head.weight"): INT4 for e in (1, 2, 3)}
    exits = [ExitSpec(e, 50) for e in (1, 2, 3)]
    layers, other = 4 * (LAYER_ROWS * INT8_ROW + NORMS * 4), 4 * (8 + 33 * 16)
    stored = layers + other + 100 * INT8_ROW + 50 * INT4_ROW * (1 if is_shared else 3) + 50 * 8
    folder = make_bundle(tiny_spec(), *exits, precision=Precision(everywhere(INT8) | heads), weights=b"0" * stored)
    weights = report_of(folder).weights
    assert weights.predicted == stored
    assert weights.as_predicted


@pytest.mark.parametrize("first", [1, 40, 99])
@pytest.mark.parametrize("tied", [False, True])
def test_first_rows_of_another_format_are_told_from_the_size_of_the_file(
    make_bundle: MakeBundle, first: int, tied: bool
) -> None:
    head = names.EMBED_TOKENS if tied else names.LM_HEAD
    weights = everywhere(INT4) | {head: INT4, names.first_rows(head): INT8}
    layers, other = 4 * (LAYER_ROWS * INT4_ROW + NORMS * 4), 4 * (8 + 33 * 16)
    table = first * INT8_ROW + (100 - first) * INT4_ROW
    stored = layers + other + table + (0 if tied else 100 * INT4_ROW)
    report = report_of(
        make_bundle(tiny_spec(tied=tied), ExitSpec(1), precision=Precision(weights), weights=b"0" * stored)
    )
    assert report.weights.as_predicted
    assert report.exits[0].weight_bytes == table + 8 * 4
    assert report.exits[0].stored_as == "first rows int8, blocks of 32; others int4, blocks of 32"
    assert report.weights.embedding == (table if tied else 100 * INT4_ROW)


def test_a_file_of_another_size_is_noted(make_bundle: MakeBundle) -> None:
    note = precision_note(report_of(make_bundle(tiny_spec(), precision=Precision(everywhere(INT4)))))
    assert note is not None
    assert "weights.data holds 7 B" in note


def test_precision_is_put_into_words(make_bundle: MakeBundle) -> None:
    plain = make_bundle(tiny_spec())
    assert precision_words(report_of(plain)) == "float32 activations and cache"
    shutil.rmtree(plain)
    weights = everywhere(INT4) | {names.layer_weight(layer, names.QKV_PROJ): INT8 for layer in (0, 1)}
    del weights[names.EMBED_TOKENS]
    floats, int8_cache = "float32 activations and cache", "float16 activations, int8 KV cache"
    mixed = f"{floats}; 18 matrices int4, blocks of 32; 2 int8, blocks of 32; 1 float32"
    alone = f"{floats}; 20 matrices float32; 1 int4, blocks of 32"
    for precision, dtype, expected in (
        (Precision(weights), "float32", mixed),
        (Precision(everywhere(INT8), "int8"), "float16", f"{int8_cache}; 21 matrices int8, blocks of 32"),
        (Precision({}, "int8"), "float16", int8_cache),
        (Precision({names.EMBED_TOKENS: INT4}), "float32", alone),
    ):
        folder = make_bundle(tiny_spec(), precision=precision, dtype=dtype)
        assert precision_words(report_of(folder)) == expected
        shutil.rmtree(folder)


def test_text_page_and_json_of_a_quantized_bundle_say_so(make_bundle: MakeBundle) -> None:
    precision = Precision(everywhere(INT8) | {names.exit_weight(1, "head.weight"): INT4}, "int8")
    folder = make_bundle(tiny_spec(), ExitSpec(1), ExitSpec(2), precision=precision)
    done = CliRunner().invoke(inspect, [str(folder)], catch_exceptions=False)
    words = "float32 activations, int8 KV cache; 21 matrices int8, blocks of 32; 1 int4, blocks of 32"
    for part in (words, "exit after 1 layer, full head, its own", "the final head: int8, blocks of 32", "int8"):
        assert part in done.stdout
    data = json.loads(CliRunner().invoke(inspect, [str(folder), "--json"], catch_exceptions=False).stdout)
    assert data["precision"] == precision.to_json()
    page = Page(render_html(report_of(folder)))
    assert words in "".join(page.text)
    assert "what exits have of their own" in "".join(page.text)
