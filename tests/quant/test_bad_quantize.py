"""A quantization that cannot work is refused: one line that says what is wrong, exit code 2, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from helpers.bad_input import Refused, edit_json, left_behind
from helpers.quantized import INT4, INT8, QuantizedBundles, preset, stored_tensors
from shortstack.__main__ import run
from shortstack.graphs import manifest, names
from shortstack.graphs.bundle import describe_files, open_bundle, write_manifest
from shortstack.graphs.errors import BundleError, RequestError
from shortstack.graphs.precision import BlockFormat
from shortstack.quant.assemble import quantize_bundle
from shortstack.quant.presets import PRESETS
from shortstack.quant.spec import QuantizeSpec

RefusedQuantize = Callable[..., str]


@pytest.fixture
def refuses(sound: Path, tmp_path: Path, refused: Refused) -> RefusedQuantize:
    """Quantizes a bundle with options that must be refused, and looks for what was left."""

    def refuses(options: list[str | Path], *says: str, bundle: Path = sound, out: Path | None = None) -> str:
        before = left_behind(tmp_path)
        error = refused(["quantize", bundle, out or tmp_path / "out", *options], *says)
        assert left_behind(tmp_path) == before
        return error

    return refuses


@pytest.mark.parametrize("kv_cache", ["float", "int8"])
def test_a_bundle_that_is_quantized_already_is_named(
    sound: Path, quantized: QuantizedBundles, refuses: RefusedQuantize, kv_cache: str
) -> None:
    weights = None if kv_cache == "int8" else INT8
    small = quantized(sound, preset(weights, "int8" if kv_cache == "int8" else "float"))
    for options in ([], ["-r", "float", "--dtype", "fp16"]):
        refuses(options, str(small), "quantized already", f"cache of {kv_cache}", "made from", bundle=small)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--preset", "int3"], ("--preset is unknown", "'int3'", *PRESETS)),
        (["--calibration-tokens", "31"], ("--calibration-tokens", "found 31", "at least 32")),
        (["--heldout-tokens", "0"], ("--heldout-tokens", "found 0", "at least 32")),
        (["--max-kl", "0"], ("--max-kl", "found 0", "above 0")),
        (["--max-kl", "-0.1"], ("--max-kl", "found -0.1", "above 0")),
        (["--max-kl", "nan"], ("--max-kl", "found nan", "above 0")),
        (["--max-kl", "inf"], ("--max-kl", "found inf", "above 0")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_that_means_nothing_is_named(
    refuses: RefusedQuantize, options: list[str | Path], says: tuple[str, ...]
) -> None:
    refuses(options, *says)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--method", "rounding", "gptq"),
        ("--weights", "int2", "int4"),
        ("--head", "fp8", "float"),
        ("--kv-cache", "int4", "int8"),
        ("--block-size", "48", "32"),
        ("--dtype", "bf16", "fp16"),
        ("--calibration-tokens", "many", "integer"),
        ("--max-kl", "little", "float"),
    ],
)
def test_a_value_that_is_none_of_the_choices_is_named(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, says: str
) -> None:
    assert run(["quantize", str(sound), str(tmp_path / "out"), option, value]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    for words in (f"'{option}'", f"'{value}'", says):
        assert words in said.err.splitlines()[-1]
    assert left_behind(tmp_path) == []


# Texts


TEXTS: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "empty": ("text.txt", b"", ("is empty", "some thousand words")),
    "blank": ("text.txt", b" \n\n\t\n", ("is empty",)),
    "empty jsonl": ("text.jsonl", b"\n", ("is empty",)),
    "binary": ("text.txt", b"\x7fELF\xff\xfe\x00\x01" * 99, ("is not UTF-8 text", "UTF-8 text or jsonl")),
    "binary jsonl": ("text.jsonl", b"\x80\x81", ("is not UTF-8 text", "UTF-8 text or jsonl")),
    "short": ("text.txt", b"too short", ("is too short", "at least 32", "longer text")),
    "short jsonl": ("text.jsonl", b'{"text": "too short"}\n', ("is too short", "at least 32")),
    "no json": ("text.jsonl", b'{"text": "fine"}\n\nfine\n', ("line 3 is not valid JSON", '"text"')),
    "cut json": ("text.jsonl", b'{"text": "fine"}\n{"text": "fi', ("line 2 is not valid JSON",)),
    "no text": ("text.jsonl", b'{"text": "fine"}\n{"content": "fine"}\n', ("line 2", "content", '"messages"')),
    "text of another type": ("text.jsonl", b'{"text": ["fine"]}\n', ("line 1", '"text" (a string)')),
    "no messages": ("text.jsonl", b'{"messages": []}\n', ("line 1", '"messages"')),
    "messages of another type": ("text.jsonl", b'{"messages": [{"role": "user"}]}\n', ("line 1", '"messages"')),
    "a list": ("text.jsonl", b"[]\n", ("line 1", "found []")),
}


@pytest.mark.parametrize("option", ["--calibration", "--heldout"])
@pytest.mark.parametrize("case", TEXTS)
def test_a_text_that_is_none_is_named_before_any_work(
    refuses: RefusedQuantize, tmp_path: Path, option: str, case: str
) -> None:
    name, content, says = TEXTS[case]
    file = tmp_path / name
    file.write_bytes(content)
    refuses([option, file], option, str(file), *says)


@pytest.mark.parametrize("option", ["--calibration", "--heldout"])
def test_a_text_that_is_not_there_is_named(refuses: RefusedQuantize, tmp_path: Path, option: str) -> None:
    for path in (tmp_path / "missing.txt", tmp_path):
        refuses([option, path], option, str(path), "cannot be read")


# Bundles


@pytest.mark.parametrize("version", [0, 99])
def test_a_bundle_of_another_format_version_is_named(bundle: Path, refuses: RefusedQuantize, version: int) -> None:
    path = bundle / names.MANIFEST_FILE
    edit_json(path, format_version=version)
    edit_json(path, digest=manifest._digest(json.loads(path.read_text(encoding="utf-8"))))
    refuses([], "format_version", f"found {version}", "expected 1 or 2 or 3", "install the shortstack", bundle=bundle)


@pytest.mark.parametrize("file", ["weights.data", "layers-01-03.onnx", "tokenizer.json"])
def test_a_damaged_bundle_is_named(bundle: Path, refuses: RefusedQuantize, file: str) -> None:
    (bundle / file).unlink()
    refuses([], str(bundle), f"{file} is missing", bundle=bundle)


@pytest.mark.parametrize("file", ["layers-01-03.onnx", "tokenizer.json"])
def test_a_file_that_is_garbage_is_named(bundle: Path, refuses: RefusedQuantize, file: str) -> None:
    (bundle / file).write_bytes(b"{" * (bundle / file).stat().st_size)
    refuses([], file, bundle=bundle)


def test_a_tensor_in_another_file_is_not_followed(bundle: Path, refuses: RefusedQuantize) -> None:
    graph = bundle / "layers-00-01.onnx"
    content = graph.read_bytes()
    assert b"weights.data" in content
    graph.write_bytes(content.replace(b"weights.data", b"../../passwd"))
    refuses([], str(graph), "lies in another file", "'../../passwd'", bundle=bundle)


@pytest.mark.parametrize("method", ["rtn", "gptq", "hqq"])
@pytest.mark.parametrize(
    ("name", "file"),
    [
        (names.EMBED_TOKENS, "layers-00-01.onnx"),
        (names.layer_weight(0, "attn.qkv_proj.weight"), "layers-00-01.onnx"),
        (names.layer_weight(1, "post_attention_norm.weight"), "layers-01-03.onnx"),
        (names.layer_weight(3, "mlp.down_proj.weight"), "layers-03-04.onnx"),
        (names.FINAL_NORM, "layers-03-04.onnx"),
        (names.LM_HEAD, "layers-03-04.onnx"),
        (names.rope_table(0, "cos"), "layers-00-01.onnx"),
        (names.exit_weight(1, "head.weight"), "layers-00-01.onnx"),
        (names.exit_weight(3, "head.ids"), "layers-01-03.onnx"),
    ],
)
def test_a_graph_without_a_tensor_is_named_with_the_tensor(
    bundle: Path, refuses: RefusedQuantize, name: str, file: str, method: str
) -> None:
    for graph in bundle.glob("*.onnx"):
        graph.write_bytes(graph.read_bytes().replace(name.encode(), name[:-1].encode() + b"!"))
    says = (f"{file} has no tensor {name} in", f"{name[:-1]}!", "Copy the bundle again")
    refuses(["--method", method, "--no-report"], *says, bundle=bundle)


def change(bundle: Path, file: str, edit: Callable[[TensorProto], object]) -> None:
    """Edit each tensor of a graph, and write the size and hash that fit."""
    graph = onnx.load_model(bundle / file, load_external_data=False)
    for tensor in graph.graph.initializer:
        edit(tensor)
    (bundle / file).write_bytes(graph.SerializeToString())
    write_manifest(bundle, replace(open_manifest(bundle), files=describe_files(bundle)))


def open_manifest(bundle: Path) -> manifest.Manifest:
    return manifest.read_manifest(bundle / names.MANIFEST_FILE)


def test_tensors_of_another_shape_are_named_all_at_once(bundle: Path, refuses: RefusedQuantize) -> None:
    """[64, 128] for [128, 64]: as many bytes, and another matrix."""
    turned = [names.layer_weight(1, "attn.qkv_proj.weight"), names.layer_weight(2, "mlp.down_proj.weight")]

    def turn(tensor: TensorProto) -> None:
        if tensor.name in turned:
            tensor.dims[:] = tensor.dims[::-1]

    change(bundle, "layers-01-03.onnx", turn)
    says = (
        "layers-01-03.onnx: tensor model.layers.1.attn.qkv_proj.weight: found float32 [128, 64], not float32 [64, 128]",
        "tensor model.layers.2.mlp.down_proj.weight: found float32 [64, 96], not float32 [96, 64]",
        "Copy the bundle again",
    )
    refuses(["--method", "rtn", "--no-report"], *says, bundle=bundle)


def test_many_missing_tensors_are_counted(bundle: Path, refuses: RefusedQuantize) -> None:
    change(bundle, "layers-01-03.onnx", lambda tensor: setattr(tensor, "name", f"x{tensor.name}"))
    error = refuses([], "layers-01-03.onnx has no tensor model.layers.1.input_norm.weight", "more", bundle=bundle)
    assert len(error) < 1200


@pytest.mark.parametrize(
    ("kind", "says"),
    [(TensorProto.UNDEFINED, "a type of numbers"), (TensorProto.INT32, "found int32 [64], not float32")],
)
def test_a_tensor_of_another_type_is_named(
    bundle: Path, refuses: RefusedQuantize, kind: TensorProto.DataType, says: str
) -> None:
    name = names.layer_weight(1, "post_attention_norm.weight")

    def retype(tensor: TensorProto) -> None:
        if tensor.name == name:
            tensor.data_type = kind

    change(bundle, "layers-01-03.onnx", retype)
    refuses([], "layers-01-03.onnx", f"tensor {name}", says, bundle=bundle)


def test_a_folder_that_is_not_a_bundle_is_named(tmp_path: Path, refuses: RefusedQuantize) -> None:
    refuses([], str(tmp_path / "nowhere"), "does not exist", bundle=tmp_path / "nowhere")
    refuses([], str(tmp_path), "bundle.json", bundle=tmp_path)


# Output


def test_an_output_that_is_in_the_way_is_never_touched(tmp_path: Path, refuses: RefusedQuantize) -> None:
    file, folder, link = tmp_path / "file", tmp_path / "folder", tmp_path / "link"
    file.write_text("keep me")
    folder.mkdir()
    (folder / "thesis.tex").write_text("keep me")
    link.symlink_to(tmp_path / "nowhere")
    for options in ([], ["--overwrite"]):
        refuses(options, str(file), "not a folder", "another name", out=file)
        refuses(options, str(folder), "other files", "another name", out=folder)
        refuses(options, str(link), "another name", out=link)
        refuses(options, str(file), "another folder", out=file / "out")
    assert file.read_text() == (folder / "thesis.tex").read_text() == "keep me"


def test_a_bundle_is_never_quantized_onto_itself(bundle: Path, tmp_path: Path, refuses: RefusedQuantize) -> None:
    refuses([], "already holds a bundle", "--overwrite", bundle=bundle, out=bundle)
    again = tmp_path / "again"
    again.symlink_to(bundle)
    for source, out in ((bundle, bundle), (bundle, tmp_path / "other" / ".." / "bundle"), (again, bundle)):
        refuses(["--overwrite"], "bundle to be quantized", "another output folder", bundle=source, out=out)
    open_bundle(bundle, verify_hashes=True)


# Presets that no command line writes


@pytest.mark.parametrize("layer", [4, -5, 99])
def test_a_layer_that_the_model_does_not_have_is_named(sound: Path, tmp_path: Path, layer: int) -> None:
    mix = preset(INT4, layers={0: INT8, layer: INT8})
    with pytest.raises(RequestError, match=rf"preset test names a layer .* found \[{layer}\], expected 4 layers"):
        quantize_bundle(QuantizeSpec(sound, tmp_path / "out", mix))
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("part", ["head", "embedding", "draft_head"])
def test_a_head_with_offsets_is_refused(part: str) -> None:
    with pytest.raises(RequestError, match=rf"format of {part}: found int4 with offsets, blocks of 32"):
        preset(INT4, **{part: BlockFormat(4, has_offsets=True)})


def test_an_unknown_method_of_a_preset_is_named(sound: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--method is unknown: found 'magic', expected one of rtn"):
        quantize_bundle(QuantizeSpec(sound, tmp_path / "out", preset(INT4, method="magic")))
    assert left_behind(tmp_path) == []


def test_a_value_that_float16_does_not_hold_is_named(
    bundle: Path, tmp_path: Path, quantized: QuantizedBundles, refuses: RefusedQuantize
) -> None:
    norm = stored_tensors(bundle)[names.FINAL_NORM]
    values = norm.read(bundle)
    values[0] = 1e6
    norm.write(bundle, values)
    refuses(["-r", "float", "--dtype", "fp16", "--no-report"], names.FINAL_NORM, "1e+06", "float16", bundle=bundle)
    with pytest.raises(BundleError):
        open_bundle(tmp_path / "out")


@pytest.mark.parametrize("preset_name", ["int4", "int8", "float"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        (names.layer_weight(1, "mlp.down_proj.weight"), float("nan")),
        (names.layer_weight(0, "attn.qkv_proj.weight"), float("inf")),
        (names.layer_weight(2, "input_norm.weight"), float("-inf")),
        (names.FINAL_NORM, float("nan")),
        (names.EMBED_TOKENS, float("nan")),
        (names.LM_HEAD, float("inf")),
    ],
)
def test_weights_that_are_no_numbers_are_named_and_counted(
    bundle: Path, refuses: RefusedQuantize, name: str, value: float, preset_name: str
) -> None:
    tensor = stored_tensors(bundle)[name]
    values = tensor.read(bundle)
    values.reshape(-1)[[0, 3]] = value
    tensor.write(bundle, values)
    options: list[str | Path] = ["-r", preset_name, "--no-report", "--kv-cache", "float"]
    refuses(options, f"tensor {name}", f"found NaN or infinity in 2 of {values.size} values", bundle=bundle)


@pytest.mark.parametrize(
    ("value", "dtype", "says"),
    [(3e38, "fp32", "in blocks: its "), (3e6, "fp16", ".scales does not fit float16")],
)
@pytest.mark.parametrize("method", ["rtn", "gptq", "hqq"])
def test_weights_that_no_grid_holds_are_refused_by_the_name_of_their_matrix(
    bundle: Path, refuses: RefusedQuantize, value: float, dtype: str, says: str, method: str
) -> None:
    """A block from -3e38 to 3e38 is wider than a float; one to 3e6 has a scale that float16 does not hold."""
    name = names.layer_weight(1, "mlp.down_proj.weight")
    tensor = stored_tensors(bundle)[name]
    values = tensor.read(bundle)
    values[0, 0], values[1, 0] = -value, value  # stored [in, out]: two weights of one row
    tensor.write(bundle, values)
    quick = ["--calibration-tokens", "64", "--no-report", "--tuning", "ignore", "--kv-cache", "float"]
    options: list[str | Path] = ["--method", method, "--dtype", dtype, *quick]
    refuses(options, name, says, bundle=bundle)
