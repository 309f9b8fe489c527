"""`shortstack inspect`: the numbers against sums done by hand, the JSON, the page, and bundles that are none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from shortstack import __main__
from shortstack.graphs import names
from shortstack.graphs.bundle import describe_files, open_bundle, write_manifest
from shortstack.graphs.errors import BundleError, RequestError
from shortstack.graphs.manifest import Manifest, required_files
from shortstack.graphs.plan import ExitSpec, SplitPlan
from shortstack.graphs.precision import BlockFormat, Precision
from shortstack.graphs.spec import DType, ModelSpec
from shortstack.runtime.inspect_cli import inspect
from shortstack.runtime.inspect_html import render_html, write_html
from shortstack.runtime.inspect_picture import draw_stack
from shortstack.runtime.inspect_report import Report, build_report
from shortstack.runtime.inspect_words import (
    kv_lines,
    port_lines,
    precision_note,
    precision_words,
    printable,
    quantity,
    ranges,
    size,
)

MakeBundle = Callable[..., Path]

VOID_TAGS = {"meta", "br", "link", "img", "input", "hr"}

# hidden 8, 2 heads and 1 KV head of 16, MLP 10, vocabulary 100.
QKV = 8 * (2 + 2 * 1) * 16  # 512
Q_ALONE = 8 * 2 * 16  # 256
O_PROJ = 2 * 16 * 8  # 256
MLP = 3 * 8 * 10  # 240
NORMS = 2 * 8
LAYER = QKV + O_PROJ + MLP + NORMS  # 1024
TABLE = 100 * 8  # embedding, LM head


def tiny_spec(
    layers: int = 4, *, tied: bool = True, kv_map: tuple[int, ...] = (), head_dim: int = 16, biases: bool = False
) -> ModelSpec:
    return ModelSpec(
        model_type="llama",
        num_hidden_layers=layers,
        hidden_size=8,
        intermediate_size=10,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=head_dim,
        vocab_size=100,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        kv_map=kv_map,
        qkv_bias=biases,
        attention_out_bias=biases,
        mlp_bias=biases,
    )


@pytest.fixture
def make_bundle(tmp_path: Path) -> MakeBundle:
    """Writes a bundle whose files hold nothing but their own names."""

    def make(
        spec: ModelSpec,
        *exits: ExitSpec,
        source: str = "tiny",
        weights: bytes = b"weights",
        dtype: DType = "float32",
        precision: Precision | None = None,
    ) -> Path:
        folder = tmp_path / "bundle"
        folder.mkdir()
        plan = SplitPlan(spec.num_hidden_layers, exits)
        for name in required_files(plan):
            # Exits trimmed to equally many rows share their ids.
            (folder / name).write_bytes(b"ids" if name.startswith("draft-vocab") else name.encode())
        (folder / "weights.data").write_bytes(weights)
        write_manifest(
            folder,
            Manifest(
                spec=spec,
                plan=plan,
                dtype=dtype,
                max_length=32,
                files=describe_files(folder),
                source_name=source,
                source_sha256="ab" * 32,
                tools={"shortstack": "0.0.0"},
                precision=precision or Precision(),
            ),
        )
        return folder

    return make


def report_of(folder: Path) -> Report:
    return build_report(open_bundle(folder))


class Page(HTMLParser):
    """Parses a page strictly: every tag is closed, in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


# The numbers


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


# The numbers of a quantized bundle: blocks of 32 hold rows of 8, 10 and 32 in one block each.

INT4, INT8 = BlockFormat(4), BlockFormat(8)
INT4_ROW = 32 // 2 + 4 + 1  # codes, a float32 scale, half a byte of zero points
INT8_ROW = 32 + 4 + 1
LAYER_ROWS = (2 + 2 * 1) * 16 + 8 + 10 + 10 + 8  # outputs of qkv, o, gate, up, down
KV_SCALES = 2 * 16 * 4  # key and value, float32


def everywhere(block_format: BlockFormat, layers: int = 4) -> dict[str, BlockFormat]:
    parts = [names.layer_weight(layer, part) for layer in range(layers) for part in names.LAYER_MATRICES]
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
    assert "exits' own heads" in "".join(page.text)


# The words


def test_sizes_and_quantities_keep_three_digits() -> None:
    assert [size(n) for n in (0, 999, 1000, 34_805, 999_499, 999_500, 540_157_184, 10**13)] == [
        "0 B", "999 B", "1.00 kB", "34.8 kB", "999 kB", "1.00 MB", "540 MB", "10.0 TB",
    ]  # fmt: skip
    assert [quantity(n) for n in (7, 1024, 134_515_008, 70_600_000_000)] == ["7", "1.02 k", "135 M", "70.6 B"]


def test_runs_of_numbers_are_joined() -> None:
    assert [ranges(n) for n in ((), (3,), (0, 1, 2), (0, 2, 3, 7))] == ["-", "3", "0..2", "0, 2..3, 7"]


def test_cache_ports_of_all_layers_are_one_line(make_bundle: MakeBundle) -> None:
    report = report_of(make_bundle(tiny_spec(kv_map=(0, 1, 1, 3)), ExitSpec(2)))
    lines = [line.name for line in port_lines(report.segments[0].inputs)]
    assert lines[-1] == "past_key_values.{0..1}.key/value"
    assert [line.name for line in port_lines(report.segments[1].inputs)][-2:] == [
        "past_key_values.3.key/value",
        "shared.1.key/value",
    ]
    assert port_lines(report.segments[0].inputs)[-1].shape == "[batch, 1, capacity, 16]"


def test_control_characters_are_written_out() -> None:
    assert printable("a\x1b[31mb\u202ec\n") == r"a\x1b[31mb\u202ec\n"


# The command


def test_text_names_segments_exits_ports_and_files(make_bundle: MakeBundle) -> None:
    folder = make_bundle(tiny_spec(), ExitSpec(1, 25))
    done = CliRunner().invoke(inspect, [str(folder)], catch_exceptions=False)
    assert done.exit_code == 0
    for part in (
        "llama · 4 layers · hidden 8 · 2 heads, 1 KV heads of 16 · MLP 10 · vocabulary 100 (tied)",
        "exit after 1 layer, trimmed head, 25 of 100 rows",
        "past_key_values.{1..3}.key/value",
        "layers-01-04.onnx",
        "not measured",
        "weights.data",
    ):
        assert part in done.stdout
    assert "\x1b" not in done.stdout


def test_json_is_the_whole_report_and_the_same_every_time(make_bundle: MakeBundle) -> None:
    folder = make_bundle(tiny_spec(), ExitSpec(1, 25))
    first, second = (CliRunner().invoke(inspect, [str(folder), "--json"], catch_exceptions=False) for _ in range(2))
    assert first.stdout == second.stdout
    data = json.loads(first.stdout)
    assert data == json.loads(json.dumps(report_of(folder).to_json()))
    assert set(data) == {
        "folder", "format_version", "verified", "source_name", "source_sha256", "tools", "dtype", "precision",
        "max_length", "spec", "parameters", "weights", "layers", "segments", "cache_bytes_per_token", "files",
        "total_bytes",
    }  # fmt: skip
    assert data["parameters"]["total"] == TABLE + 4 * LAYER + 8
    assert data["segments"][0]["head"]["rows"] == 25
    assert data["segments"][0]["inputs"][0] == {"name": "input_ids", "dtype": "int64", "shape": ["batch", "seq"]}


def test_a_source_name_cannot_act_on_the_terminal(make_bundle: MakeBundle) -> None:
    folder = make_bundle(tiny_spec(), source="[red]x\x1b]0;owned\x07")
    done = CliRunner().invoke(inspect, [str(folder)], catch_exceptions=False)
    assert "[red]x\\x1b]0;owned\\x07" in done.stdout


def test_a_folder_without_manifest_is_a_misuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.run(["inspect", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "bundle.json" in said.err
    assert said.err.count("\n") == 1


def test_verify_finds_what_sizes_do_not_show(make_bundle: MakeBundle) -> None:
    folder = make_bundle(tiny_spec(), weights=b"weights")
    (folder / "weights.data").write_bytes(b"WEIGHTS")
    assert CliRunner().invoke(inspect, [str(folder)]).exit_code == 0
    done = CliRunner().invoke(inspect, [str(folder), "--verify"])
    assert isinstance(done.exception, BundleError)
    assert "weights.data" in str(done.exception)


def test_it_says_when_hashes_were_checked(make_bundle: MakeBundle) -> None:
    done = CliRunner().invoke(inspect, [str(make_bundle(tiny_spec())), "--verify"], catch_exceptions=False)
    assert "every file matches" in done.stdout


def test_it_opens_neither_onnxruntime_nor_numpy(make_bundle: MakeBundle, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys\n"
            "sys.modules.update(dict.fromkeys(('numpy', 'onnxruntime', 'tokenizers', 'torch', 'onnx')))\n"
            "from shortstack.__main__ import run\n"
            f"sys.exit(run(['inspect', {str(make_bundle(tiny_spec()))!r}, '--html', {str(page)!r}]))",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert page.is_file()


# The page


@pytest.mark.parametrize(
    ("spec", "exits"),
    [
        (tiny_spec(2), ()),
        (tiny_spec(), (ExitSpec(1, 25), ExitSpec(2, 3), ExitSpec(3))),
        (tiny_spec(12, tied=False, kv_map=(0, 1, 1, 1, 4, 5, 4, 5, 4, 5, 0, 0)), (ExitSpec(6),)),
        (tiny_spec(6, kv_map=(0, 4, 4, 4, 4, 5)), (ExitSpec(3),)),  # consumers below their producer
        (tiny_spec(90), (ExitSpec(1), ExitSpec(2, 10))),
    ],
    ids=["uncut", "three exits", "shared KV", "shared from above", "deep"],
)
def test_the_page_is_well_formed_and_loads_nothing(
    spec: ModelSpec, exits: tuple[ExitSpec, ...], make_bundle: MakeBundle
) -> None:
    html = render_html(report_of(make_bundle(spec, *exits)))
    page = Page(html)
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert not {"src", "href", "srcset", "xlink:href"} & {name for name, _ in page.attributes}
    assert not [marker for marker in ("http:", "https:", "src=", "@import", "//") if marker in html.lower()]
    assert html.lower().count("url(") == html.count("url(#") == 1  # the hatching of a tied head
    assert page.tags.count("svg") == 1
    for exit_spec in exits:
        assert f"exit after {exit_spec.exit_layer}" in " ".join(page.text)


def test_the_page_escapes_a_hostile_source_name(make_bundle: MakeBundle) -> None:
    hostile = "</title><script>alert('x')</script>\"><img src=x onerror=y>"
    html = render_html(report_of(make_bundle(tiny_spec(), source=hostile)))
    page = Page(html)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert "<script" not in html
    assert hostile in "".join(page.text)


def test_trimmed_heads_are_drawn_as_wide_as_their_rows(make_bundle: MakeBundle) -> None:
    picture = draw_stack(report_of(make_bundle(tiny_spec(), ExitSpec(1, 25), ExitSpec(2, 50), ExitSpec(3))))
    assert [rect.width for rect in picture.rects if rect.css.endswith("exit")] == [200, 100, 50]  # top to bottom


def test_everything_drawn_lies_within_the_picture(make_bundle: MakeBundle) -> None:
    kv_map = (*range(20), *range(20))  # twenty lanes
    picture = draw_stack(report_of(make_bundle(tiny_spec(40, kv_map=kv_map), ExitSpec(1), ExitSpec(20, 10))))
    for rect in picture.rects:
        assert rect.x >= 0
        assert rect.x + rect.width <= picture.width
        assert rect.y >= 0
        assert rect.y + rect.height <= picture.height
    owners = [rect for rect in picture.rects if rect.css == "kv"]
    assert len(owners) == len([line for line in picture.lines if line.css == "share"]) == 20


def test_the_page_is_written_whole_or_not_at_all(make_bundle: MakeBundle, tmp_path: Path) -> None:
    folder = make_bundle(tiny_spec(), ExitSpec(2))
    page = tmp_path / "page.html"
    done = CliRunner().invoke(inspect, [str(folder), "--html", str(page)], catch_exceptions=False)
    assert done.exit_code == 0
    assert str(page) in done.stderr
    assert page.read_text(encoding="utf-8").rstrip().endswith("</html>")
    with pytest.raises(RequestError, match="cannot be written"):
        write_html(report_of(folder), tmp_path / "missing" / "page.html")
    taken = tmp_path / "taken"
    taken.mkdir()
    with pytest.raises(RequestError, match="cannot be written"):
        write_html(report_of(folder), taken)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "page.html", "taken"]
