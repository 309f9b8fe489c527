"""A damaged checkpoint gives one line with the file, the field and a remedy, and exit code 2."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers.bad_input import Refused, edit_json, left_behind
from helpers.tiny_models import BASE, TinyBundles
from shortstack.__main__ import run
from shortstack.export.assemble import export_bundle
from shortstack.export.spec import DEFAULT_LONGEST, LONGEST, ExportSpec
from shortstack.graphs.bundle import open_bundle
from shortstack.graphs.errors import (
    CheckpointError,
    UnsupportedError,
)


def edit_tensors(checkpoint: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


DOWN = "model.layers.2.mlp.down_proj.weight"
TENSOR_EDITS: dict[str, tuple[Callable[[dict[str, np.ndarray]], object], tuple[str, ...]]] = {
    "missing": (lambda t: t.pop(DOWN), ("1 missing", DOWN, "Check that weights and config belong")),
    "extra": (
        lambda t: t.update({"model.layers.2.router.weight": np.zeros((2, 2), np.float32)}),
        ("1 extra", "model.layers.2.router.weight", "Check that weights and config belong"),
    ),
    "rotary divisors that the config does not know": (
        lambda t: t.update({"rope_freqs.weight": np.full(8, 2, np.float32)}),
        ("1 extra", "rope_freqs.weight"),
    ),
    "misshapen": (
        lambda t: t.update({DOWN: np.zeros((64, 95), np.float32)}),
        ("1 misshapen", f"{DOWN} is [64, 95], not [64, 96]"),
    ),
    "everything": (
        lambda t: t.update({"a": t.pop("model.norm.weight"), DOWN: t["lm_head.weight"]}),
        ("1 missing", "1 extra", "1 misshapen"),
    ),
    "headless": (lambda t: t.pop("lm_head.weight"), ("lm_head.weight", "tie_word_embeddings")),
}


@pytest.mark.parametrize("case", TENSOR_EDITS)
def test_tensors_that_do_not_fit_the_config_are_listed(
    checkpoint: Path, tmp_path: Path, refused: Refused, case: str
) -> None:
    edit, says = TENSOR_EDITS[case]
    edit_tensors(checkpoint, edit)
    refused(["export", checkpoint, tmp_path / "out", "-e", 2], str(checkpoint), *says)
    assert left_behind(tmp_path) == ["checkpoint"]
    with pytest.raises(CheckpointError):
        export_bundle(ExportSpec(str(checkpoint), tmp_path / "out", (2,)))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model_type": "mamba"}, ("config.json: model_type", "'mamba'", "llama")),
        ({"model_type": None}, ("config.json: model_type is missing",)),
        ({"hidden_act": "gelu"}, ("config.json: hidden_act", "silu")),
        ({"num_hidden_layers": "4"}, ("config.json: num_hidden_layers", "'4'", "an integer")),
        ({"num_key_value_heads": 3}, ("config.json: num_key_value_heads", "divisor")),
        ({"rope_parameters": {"rope_type": "ntk", "factor": 2.0}}, ("rope_type", "'ntk'")),
        ({"rms_norm_eps": math.nan}, ("config.json: rms_norm_eps",)),
    ],
)
def test_a_config_that_cannot_be_exported_is_refused_by_file_and_field(
    checkpoint: Path, tmp_path: Path, refused: Refused, fields: dict[str, Any], says: tuple[str, ...]
) -> None:
    edit_json(checkpoint / "config.json", **fields)
    refused(["export", checkpoint, tmp_path / "out"], *says)
    assert left_behind(tmp_path) == ["checkpoint"]


def test_an_unknown_architecture_is_unsupported_but_not_damaged(checkpoint: Path, tmp_path: Path) -> None:
    edit_json(checkpoint / "config.json", model_type="qwen9")
    with pytest.raises(UnsupportedError, match="model_type"):
        export_bundle(ExportSpec(str(checkpoint), tmp_path / "out"))


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("config.json", ("config.json",)),
        ("model.safetensors", ("no weights", "model.safetensors")),
        ("tokenizer.json", ("tokenizer.json", "Save it next to the weights")),
    ],
)
def test_a_missing_checkpoint_file_is_named(
    checkpoint: Path, tmp_path: Path, refused: Refused, file: str, says: tuple[str, ...]
) -> None:
    (checkpoint / file).unlink()
    refused(["export", checkpoint, tmp_path / "out", "-e", 1], *says)
    assert left_behind(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_truncated_checkpoint_file_is_named(
    checkpoint: Path, tmp_path: Path, refused: Refused, file: str, share: float
) -> None:
    content = (checkpoint / file).read_bytes()
    (checkpoint / file).write_bytes(content[: int(share * len(content))])
    refused(["export", checkpoint, tmp_path / "out", "-e", 1, "--draft-vocab", 64], file)
    assert left_behind(tmp_path) == ["checkpoint"]


def test_a_truncated_gguf_file_is_named(smollm2_gguf: Path, tmp_path: Path, refused: Refused) -> None:
    with smollm2_gguf.open("rb") as whole:
        for size in (0, 100, 1 << 20, 40 << 20):
            (tmp_path / "model.gguf").write_bytes(whole.read(size))
            whole.seek(0)
            refused(["export", tmp_path / "model.gguf", tmp_path / "out", "-e", 4], "model.gguf")
    assert left_behind(tmp_path) == ["model.gguf"]


class Bomb:
    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._file,)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "model.pt"]
)
def test_a_pickle_is_refused_and_never_executed(checkpoint: Path, tmp_path: Path, refused: Refused, name: str) -> None:
    boom = tmp_path / "boom"
    pickle.loads(pickle.dumps(Bomb(boom)))
    assert boom.is_file(), "the bomb does not work"
    boom.unlink()
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / name).write_bytes(pickle.dumps(Bomb(boom)))
    refused(["export", checkpoint, tmp_path / "out", "-e", 1], str(checkpoint), name, "safe_serialization")
    refused(["export", checkpoint / name, tmp_path / "out", "-e", 1], name)
    assert left_behind(tmp_path) == ["checkpoint"]


def test_parity_never_executes_a_pickle_either(
    checkpoint: Path, tiny_bundles: TinyBundles, tmp_path: Path, refused: Refused
) -> None:
    boom = tmp_path / "boom"
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(boom)))
    refused(["parity", checkpoint, tiny_bundles.bundle(BASE, 2), "--greedy-tokens", 0], str(checkpoint))
    assert not boom.exists()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("no/such/folder", "does not exist"),
        ("nowhere.gguf", "does not exist"),
        ("", "has no config.json"),
        ("readme.txt", "is a file"),
    ],
)
def test_a_checkpoint_that_does_not_exist_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused, source: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("readme.txt").write_text("hello")
    refused(["export", source, "out", "-e", 1], says)
    assert left_behind(tmp_path) == ["readme.txt"]


# Export options that are not valid


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("-e", 0), ("--exit-layer", "found 0", "1..3", "Choose a depth")),
        (("-e", 4), ("--exit-layer", "found 4", "1..3", "Choose a depth")),
        (("-e", 400), ("--exit-layer", "found 400", "1..3")),
        (("-e", -1), ("--exit-layer", "found -1", "1..3")),
        (("-e", 2, "-e", 2), ("--exit-layer", "[2, 2]", "Give each depth once")),
        (("-e", 1, "--draft-vocab", 1), ("--draft-vocab", "found 1", "2..300")),
        (("-e", 1, "--draft-vocab", 301), ("--draft-vocab", "found 301", "2..300")),
        (("-e", 1, "--draft-vocab", -5), ("--draft-vocab", "found -5", "2..300")),
        (("--draft-vocab", 64), ("--draft-vocab", "Add --exit-layer E")),
        (("-e", 1, "--draft-text", "some.txt"), ("--draft-text", "Add --draft-vocab N")),
        (("-e", 1, "--draft-vocab", 64, "--draft-text", "no.txt"), ("--draft-text no.txt", "UTF-8 text file")),
        (("-e", 1, "--draft-vocab", 64, "--draft-text", "empty.txt"), ("--draft-text empty.txt is empty", "Give")),
        (("-e", 1, "--draft-vocab", 64, "--draft-text", "latin.txt"), ("--draft-text latin.txt", "UTF-8")),
        (("--max-length", 1), ("--max-length", "found 1", "2 or more")),
        (("--max-length", 1025), ("--max-length", "found 1025", "max_position_embeddings = 1024")),
    ],
)
def test_options_that_do_not_fit_the_model_are_named(
    tiny_bundles: TinyBundles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Refused,
    options: tuple[str | int, ...],
    says: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text(" \n\n")
    Path("latin.txt").write_bytes("café".encode("latin-1"))
    refused(["export", tiny_bundles.checkpoint(BASE), "out", *map(str, options)], *says)
    assert left_behind(tmp_path) == ["empty.txt", "latin.txt"]


def test_weights_too_large_for_float16_are_named_and_nothing_is_written(
    checkpoint: Path, tmp_path: Path, refused: Refused
) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors[DOWN].__setitem__((0, 0), 1e6))
    refused(["export", checkpoint, tmp_path / "out", "--dtype", "fp16"], "down_proj", "1e+06", "--dtype fp32")
    assert left_behind(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [DOWN, "model.norm.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite_are_counted_and_named(
    checkpoint: Path, tmp_path: Path, refused: Refused, name: str, value: float
) -> None:
    def damage(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name].reshape(-1)[[7, 11]] = value

    edit_tensors(checkpoint, damage)
    size = int(np.prod(load_file(checkpoint / "model.safetensors")[name].shape))
    refused(["export", checkpoint, tmp_path / "out", "-e", 1], f"tensor {name}", f"in 2 of {size} values")
    assert left_behind(tmp_path) == ["checkpoint"]


QUANTIZED: dict[str, tuple[dict[str, Any], str]] = {
    "mxfp4": ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, "mxfp4"),
    "hqq": ({"quant_method": "hqq", "nbits": 4}, "hqq to 4 bit"),
    "quanto": ({"quant_method": "quanto", "weights": "int8"}, "quanto"),
    "torchao": ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "torchao"),
    "exl2": ({"quant_method": "exl2", "bits": 4}, "exl2 to 4 bit"),
    "auto-round": ({"quant_method": "auto-round", "bits": 4}, "auto-round to 4 bit"),
    "modelopt": ({"quant_algo": "NVFP4"}, "NVFP4"),
    "no name": ({"bits": 3}, "what quantization_config describes to 3 bit"),
    "a name that is a number": ({"quant_method": 7}, "7"),
}


@pytest.mark.parametrize("tool", QUANTIZED)
def test_a_quantized_checkpoint_is_refused_by_the_name_of_its_tool(
    checkpoint: Path, tmp_path: Path, refused: Refused, tool: str
) -> None:
    section, says = QUANTIZED[tool]
    edit_json(checkpoint / "config.json", quantization_config=section)
    error = refused(["export", checkpoint, tmp_path / "out", "-e", 1], f"is quantized by {says}", "shortstack quantize")
    assert "model.layers" not in error


@pytest.mark.parametrize(
    ("suffix", "tool"),
    [
        ("weight.absmax", "bitsandbytes"),
        ("qweight", "GPTQ or AWQ"),
        ("weight_packed", "compressed-tensors"),
        ("weight_scale_inv", "fp8"),
    ],
)
def test_a_quantized_checkpoint_whose_config_does_not_say_so_is_known_by_its_tensors(
    checkpoint: Path, tmp_path: Path, refused: Refused, suffix: str, tool: str
) -> None:
    stem = DOWN.removesuffix("weight")
    edit_tensors(checkpoint, lambda tensors: tensors.update({f"{stem}{suffix}": np.zeros(4, np.float32)}))
    refused(["export", checkpoint, tmp_path / "out", "-e", 1], f"tensors as {tool} writes them", "quantization_config")


def test_the_default_context_of_a_bundle_is_bounded_and_said(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_json(checkpoint / "config.json", max_position_embeddings=10**9)
    assert run(["export", str(checkpoint), str(tmp_path / "out"), "-e", "1"]) == 0
    said = capsys.readouterr().err
    assert "warning: the model's context is 1000000000 tokens, the bundle's 131072; --max-length asks for more" in said
    assert open_bundle(tmp_path / "out").manifest.max_length == DEFAULT_LONGEST


def test_a_context_that_no_memory_holds_is_refused(checkpoint: Path, tmp_path: Path, refused: Refused) -> None:
    edit_json(checkpoint / "config.json", max_position_embeddings=10**9)
    refused(["export", checkpoint, tmp_path / "out", "--max-length", 10**9], "--max-length", f"at most {LONGEST}")
