"""`shortstack inspect`: its words, the text, the JSON, and bundles that are none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from helpers.inspect_bundles import LAYER, TABLE, MakeBundle, report_of, tiny_spec
from shortstack import __main__
from shortstack.graphs.errors import BundleError
from shortstack.graphs.plan import ExitSpec
from shortstack.runtime.commands.inspect_bundle import inspect
from shortstack.runtime.inspection.words import attention_facts, port_lines, printable, quantity, ranges, size

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
        "origins", "max_length", "spec", "parameters", "weights", "layers", "segments", "drafter", "iterated_groups",
        "cache_bytes_per_token", "files", "total_bytes",
    }  # fmt: skip
    assert data["parameters"]["total"] == TABLE + 4 * LAYER + 8
    assert data["segments"][0]["head"]["rows"] == 25
    assert data["segments"][0]["inputs"][0] == {"name": "input_ids", "dtype": "int64", "shape": ["batch", "seq"]}


def test_passes_windows_and_masked_diagonals_are_a_line_each(make_bundle: MakeBundle) -> None:
    spec = tiny_spec(9, kv_map=(1, 1, 1, 4, 4, 4, 7, 7, 7), windows=(16, 16, 0, 0, 8, 16, 0, 0, 0))
    done = CliRunner().invoke(inspect, [str(make_bundle(spec, ExitSpec(3)))], catch_exceptions=False)
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in done.stdout.splitlines() if line.strip()}
    assert lines["passes"] == "layers 0..1, 3..4, 6..7 run in passes over a prompt, in one over a single token"
    assert lines["windows"] == (
        "the last 16 positions in layers 0..1, 5; the last 8 positions in layer 4; all positions in layers 2..3, 6..8"
    )
    assert lines["diagonal"] == "masked: layers 0, 3, 6 cannot see their own position"


def test_passes_windows_and_masked_diagonals_are_fields_of_the_json(make_bundle: MakeBundle) -> None:
    folder = make_bundle(tiny_spec(4, kv_map=(0, 2, 2, 3), windows=(0, 8, 0, 8)))
    data = json.loads(CliRunner().invoke(inspect, [str(folder), "--json"], catch_exceptions=False).stdout)
    assert data["iterated_groups"] == [{"start": 1, "end": 3}]
    assert [layer["window"] for layer in data["layers"]] == [0, 8, 0, 8]
    assert [layer["sees_itself"] for layer in data["layers"]] == [True, False, True, True]


def test_nothing_is_said_of_passes_windows_and_diagonals_where_there_are_none(make_bundle: MakeBundle) -> None:
    assert attention_facts(report_of(make_bundle(tiny_spec(kv_map=(0, 1, 1, 1))))) == []


def test_a_mask_and_a_window_of_all_layers_are_named(make_bundle: MakeBundle) -> None:
    found = attention_facts(report_of(make_bundle(tiny_spec(windows=(8, 8, 8, 8), masks_diagonal=True))))
    assert found == [
        ("windows", "the last 8 positions in layers 0..3"),
        ("diagonal", "masked: layers 0..3 cannot see their own position"),
    ]


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
