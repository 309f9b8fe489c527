"""`shortstack quantize` on tiny models: what it takes, what it says and stores of itself, and what dying leaves."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import onnx
import pytest

from helpers.bad_input import left_behind
from helpers.older_formats import as_format
from helpers.progress_lines import without_progress
from helpers.quantized import INT4, INT4_OFFSETS, INT8, PROMPT, QuantizedBundles, preset
from helpers.tiny_models import BASE, LAYER_MATRICES, SPECULATOR, TinyBundles
from shortstack.__main__ import run
from shortstack.graphs import names
from shortstack.graphs.bundle import describe_files, open_bundle
from shortstack.graphs.ir import write_bundle as bundle_writer
from shortstack.graphs.manifest import Manifest
from shortstack.graphs.precision import BlockFormat, KVType, Precision
from shortstack.graphs.spec import DType
from shortstack.runtime import load

SMALL = ("--calibration-tokens", "512", "--heldout-tokens", "256")


# Bundles of another make


def first_format(source: Path, out: Path) -> Path:
    """The same bundle as format 1 wrote it: no field precision, no rotary angles for a spare row."""
    shutil.copytree(source, out)
    manifest = open_bundle(source).manifest
    for segment in manifest.plan.segments:
        path = out / names.segment_file(segment.start, segment.end)
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.name in names.rope_tables(1):
                length = next(entry for entry in tensor.external_data if entry.key == "length")
                length.value = str(int(length.value) // tensor.dims[0] * manifest.max_length)
                tensor.dims[0] = manifest.max_length
        onnx.save(model, path)
    data = as_format(replace(manifest, files=describe_files(out)).to_json(), 1)
    (out / names.MANIFEST_FILE).write_text(json.dumps(data), encoding="utf-8")
    return out


@pytest.mark.parametrize("kv_cache", ["float", "int8"])
def test_a_bundle_of_the_first_format_opens_and_is_quantized_to_the_same(
    tiny_bundles: TinyBundles, quantized: QuantizedBundles, tmp_path: Path, kv_cache: KVType
) -> None:
    source = tiny_bundles.bundle(SPECULATOR, 3, max_length=48)
    old = first_format(source, tmp_path / "old")
    assert open_bundle(old, verify_hashes=True).manifest.precision == Precision()
    plain = [load(folder).generate(PROMPT, ignore_eos=True).tokens for folder in (source, old)]
    assert plain[0] == plain[1]
    assert len(plain[0]) == 48 - len(PROMPT)
    small = [quantized(folder, preset(INT4, kv_cache)) for folder in (source, old)]
    assert open_bundle(small[0]).manifest.weights_sha256 == open_bundle(small[1]).manifest.weights_sha256
    model = load(small[1])
    tokens = model.generate(PROMPT, ignore_eos=True).tokens
    assert len(tokens) == 48 - len(PROMPT)
    assert model.generate(PROMPT, ignore_eos=True, strategy="self-speculative").tokens == tokens


@pytest.mark.parametrize("max_length", [8, 40])
def test_a_context_shorter_than_a_row_of_calibration_text_is_enough(
    tiny_bundles: TinyBundles, tmp_path: Path, max_length: int
) -> None:
    source = tiny_bundles.bundle(BASE, 1, max_length=max_length)
    assert run(["quantize", str(source), str(tmp_path / "out"), *SMALL]) == 0
    quality = json.loads((tmp_path / "out" / names.QUALITY_FILE).read_text(encoding="utf-8"))
    assert quality["is_exact"]


# What it says


def test_the_report_is_stored_and_printed_and_hashed(
    tiny_bundles: TinyBundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tiny_bundles.bundle(SPECULATOR, 1, 3), tmp_path / "out"
    capsys.readouterr()
    assert run(["quantize", str(source), str(out), "-r", "int8", "--kv-cache", "int8", *SMALL, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    bundle = open_bundle(out, verify_hashes=True)
    assert names.QUALITY_FILE in bundle.manifest.files
    quality = json.loads((out / names.QUALITY_FILE).read_text(encoding="utf-8"))
    assert printed == {
        "bundle": str(out),
        "bytes": sum(entry.bytes for entry in bundle.manifest.files.values()),
        "tuning": {},
        "search": None,
        "quality": quality,
    }
    assert quality["recipe"] == "int8"
    assert quality["method"] == "rtn"
    assert quality["formats"] == {
        "int8, blocks of 32": 2 + 5 * SPECULATOR.layers,
        "int4, blocks of 32": 2,
        "int8 KV cache": SPECULATOR.layers,
    }
    assert quality["calibration"] == "draft_vocab.txt: 512 tokens"
    assert quality["heldout"] == "heldout.jsonl: 256 tokens"
    assert quality["is_exact"] is True
    assert quality["max_kl"] is None
    assert 0 < quality["kl"] < quality["kl_p99"]
    assert 0.5 < quality["top1"] <= 1
    assert len(quality["divergence"]) == 8
    assert all(0 <= n <= quality["continuation_tokens"] for n in quality["divergence"])
    errors = [error for _, error, _ in quality["worst"]]
    assert errors == sorted(errors, reverse=True)
    assert {kind for _, _, kind in quality["worst"]} == {"weights"}  # of rtn, also where the cache was calibrated
    for side, folder in (("source", source), ("result", out)):
        found = quality[side]
        assert found["weights_sha256"] == open_bundle(folder).manifest.weights_sha256
        assert found["peak_rss_bytes"] > 1e6
        assert found["perplexity"] > 1
        for field in ("exit_agreement", "acceptance"):
            assert found[field].keys() == {"1", "3"}
            assert all(0 < share < 1 for share in found[field].values())
    assert quality["result"]["disk_bytes"] < quality["source"]["disk_bytes"]


def test_people_get_a_table(tiny_bundles: TinyBundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    capsys.readouterr()
    assert run(["quantize", str(tiny_bundles.bundle(BASE, 1)), str(out), "--weights", "int8", *SMALL]) == 0
    said = capsys.readouterr()
    assert without_progress(said.err) == ""
    for words in (
        "perplexity",
        "KL divergence",
        "drafts accepted, exit 1",
        "self-speculative = plain",
        "yes",
        str(out),
    ):
        assert words in said.out


def test_the_report_of_a_float16_copy_is_not_taken_for_that_of_what_is_made_of_it(
    tiny_bundles: TinyBundles, quantized: QuantizedBundles, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    assert (
        run(["quantize", str(tiny_bundles.bundle(BASE, 1)), str(half), "-r", "float", "--dtype", "fp16", *SMALL]) == 0
    )
    assert (half / names.QUALITY_FILE).is_file()
    assert not (quantized(half, preset(INT8)) / names.QUALITY_FILE).exists()


INT8_LAYERS = {names.layer_weight(layer, part): INT8 for layer in range(4) for part in LAYER_MATRICES}
VOCABULARY = (names.EMBED_TOKENS, names.LM_HEAD)


@pytest.mark.parametrize(
    ("options", "expected", "kv_cache", "dtype"),
    [
        (
            ("--preset", "int8", "--draft-head", "int8"),
            INT8_LAYERS | dict.fromkeys(VOCABULARY, INT8),
            "float",
            "float32",
        ),
        (("--recipe", "float", "--dtype", "fp16"), {}, "float", "float16"),
        (("-r", "float", "--kv-cache", "int8"), {}, "int8", "float32"),
        (
            ("-r", "float", "--weights", "int8", "--head", "int4", "--draft-head", "int4"),
            INT8_LAYERS | dict.fromkeys(VOCABULARY, INT4),
            "float",
            "float32",
        ),
        (
            ("-r", "float", "--kv-producers", "int8", "--block-size", "64", "--symmetric"),
            {names.layer_weight(layer, names.QKV_PROJ): BlockFormat(8, 64, True) for layer in range(4)},
            "float",
            "float32",
        ),
        (
            ("-r", "int4", "--method", "rtn", "--kv-cache", "float"),
            dict.fromkeys(INT8_LAYERS, INT4_OFFSETS) | dict.fromkeys(VOCABULARY, INT4),
            "float",
            "float32",
        ),
    ],
    ids=["int8", "fp16", "int8 cache", "single formats", "kv producers", "int4"],
)
def test_a_preset_has_three_spellings_and_options_change_it(
    tiny_bundles: TinyBundles,
    tmp_path: Path,
    options: tuple[str, ...],
    expected: dict[str, BlockFormat],
    kv_cache: KVType,
    dtype: DType,
) -> None:
    source, out = tiny_bundles.bundle(BASE, 1), tmp_path / "out"
    assert run(["quantize", str(source), str(out), *options, "--no-report", *SMALL]) == 0
    manifest = open_bundle(out, verify_hashes=True).manifest
    assert manifest.precision == Precision(expected, kv_cache)
    assert manifest.dtype == dtype
    assert names.QUALITY_FILE not in manifest.files
    load(out).generate(PROMPT, max_new_tokens=2)


# What is left when it dies


@pytest.mark.parametrize(
    ("module", "place"),
    [(bundle_writer, "describe_files"), (bundle_writer, "segment_model")],
    ids=["hashes", "graphs"],
)
@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "No space left on device"), 2),
        (RuntimeError("a bug"), None),
    ],
    ids=["interrupt", "disk", "bug"],
)
def test_a_quantization_that_dies_half_way_leaves_the_old_bundle_and_nothing_else(
    bundle: Path,
    sound: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    place: str,
    raised: BaseException,
    code: int | None,
) -> None:
    def fail(*_: object, **__: object) -> None:
        assert any(path.name.startswith(".") for path in tmp_path.iterdir()), "nothing is being written yet"
        raise raised

    before = open_bundle(bundle).manifest
    monkeypatch.setattr(module, place, fail)
    for out in (bundle, tmp_path / "new"):
        command = ["quantize", str(sound), str(out), "-r", "float", "--weights", "int8", "--overwrite", *SMALL]
        if code is None:
            with pytest.raises(RuntimeError):
                run(command)
        else:
            assert run(command) == code
    assert left_behind(tmp_path) == ["bundle"]
    after: Manifest = open_bundle(bundle, verify_hashes=True).manifest
    assert after == before
