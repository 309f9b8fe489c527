"""`shortstack inspect`: the numbers against sums done by hand, the JSON, the page, and bundles that are none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from shortstack import __main__
from shortstack.graphs.bundle import describe_files, open_bundle, write_manifest
from shortstack.graphs.errors import BundleError, RequestError
from shortstack.graphs.manifest import Manifest, required_files
from shortstack.graphs.plan import ExitSpec, SplitPlan
from shortstack.graphs.spec import ModelSpec
from shortstack.runtime.inspect_cli import inspect
from shortstack.runtime.inspect_html import render_html, write_html
from shortstack.runtime.inspect_picture import draw_stack
from shortstack.runtime.inspect_report import Report, build_report
from shortstack.runtime.inspect_words import kv_lines, port_lines, printable, quantity, ranges, size

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

    def make(spec: ModelSpec, *exits: ExitSpec, source: str = "tiny", weights: bytes = b"weights") -> Path:
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
                dtype="float32",
                max_length=32,
                files=describe_files(folder),
                source_name=source,
                source_sha256="ab" * 32,
                tools={"shortstack": "0.0.0"},
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
        "folder", "format_version", "verified", "source_name", "source_sha256", "tools", "dtype", "max_length", "spec",
        "parameters", "weights", "layers", "segments", "cache_bytes_per_token", "files", "total_bytes",
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
