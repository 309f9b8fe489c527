"""`shortstack export --preset`: from a checkpoint to blocks in one step, with the very weights of the two steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from helpers.adapters import lora
from helpers.bad_input import Refused, left_behind
from helpers.exit_nodes import write_random_exits
from helpers.families import EXITS, MadeFamily
from helpers.family_rows import ROWS
from helpers.gguf_files import Kind, byte_level, of_checkpoint, write
from helpers.kv_bundles import KVBundles
from helpers.kv_cases import exits_of
from helpers.quantized import INT4, INT4_OFFSETS, preset, stored_tensors
from helpers.straight import FEW, at_once, check_same, differing, in_two_steps, mix
from helpers.tiny_models import BASE, SPECULATOR, SWITCHES, TinyBundles
from shortstack.export.assemble import export_bundle
from shortstack.export.checkpoint import hf
from shortstack.export.cli import export
from shortstack.export.quantized import export_quantized
from shortstack.export.spec import ExportSpec
from shortstack.graphs import names
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.errors import RequestError
from shortstack.graphs.plan import ExitSpec
from shortstack.quant import source
from shortstack.quant.assemble import quantize_bundle
from shortstack.quant.cli import quantize
from shortstack.quant.record import read_record
from shortstack.quant.spec import Quantization, QuantizeSpec
from shortstack.runtime import DraftPolicy, load
from shortstack.runtime.inspection.report import build_report

TINY = {tiny.name: tiny for tiny in SWITCHES}
METHODS = ("rtn", "k-quant", "gptq", "awq")


def llama(name: str, tiny_bundles: TinyBundles, folder: Path, out: Path) -> ExportSpec:
    return ExportSpec(str(tiny_bundles.checkpoint(TINY[name])), out, (1, 3), draft_vocab=64)


def family(model_type: str, folder: Path, out: Path) -> ExportSpec:
    made = MadeFamily(next(row for row in ROWS if row.model_type == model_type), folder / model_type)
    return ExportSpec(str(made.checkpoint), out, EXITS)


def with_exits(tiny_bundles: TinyBundles, folder: Path, out: Path) -> ExportSpec:
    checkpoint = tiny_bundles.checkpoint(BASE)
    exits = (
        ExitSpec(1, 50, branch="block", norm="own", head="low_rank", head_rank=12, has_gate=True),
        ExitSpec(2, branch="linear", sees_token=True, sees_state=True),
        ExitSpec(3, branch="mlp", head="own"),
    )
    write_random_exits(checkpoint, folder / "exits", *exits)
    return ExportSpec(str(checkpoint), out, exits=folder / "exits")


def with_adapter(tiny_bundles: TinyBundles, folder: Path, out: Path) -> ExportSpec:
    checkpoint = tiny_bundles.checkpoint(BASE)
    return ExportSpec(str(checkpoint), out, (2,), adapter=lora(folder / "adapter", checkpoint))


def sharing(kv_bundles: KVBundles, folder: Path, out: Path) -> ExportSpec:
    kv_map = (0, 1, 2, 2, 2, 2)
    return ExportSpec(str(kv_bundles.checkpoint(kv_map)), out, exits_of(kv_map))


MODELS = ("untied", "tied", "Gemma 3", "Gemma 4", "trained exits", "shared K,V", "adapter", "odd sizes")


@pytest.fixture
def request_of(tiny_bundles: TinyBundles, kv_bundles: KVBundles, tmp_path: Path) -> Callable[[str], ExportSpec]:
    makers: dict[str, Callable[[Path, Path], ExportSpec]] = {
        "untied": partial(llama, "base", tiny_bundles),
        "tied": partial(llama, "tied", tiny_bundles),
        "odd sizes": partial(llama, "odd-sizes-tied", tiny_bundles),
        "Gemma 3": partial(family, "gemma3_text"),
        "Gemma 4": partial(family, "gemma4_text"),
        "trained exits": partial(with_exits, tiny_bundles),
        "shared K,V": partial(sharing, kv_bundles),
        "adapter": partial(with_adapter, tiny_bundles),
    }
    return lambda model: makers[model](tmp_path, tmp_path / "one")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_one_step_gives_the_weights_of_two_byte_for_byte(
    request_of: Callable[[str], ExportSpec], tmp_path: Path, model: str, method: str
) -> None:
    check_same(request_of(model), mix(method), tmp_path)


@pytest.mark.parametrize("model", MODELS)
def test_without_text_one_step_gives_the_weights_of_two_as_well(
    request_of: Callable[[str], ExportSpec], tmp_path: Path, model: str
) -> None:
    """Nothing runs then: every matrix is read by itself, vocabularies in slices."""
    check_same(request_of(model), mix("rtn", kv_cache="float"), tmp_path)


@pytest.mark.parametrize("kv_cache", ["float", "int8"])
def test_slices_of_a_vocabulary_are_put_together_again(
    request_of: Callable[[str], ExportSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv_cache: str
) -> None:
    request = request_of("Gemma 4")
    whole = at_once(replace(request, out=tmp_path / "whole"), mix("k-quant", kv_cache=kv_cache))
    monkeypatch.setattr(source, "SLICE_ROWS", 7)
    sliced = at_once(request, mix("k-quant", kv_cache=kv_cache))
    assert not differing(sliced, whole)


def test_a_vocabulary_is_never_read_as_a_whole(
    request_of: Callable[[str], ExportSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of("Gemma 4")
    monkeypatch.setattr(source, "SLICE_ROWS", 16)
    tensor = hf.HuggingFaceCheckpoint.tensor
    read: list[str] = []

    def watched(self: hf.HuggingFaceCheckpoint, name: str) -> Any:
        read.append(name)
        return tensor(self, name)

    monkeypatch.setattr(hf.HuggingFaceCheckpoint, "tensor", watched)
    at_once(request, mix("rtn"))
    assert read
    assert not [name for name in read if "embed_tokens" in name or "lm_head" in name]


def test_tables_of_token_embeddings_get_blocks(request_of: Callable[[str], ExportSpec]) -> None:
    bundle = open_bundle(at_once(request_of("Gemma 4"), mix("gptq")))
    spec, formats = bundle.manifest.spec, bundle.manifest.precision.weights
    tables = [names.layer_weight(layer, names.PER_LAYER_EMBED) for layer in range(spec.num_hidden_layers)]
    assert {formats[name] for name in tables} == {INT4}
    report = build_report(bundle)
    inside = [tensor for name, tensor in stored_tensors(bundle.folder).items() if name.startswith("model.layers.1.")]
    assert report.layers[1].weight_bytes == sum(int(np.prod(t.shape)) * t.dtype.itemsize for t in inside)


@pytest.mark.parametrize("model", ["untied", "Gemma 4", "trained exits"])
def test_what_it_writes_verifies_drafts_exactly(request_of: Callable[[str], ExportSpec], model: str) -> None:
    loaded = load(at_once(request_of(model), mix("gptq")))
    text = list(range(20, 44))
    options: Any = {"max_new_tokens": 20, "ignore_eos": True}
    plain = loaded.generate(text, **options)
    drafted = loaded.generate(text, strategy="self-speculative", draft=DraftPolicy(3), **options)
    assert len(plain.tokens) == 20
    assert drafted.tokens == plain.tokens


def test_fp16_is_rounded_from_the_checkpoint_and_not_from_fp16(
    request_of: Callable[[str], ExportSpec], tmp_path: Path
) -> None:
    request = request_of("untied")
    two = in_two_steps(request, mix("rtn"), tmp_path, "float16")
    one = at_once(replace(request, dtype="float16"), mix("rtn"))
    assert not differing(one, two)


def test_a_searched_mix_is_the_one_that_quantize_finds(request_of: Callable[[str], ExportSpec], tmp_path: Path) -> None:
    request, wanted = request_of("Gemma 4"), preset(INT4, "float", method="k-quant")
    export_bundle(replace(request, out=tmp_path / "floats"))
    options: dict[str, Any] = {"max_kl": 0.01, "calibration_tokens": FEW}
    quantize_bundle(QuantizeSpec(tmp_path / "floats", tmp_path / "two", wanted, **options))
    export_quantized(request, Quantization(wanted, **options))
    assert not differing(request.out, tmp_path / "two")


def test_both_commands_say_what_a_search_reached_and_chose_in_the_same_words(
    tiny_bundles: TinyBundles, tmp_path: Path
) -> None:
    options = ["--preset", "int4", "--kv-cache", "float", "--method", "rtn", "--calibration-tokens", "256", "--json"]
    source = {"export": tiny_bundles.checkpoint(BASE), "quantize": tiny_bundles.bundle(BASE, 1)}
    last = {"export": ["-e", "1"], "quantize": ["--no-report"]}
    found = {}
    for command in (export, quantize):
        name, out = str(command.name), tmp_path / str(command.name)
        arguments = [str(source[name]), str(out), *options, "--max-kl", "0.02", *last[name]]
        done = CliRunner().invoke(command, arguments)
        assert done.exit_code == 0, done.output
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("searched mix")]
        record = read_record(open_bundle(out))
        assert record is not None
        assert record.search is not None
        assert record.found()["search"] == json.loads(done.stdout)["search"]
        found[name] = line, record.search
    assert found["export"] == found["quantize"]
    line, search = found["export"]
    chosen = open_bundle(tmp_path / "export").manifest.precision.weights
    in_layers_and_ends = [f"int{f.bits}" for name, f in chosen.items() if not name.startswith("exits.")]
    assert 0 < search.kl <= 0.02
    assert search.matrices["int8"] == in_layers_and_ends.count("int8")
    assert sum(search.matrices.values()) == 2 + 5 * BASE.layers
    assert line.startswith(f"searched mix: KL divergence {search.kl:.2g} nats per token (asked: at most 0.02), on the ")
    assert all(f"{count} {name}" in line for name, count in search.matrices.items())


def test_a_report_can_be_made_later_against_an_export_of_floats(
    request_of: Callable[[str], ExportSpec], tmp_path: Path, refused: Refused
) -> None:
    from shortstack.quant.quality_report import make_report
    from shortstack.quant.spec import ReportSpec

    request = request_of("untied")
    at_once(request, mix("rtn"))
    export_bundle(replace(request, out=tmp_path / "floats"))
    quality = make_report(ReportSpec(tmp_path / "floats", request.out, heldout_tokens=128, prompts=1))
    assert quality.is_exact
    export_bundle(replace(request, out=tmp_path / "others", exit_layers=(2,), draft_vocab=None))
    refused(["quantize", tmp_path / "others", request.out, "--report-only"], "was not made from")


def test_the_command_says_how_large_the_errors_are(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    command = [str(tiny_bundles.checkpoint(BASE)), str(tmp_path / "out"), "-e", "1", "--preset", "int8", "--json"]
    done = CliRunner().invoke(export, command)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    record = read_record(open_bundle(tmp_path / "out"))
    assert record is not None
    assert record.source_weights_sha256 is None
    assert found["worst"][0] == list(record.worst(1)[0])
    assert f"rounded {len(record.errors)} matrices (rtn): " in done.stderr
    assert "% off the float weights in the middle; largest: " in done.stderr
    assert "outputs" not in done.stderr
    layers = [error for name, error in record.errors.items() if name.startswith("model.layers")]  # draft heads are int4
    assert layers
    assert all(0 < error < 0.02 for error in layers)


def test_errors_of_outputs_and_errors_of_weights_are_told_apart(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    checkpoint = tiny_bundles.checkpoint(BASE)
    write_random_exits(checkpoint, tmp_path / "exits", ExitSpec(1, branch="linear"), ExitSpec(3, 50))
    command = [str(checkpoint), str(tmp_path / "out"), "--exits", str(tmp_path / "exits"), "--preset", "int4"]
    done = CliRunner().invoke(export, [*command, "--calibration-tokens", str(FEW)])
    assert done.exit_code == 0, done.output
    record = read_record(open_bundle(tmp_path / "out"))
    assert record is not None
    without_text = {"exits.1.linear.weight", names.EMBED_TOKENS}  # the last is untied, and looked up
    assert {name for name in record.errors if record.error_of(name) == "weights"} == without_text
    outputs, weights = (line for line in done.stderr.splitlines() if line.startswith("rounded"))
    assert outputs.startswith(f"rounded {len(record.errors) - 2} matrices (gptq): ")
    assert "% off the float outputs on the calibration text in the middle; largest: " in outputs
    assert weights.startswith("rounded 2 matrices (gptq): ")
    assert "% off the float weights in the middle" in weights


def test_the_older_spelling_names_the_same_preset(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    checkpoint = str(tiny_bundles.checkpoint(BASE))
    for option in ("--preset", "--recipe"):
        done = CliRunner().invoke(export, [checkpoint, str(tmp_path / option), option, "int8"])
        assert done.exit_code == 0, done.output
    assert not differing(tmp_path / "--preset", tmp_path / "--recipe")


@pytest.mark.parametrize("method", ["rtn", "awq-gptq"])
def test_kept_blocks_stay_and_everything_else_is_rounded_by_the_preset(
    tiny_bundles: TinyBundles, tmp_path: Path, method: str
) -> None:
    tiny = replace(SPECULATOR, name="speculator-padded", head_dim=24, is_tied=True)  # padded: o_proj cannot be kept
    tensors = of_checkpoint(tiny_bundles.checkpoint(tiny), tiny.layers)
    file = write(tmp_path / "m.gguf", tensors, edit=byte_level, quantization=Kind["Q8_0"], tiny=tiny)
    request = ExportSpec(str(file), tmp_path / "one", (1, 3), 64, keep_blocks=True)
    export_bundle(replace(request, out=tmp_path / "kept"))
    wanted = mix(method, draft_head="as head")
    one, kept = open_bundle(at_once(request, wanted)), open_bundle(tmp_path / "kept")
    formats, before = one.manifest.precision.weights, kept.manifest.precision.weights
    own = [name for name in before if name.endswith("o_proj.weight")]
    assert len(own) == tiny.layers
    assert {formats[name] for name in own} <= {INT4_OFFSETS, INT4}
    others = {name: block_format for name, block_format in before.items() if name not in own}
    assert {name: formats[name] for name in others} == others
    assert formats.keys() == before.keys()
    origins = one.manifest.origins
    assert {name for name, origin in origins.items() if not origin.is_kept} == set(own)
    assert all(origins[name].error > 0.01 for name in own)
    assert {origins[name].error_of for name in own} == {"weights" if method == "rtn" else "outputs"}
    assert all(origins[name].error == 0 for name in others if name in origins)
    ours, theirs = stored_tensors(one.folder), stored_tensors(kept.folder)
    for name in others:
        for part in (names.block_codes(name), names.block_scales(name)):
            assert ours[part].read(one.folder).tobytes() == theirs[part].read(kept.folder).tobytes(), part
    model, text = load(one.folder), list(range(20, 44))
    plain = model.generate(text, max_new_tokens=20, ignore_eos=True)
    drafted = model.generate(
        text, max_new_tokens=20, ignore_eos=True, strategy="self-speculative", draft=DraftPolicy(3)
    )
    assert drafted.tokens == plain.tokens


def test_a_search_leaves_kept_blocks_alone(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    tensors = of_checkpoint(tiny_bundles.checkpoint(SPECULATOR), SPECULATOR.layers)
    file = write(tmp_path / "m.gguf", tensors, edit=byte_level, quantization=Kind["Q8_0"], tiny=SPECULATOR)
    request = ExportSpec(str(file), tmp_path / "one", (1,), keep_blocks=True)
    kept = export_quantized(request, Quantization(mix("rtn"), calibration_tokens=FEW, max_kl=0.5))
    assert kept.manifest.precision.weights
    assert all(origin.is_kept for origin in kept.manifest.origins.values())


@pytest.mark.parametrize("max_kl", [None, 0.1])
def test_room_is_looked_at_before_the_checkpoint_is_hashed_or_a_mix_is_searched(
    request_of: Callable[[str], ExportSpec], monkeypatch: pytest.MonkeyPatch, max_kl: float | None
) -> None:
    from shortstack.quant import engine, needs

    def never(*arguments: Any, **others: Any) -> Any:
        raise AssertionError("long work was begun")

    monkeypatch.setattr(needs, "_free_bytes", lambda folder: 1000)
    monkeypatch.setattr(hf.HuggingFaceCheckpoint, "digest", never)
    monkeypatch.setattr(engine, "search", never)
    with pytest.raises(RequestError, match="not enough room"):
        export_quantized(request_of("untied"), Quantization(mix("rtn"), calibration_tokens=FEW, max_kl=max_kl))


@pytest.mark.parametrize("what", ["disk", "memory"])
def test_too_little_room_is_refused_with_what_is_needed_and_what_is_there(
    request_of: Callable[[str], ExportSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    from shortstack.quant import needs

    request = request_of("untied")
    before = left_behind(tmp_path)
    if what == "disk":
        monkeypatch.setattr(needs, "_free_bytes", lambda folder: 1000)
    else:
        monkeypatch.setattr(needs, "available_memory", lambda: 10**8)
    with pytest.raises(RequestError, match=r"found [\d.]+ (MB free|GB available), expected about [\d.]+ [MG]B"):
        at_once(request, mix("rtn"))
    assert left_behind(tmp_path) == before
