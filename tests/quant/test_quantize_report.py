"""The report of `shortstack quantize`: what stays when it stops, and how it is made later."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.bad_input import Refused, left_behind
from helpers.quantized import INT4, INT8, PROMPT, QuantizedBundles, preset
from helpers.tiny_models import BASE, TinyBundles
from shortstack.__main__ import run
from shortstack.graphs import bundle as bundles
from shortstack.graphs import names
from shortstack.graphs.bundle import open_bundle, put_file
from shortstack.quant import quality_report
from shortstack.quant.quality import Quality
from shortstack.quant.quality_report import make_report
from shortstack.quant.spec import ReportSpec
from shortstack.runtime import load

SMALL = ("--calibration-tokens", "512", "--heldout-tokens", "256")
MIX = ("--preset", "float", "--weights", "int8")


def report_of(folder: Path) -> dict[str, Any]:
    """What quality.json says; memory differs from run to run."""
    report: dict[str, Any] = json.loads((folder / names.QUALITY_FILE).read_text(encoding="utf-8"))
    for side in ("source", "result"):
        assert report[side].pop("peak_rss_bytes") > 0
    return report


@pytest.fixture
def finished(sound: Path, quantized: QuantizedBundles, tmp_path: Path) -> Path:
    """A quantized bundle without a report, to put one into."""
    return Path(shutil.copytree(quantized(sound, preset(INT4)), tmp_path / "finished"))


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "No space left on device"), 2),
        (RuntimeError("a bug"), None),
    ],
    ids=["interrupt", "disk", "bug"],
)
def test_a_report_that_stops_leaves_the_finished_bundle_and_says_how_to_make_it_later(
    bundle: Path,
    sound: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    code: int | None,
) -> None:
    def fail(*_: object) -> None:
        open_bundle(out, verify_hashes=True)  # in place before the report begins
        raise raised

    texts = ("--heldout", str(Path(__file__)))
    for out in (bundle, tmp_path / "a new one"):
        with monkeypatch.context() as patched:
            patched.setattr(quality_report, "judge", fail)
            capsys.readouterr()
            command = ["quantize", str(sound), str(out), *MIX, *SMALL, *texts, "--overwrite"]
            if code is None:
                with pytest.raises(RuntimeError):
                    run(command)
            else:
                assert run(command) == code
        lines = capsys.readouterr().err.splitlines()
        (line,) = (line for line in lines if "its report is not" in line)
        assert line.startswith(f"{out} is complete")
        manifest = open_bundle(out, verify_hashes=True).manifest
        assert names.QUALITY_FILE not in manifest.files
        assert len(load(out).generate(PROMPT, max_new_tokens=4, ignore_eos=True).tokens) == 4

        later = shlex.split(line.partition("To make it: ")[2])
        assert later[0] == "shortstack"
        assert run(later[1:]) == 0
        assert names.QUALITY_FILE in open_bundle(out, verify_hashes=True).manifest.files
        assert report_of(out)["heldout"].startswith(f"{Path(__file__).name}: 256 tokens")
    assert left_behind(tmp_path) == ["a new one", "bundle"]


def test_a_report_made_later_says_what_one_made_at_once_does(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at_once, later = tmp_path / "at once", tmp_path / "later"
    options = ("--preset", "int4", "--method", "k-quant", "--calibration-tokens", "512")
    assert run(["quantize", str(sound), str(at_once), *options, "--heldout-tokens", "256"]) == 0
    assert run(["quantize", str(sound), str(later), *options, "--no-report"]) == 0
    assert not (later / names.QUALITY_FILE).exists()
    for _ in range(2):  # a report that is there is replaced
        capsys.readouterr()
        assert run(["quantize", str(sound), str(later), "--report-only", "--heldout-tokens", "256", "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        bundle = open_bundle(later, verify_hashes=True)
        assert printed["quality"] == json.loads((later / names.QUALITY_FILE).read_text(encoding="utf-8"))
        assert printed["bytes"] == sum(entry.bytes for entry in bundle.manifest.files.values())
        assert report_of(later) == report_of(at_once)
    assert report_of(later)["recipe"] == "int4"
    assert report_of(later)["method"] == "k-quant"
    assert report_of(later)["calibration"] == "draft_vocab.txt: 512 tokens"
    assert len(report_of(later)["worst"]) == 5


def test_a_bundle_that_does_not_say_how_it_was_made_gets_a_report_too(
    sound: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = open_bundle(finished)
    (finished / names.QUANTIZATION_FILE).unlink()
    del bundle.manifest.files[names.QUANTIZATION_FILE]
    bundles.write_manifest(finished, bundle.manifest)
    capsys.readouterr()
    assert run(["quantize", str(sound), str(finished), "--report-only", "--heldout-tokens", "64"]) == 0
    printed = capsys.readouterr().out
    assert "unknown preset" in printed
    assert "calibrated on an unknown text, if any" in printed
    report = report_of(finished)
    assert (report["recipe"], report["method"], report["worst"]) == (None, None, [])


def test_a_report_on_two_bundles_that_do_not_belong_together_is_refused(
    tiny_bundles: TinyBundles, sound: Path, finished: Path, refused: Refused
) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    other = tiny_bundles.bundle(BASE, 2)
    for source, out in ((other, finished), (finished, sound), (sound, other), (sound, sound), (finished, finished)):
        refused(["quantize", source, out, "--report-only"], f"{out} was not made from {source}", "quantized from")
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_a_report_without_a_bundle_is_refused_with_the_command_that_makes_one(
    sound: Path, tmp_path: Path, refused: Refused
) -> None:
    out = tmp_path / "out"
    refused(["quantize", sound, out, "--report-only"], f"{out} is not a bundle", f"quantize {sound} {out}")
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--preset", "int8"), "--preset"),
        (("-r", "int8", "--head", "int4"), "--preset, --head"),
        (("--max-kl", "0.1"), "--max-kl"),
        (("--dtype", "fp16", "--overwrite"), "--dtype, --overwrite"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_options_that_a_report_alone_does_not_use_are_refused(
    sound: Path, finished: Path, refused: Refused, options: tuple[str, ...], named: str
) -> None:
    command = ["quantize", sound, finished, "--report-only", *options]
    refused(command, f"{named} would have no effect: OUT is quantized already", "--report-only")


def test_a_report_is_either_wanted_or_not(sound: Path, finished: Path, refused: Refused) -> None:
    refused(["quantize", sound, finished, "--report-only", "--no-report"], "exclude each other")


def test_a_bundle_that_is_replaced_while_it_is_measured_is_left_alone(
    sound: Path, finished: Path, quantized: QuantizedBundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replaced(*arguments: Any) -> Quality:
        quality = judge(*arguments)
        shutil.rmtree(finished)
        shutil.copytree(quantized(sound, preset(INT8)), finished)
        return quality

    judge = quality_report.judge
    monkeypatch.setattr(quality_report, "judge", replaced)
    with pytest.raises(bundles.BundleError, match="was replaced while it was measured"):
        make_report(ReportSpec(sound, finished, heldout_tokens=64))
    assert names.QUALITY_FILE not in open_bundle(finished, verify_hashes=True).manifest.files


# Files that are put into a finished bundle


@pytest.mark.parametrize("stops_after", range(4))
def test_a_bundle_can_be_opened_wherever_the_writing_of_its_report_stops(
    finished: Path, monkeypatch: pytest.MonkeyPatch, stops_after: int
) -> None:
    put_file(open_bundle(finished), names.QUALITY_FILE, b"{}")
    steps = 0

    def replace(self: Path, target: Path) -> Path:
        nonlocal steps
        if steps == stops_after:
            raise KeyboardInterrupt
        steps += 1
        return original(self, target)

    original = Path.replace
    monkeypatch.setattr(Path, "replace", replace)
    content = b'{"longer": "than before"}'
    if stops_after < 3:
        with pytest.raises(KeyboardInterrupt):
            put_file(open_bundle(finished), names.QUALITY_FILE, content)
    else:
        put_file(open_bundle(finished), names.QUALITY_FILE, content)
        assert (finished / names.QUALITY_FILE).read_bytes() == content
        assert names.QUALITY_FILE in open_bundle(finished).manifest.files
    open_bundle(finished, verify_hashes=True)
    assert not [name for name in left_behind(finished) if name.startswith(".")]


# A report that cannot be stored, and quantization.json from elsewhere


def never(*_: object) -> None:
    raise AssertionError("measured before it was checked that this is of use")


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_measured(
    sound: Path, finished: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if Path(path).is_relative_to(finished) and flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return opened(path, flags, *rest, **named)

    opened = os.open
    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(quality_report, "judge", never)
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    error = refused(["quantize", sound, finished, "--report-only"], f"{finished} cannot be written", "folder writable")
    assert "Read-only file system" in error
    assert ".partial-" not in error
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_to_write_is_named_before_anything_is_measured(
    sound: Path, finished: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality_report, "judge", never)
    finished.chmod(0o555)
    try:
        refused(["quantize", sound, finished, "--report-only"], f"{finished} cannot be written", "folder writable")
    finally:
        finished.chmod(0o755)


@pytest.mark.parametrize("as_json", [True, False], ids=["json", "table"])
def test_a_report_that_cannot_be_stored_is_printed_before_the_error(
    sound: Path, finished: Path, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    (finished / names.QUALITY_FILE).mkdir()  # no file can take its place
    capsys.readouterr()
    command = ["quantize", str(sound), str(finished), "--report-only", "--heldout-tokens", "64"]
    assert run([*command, *(["--json"] if as_json else [])]) == 2
    out, error = capsys.readouterr()
    if as_json:
        printed = json.loads(out)
        assert printed["quality"]["heldout"].endswith(": 64 tokens")
        assert printed["bytes"] == printed["quality"]["result"]["disk_bytes"]
    else:
        assert "KL divergence" in out
        assert out.splitlines()[-1].startswith(f"{finished}: ")
    (line,) = (line for line in error.splitlines() if line.startswith("error: "))
    assert f"{finished / names.QUALITY_FILE} cannot be stored" in line
    assert "make the report again" in line
    assert names.QUALITY_FILE not in open_bundle(finished, verify_hashes=True).manifest.files


def test_a_report_that_cannot_be_stored_after_quantizing_says_how_to_make_it_later(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    monkeypatch.setattr(quality_report, "put_file", full)
    assert run(["quantize", str(sound), str(out), *MIX, *SMALL, "--json"]) == 2
    printed, error = capsys.readouterr()
    assert json.loads(printed)["quality"]["recipe"]
    assert f"{out} is complete, but its report is not. To make it: shortstack quantize" in error
    assert "cannot be stored: No space left on device" in error


def give_record(folder: Path, content: str) -> None:
    """Put a quantization.json into a bundle that says this, with the right size and hashes."""
    put_file(open_bundle(folder), names.QUANTIZATION_FILE, content.encode())


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("errors", 6, ("field errors", "found 6", "expected an object of numbers")),
        ("errors", None, ("field errors", "found None")),
        ("errors", {"a.weight": "much"}, ("field errors['a.weight']", "found 'much'", "finite number")),
        ("errors", {"a.weight": True}, ("field errors['a.weight']", "found True")),
        ("errors", {"a.weight": float("nan")}, ("field errors['a.weight']", "found nan")),
        ("errors", {"a.weight": 10**400}, ("field errors['a.weight']", "found 1000", "...")),
        ("tuning", 6, ("field tuning", "found 6", "expected an object of texts")),
        ("tuning", {"a.weight": "lost"}, ("field tuning['a.weight']", "found 'lost'", "kept or at risk")),
        ("tuning", {"a.weight": ["kept"]}, ("field tuning['a.weight']", "found ['kept']")),
        ("preset", ["int4"], ("field preset", "found ['int4']", "expected a text")),
        ("method", None, ("field method", "found None", "expected a text")),
        ("source_weights_sha256", 1, ("field source_weights_sha256", "found 1", "expected a text or null")),
        ("calibration", 0, ("field calibration", "found 0", "expected a text or null")),
        ("max_kl", "low", ("field max_kl", "found 'low'", "expected a finite number >= 0 or null")),
        ("max_kl", float("inf"), ("field max_kl", "found inf")),
        ("of_outputs", ["a.weight", 1], ("field of_outputs", "found ['a.weight', 1]", "a list of texts or null")),
        ("search", {"kl": 0.1}, ("field search", "found {'kl': 0.1}", "an object with kl, tokens and matrices")),
        ("search", {"kl": -1, "tokens": 9, "matrices": {}}, ("field search", "found {'kl': -1")),
        ("search", {"kl": 1, "tokens": 9, "matrices": {"int4": "all"}}, ("field search", "'all'")),
        ("another", 1, ("an unknown field 'another'", "expected the fields preset, ")),
    ],
    ids=lambda value: ascii(value)[:24] if not isinstance(value, tuple) else "",
)
def test_a_field_of_a_record_that_is_not_valid_is_named_before_anything_is_measured(
    sound: Path,
    finished: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
    field: str,
    value: object,
    says: tuple[str, ...],
) -> None:
    monkeypatch.setattr(quality_report, "judge", never)
    path = finished / names.QUANTIZATION_FILE
    give_record(finished, json.dumps(json.loads(path.read_text(encoding="utf-8")) | {field: value}))
    refused(["quantize", sound, finished, "--report-only"], str(path), *says, "Quantize the bundle again")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[]", ("found a JSON list", "expected a JSON object")),
        ("{}", ("found no field preset, no field method", "expected the fields")),
        ("{", ("is not valid JSON",)),
        ("[" * 100_000, ("is nested too deeply",)),
        ('{"preset": "\\ud800"}', ("holds half of a character",)),
    ],
    ids=["list", "empty", "half", "deep", "half a character"],
)
def test_a_record_that_is_no_object_of_its_fields_is_named(
    sound: Path, finished: Path, refused: Refused, content: str, says: tuple[str, ...]
) -> None:
    give_record(finished, content)
    path = finished / names.QUANTIZATION_FILE
    refused(["quantize", sound, finished, "--report-only"], str(path), *says, "Quantize the bundle again")


def test_words_in_square_brackets_are_printed_as_they_are(
    sound: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished / names.QUANTIZATION_FILE
    record = json.loads(path.read_text(encoding="utf-8")) | {"preset": "[/mine]", "errors": {"[/a].weight": 0.5}}
    give_record(finished, json.dumps(record | {"calibration": "[/text]"}))
    capsys.readouterr()
    assert run(["quantize", str(sound), str(finished), "--report-only", "--heldout-tokens", "64"]) == 0
    printed = capsys.readouterr().out
    for words in ("preset [/mine]", "calibrated on [/text]", "[/a] 50.00%"):
        assert words in printed
