"""The numbers of `shortstack inspect` against sums done by hand."""

from __future__ import annotations

import json

import pytest

from helpers.inspect_bundles import LAYER, MLP, NORMS, O_PROJ, Q_ALONE, QKV, TABLE, MakeBundle, report_of, tiny_spec
from helpers.older_formats import as_format
from shortstack.graphs.manifest import FORMAT_VERSION
from shortstack.graphs.plan import ExitSpec
from shortstack.runtime.inspection.words import kv_lines


def test_parameters_are_those_of_the_spec(make_bundle: MakeBundle) -> None:
    report = report_of(make_bundle(tiny_spec(), ExitSpec(1)))
    parts = report.layers[0].parameters
    assert (parts.qkv, parts.o, parts.mlp, parts.norms, parts.biases) == (QKV, O_PROJ, MLP, NORMS, 0)
    assert report.parameters.total == TABLE + 4 * LAYER + 8  # the tied head counts once
    assert [s.parameters for s in report.segments] == [TABLE + LAYER, 3 * LAYER + 8]
    assert sum(s.parameter_share for s in report.segments) == pytest.approx(1)


def test_an_untied_head_counts_with_the_last_segment(make_bundle: MakeBundle) -> None:
    report = report_of(make_bundle(tiny_spec(tied=False), ExitSpec(1)))
    assert report.parameters.total == 2 * TABLE + 4 * LAYER + 8
    assert [s.parameters for s in report.segments] == [TABLE + LAYER, 3 * LAYER + 8 + TABLE]
    assert report.weights.lm_head == 4 * TABLE


def test_biases_are_counted(make_bundle: MakeBundle) -> None:
    report = report_of(make_bundle(tiny_spec(biases=True)))
    assert report.layers[0].parameters.biases == (2 + 2) * 16 + 8 + (2 * 10 + 8)


def test_a_consumer_has_no_key_and_value_projections(make_bundle: MakeBundle) -> None:
    report = report_of(make_bundle(tiny_spec(kv_map=(0, 1, 1, 1)), ExitSpec(2)))
    assert [layer.parameters.qkv for layer in report.layers] == [QKV, QKV, Q_ALONE, Q_ALONE]


def test_a_padded_head_takes_room_on_disk_but_is_no_parameter(make_bundle: MakeBundle) -> None:
    report = report_of(make_bundle(tiny_spec(head_dim=8)))
    assert report.layers[0].parameters.total == (QKV + O_PROJ) // 2 + MLP + NORMS
    assert report.layers[0].weight_bytes == 4 * LAYER  # stored with heads of 16
    assert report.cache_bytes_per_token == 4 * (2 * 1 * 16 * 4)


def test_the_bytes_of_a_layer_are_given_part_by_part(make_bundle: MakeBundle) -> None:
    report = report_of(make_bundle(tiny_spec(biases=True, kv_map=(0, 1, 1, 3))))
    owner, consumer = report.layers[1].part_bytes, report.layers[2].part_bytes
    assert (owner.qkv, owner.o, owner.mlp, owner.norms) == tuple(
        4 * part for part in (QKV + (2 + 2) * 16, O_PROJ + 8, MLP + 2 * 10 + 8, NORMS)
    )
    assert consumer.qkv == 4 * (Q_ALONE + 2 * 16)
    assert [layer.part_bytes.total for layer in report.layers] == [layer.weight_bytes for layer in report.layers]


def test_the_format_version_is_that_of_the_file(make_bundle: MakeBundle) -> None:
    folder = make_bundle(tiny_spec())
    assert report_of(folder).format_version == FORMAT_VERSION
    file = folder / "bundle.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps(as_format(data, 2)))
    assert report_of(folder).format_version == 2


def test_draft_cost_is_the_weight_bytes_read_relative_to_a_plain_step(make_bundle: MakeBundle) -> None:
    report = report_of(make_bundle(tiny_spec(), ExitSpec(1, 25), ExitSpec(3)))
    plain = 4 * LAYER + (100 + 1) * 8  # a head reads its rows and the norm before it
    trimmed, full = report.exits
    assert trimmed.draft_cost == pytest.approx((1 * LAYER + (25 + 1) * 8) / plain, abs=1e-6)
    assert full.draft_cost == pytest.approx((3 * LAYER + (100 + 1) * 8) / plain, abs=1e-6)
    assert report.segments[-1].head.draft_cost == 1
    assert (trimmed.weight_bytes, full.weight_bytes) == (4 * 26 * 8, 4 * 101 * 8)


def test_who_owns_borrows_and_completes_the_cache(make_bundle: MakeBundle) -> None:
    report = report_of(make_bundle(tiny_spec(kv_map=(0, 1, 1, 1)), ExitSpec(1), ExitSpec(2)))
    assert [s.kv_owned for s in report.segments] == [(0,), (1,), ()]
    assert [s.kv_borrowed for s in report.segments] == [(), (), (1,)]
    assert [head.kv_complete for head in report.exits] == [False, True]
    assert [s.cache_bytes_per_token for s in report.segments] == [128, 128, 0]
    assert report.layers[1].consumers == (2, 3)
    assert [(line.owners, line.consumers) for line in kv_lines(report)] == [((0,), ()), ((1,), (2, 3))]


def test_weights_are_accounted_for_and_a_shared_trimmed_head_counts_once(make_bundle: MakeBundle) -> None:
    rope = 32 * 16  # cos and sin, [32, 8] each
    expected = 4 * (TABLE + 4 * LAYER + 25 * 8 + 8 + rope) + 8 * 25  # ids are int64
    report = report_of(make_bundle(tiny_spec(), ExitSpec(1, 25), ExitSpec(3, 25), weights=b"0" * expected))
    assert report.weights.predicted == expected
    assert report.weights.as_predicted


def test_sizes_are_those_of_the_files(make_bundle: MakeBundle) -> None:
    folder = make_bundle(tiny_spec(), ExitSpec(2))
    report = report_of(folder)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "bundle.json"}
    assert report.files == sizes
    assert report.total_bytes == sum(sizes.values())
    assert [s.graph_bytes for s in report.segments] == [len(s.file) for s in report.segments]
