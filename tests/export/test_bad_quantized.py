"""Quantized folders that contradict themselves are refused: one line names file, field, what was found and expected."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.bad_input import Refused, left_behind
from helpers.quantized_float_folders import bitsandbytes, fp8
from helpers.quantized_folders import Scheme, awq, compressed, gptq, write_quantized
from helpers.tiny_models import TinyModel
from shortstack.export.checkpoint import open_checkpoint
from shortstack.export.checkpoint.quantized import METHODS

MODEL = TinyModel("to-damage", layers=2, hidden=128, intermediate=256, heads=4, kv_heads=2, head_dim=32)
SCHEMES: dict[str, Scheme] = {
    "gptq": gptq(4, 64),
    "asymmetric": gptq(4, 64, symmetric=False),
    "act-order": gptq(4, 64, act_order=True),
    "mixed": gptq(4, 64, own_bits={"down_proj": 8}),
    "awq": awq(64),
    "compressed": compressed(4, 64, symmetric=False),
    "reordered": compressed(4, 64, act_order=True),
    "bytes": compressed(8, -1, layout="int-quantized", symmetric=False),
    "fp8": fp8(),
    "fp8 rows": fp8("rows"),
    "nf4": bitsandbytes(),
    "int8": bitsandbytes("int8"),
}
UP = "model.layers.0.mlp.up_proj"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A folder, what is done to it, and what the refusal says.

    Attributes:
        scheme: A key of SCHEMES.
        says: Words of the message.
        config: Fields of ``quantization_config`` that change; None removes one.
        weights: Fields of the weights of compressed-tensors' only group that change.
        damage: What is done to the tensors.
    """

    scheme: str
    says: tuple[str, ...]
    config: dict[str, Any] | None = None
    weights: dict[str, Any] | None = None
    damage: Callable[[Tensors], object] | None = None


def removed(*names: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(f"{UP}.{name}") for name in names]


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({f"{UP}.{name}": change(tensors[f"{UP}.{name}"]).contiguous()})


def filled(name: str, value: float) -> Callable[[Tensors], object]:
    return changed(name, lambda tensor: torch.full_like(tensor, value))


def first_is(name: str, value: int) -> Callable[[Tensors], object]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return changed(name, change)


def all_removed(suffix: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(suffix)]


CASES: dict[str, Case] = {
    "other bits": Case("gptq", ("quantization_config.bits: found 8, expected 4, as", "qzeros"), {"bits": 8}),
    "unknown bits": Case("gptq", ("quantization_config.bits: found '5'", "expected one of 2, 3, 4, 8"), {"bits": 5}),
    "bits of another type": Case("gptq", ("quantization_config.bits: found '4', expected an integer",), {"bits": "4"}),
    "other group": Case("gptq", ("group_size: found 32", "cuts 256 columns into 4 groups"), {"group_size": 32}),
    "unknown group": Case("gptq", ("group_size: found 48, expected -1 or a multiple of 32",), {"group_size": 48}),
    "group of zero": Case("gptq", ("group_size: found 0, expected -1 or a multiple of 32",), {"group_size": 0}),
    "zero points that sym rules out": Case(
        "asymmetric", ("qzeros", "the zero point", "expected 8 everywhere, as sym is true"), {"sym": True}
    ),
    "another version": Case("gptq", ("found the zero point 7", "checkpoint_format"), {"checkpoint_format": "gptq_v2"}),
    "marlin": Case("gptq", ("checkpoint_format: found 'marlin'", "gptq_v2"), {"checkpoint_format": "marlin"}),
    "marlin by its flag": Case("gptq", ("checkpoint_format: found 'marlin'",), {"is_marlin_format": True}),
    "no act-order in the config": Case(
        "act-order", ("desc_act: found False, expected true", "g_idx is not in ascending order"), {"desc_act": False}
    ),
    "no act-order in the tensors": Case("gptq", ("desc_act: found True, expected false",), {"desc_act": True}),
    "act-order without g_idx": Case("act-order", (f"lacks 1 tensors of quantized matrices ({UP}.g_idx)",),
                                    damage=removed("g_idx")),
    "a group that does not exist": Case("act-order", (f"{UP}.g_idx: found group 2, expected groups 0..1",),
                                        damage=first_is("g_idx", 2)),
    "a negative group": Case("act-order", ("found group -3, expected groups 0..1",), damage=first_is("g_idx", -3)),
    "groups of other sizes": Case("act-order", ("found groups of 0 to 128 columns, expected groups of 64",),
                                  damage=filled("g_idx", 1)),
    "a short g_idx": Case("act-order", ("g_idx: found shape [127], expected shape [128]",),
                          damage=changed("g_idx", lambda tensor: tensor[:-1])),
    "no scales": Case("gptq", (f"lacks 1 tensors of quantized matrices ({UP}.scales)", "Finish the download"),
                      damage=removed("scales")),
    "no codes": Case("gptq", (f"({UP}.qweight)",), damage=removed("qweight")),
    "no quantized tensors": Case("gptq", ("says that GPTQ has quantized the model, and no tensor of",),
                                 damage=lambda tensors: [tensors.pop(n) for n in list(tensors) if "_proj" in n]),
    "zero points of a narrower matrix": Case("gptq", ("qzeros: found shape [2, 31]",),
                                             damage=changed("qzeros", lambda tensor: tensor[:, :-1])),
    "zero points of fewer groups": Case("gptq", ("qzeros: found shape [1, 32], expected 2 rows",),
                                        damage=changed("qzeros", lambda tensor: tensor[:1])),
    "codes of a narrower matrix": Case("gptq", ("qweight: found shape [16, 255], expected 256 columns",),
                                       damage=changed("qweight", lambda tensor: tensor[:, :-1])),
    "codes of a shorter input": Case("gptq", ("g_idx: found shape [128], expected shape [120]",),
                                     damage=changed("qweight", lambda tensor: tensor[:-1])),
    "codes of another type": Case("gptq", ("qweight: found type F32, expected I32",),
                                  damage=changed("qweight", lambda tensor: tensor.float())),
    "codes of three dimensions": Case("gptq", ("qweight: found shape [1, 16, 256], expected two dimensions",),
                                      damage=changed("qweight", lambda tensor: tensor[None])),
    "empty scales": Case("gptq", ("scales: found shape [0, 256], expected no empty dimension",),
                         damage=changed("scales", lambda tensor: tensor[:0])),
    "a zero point that tools read differently": Case(
        "asymmetric", ("found the zero point 16, expected 0..15", "gptq_v2"), damage=filled("qzeros", -1)
    ),
    "scales that are not finite": Case("gptq", ("the scales of tensor", "NaN or infinity in 1024 of 1024"),
                                       damage=filled("scales", float("inf"))),
    "described bits that no matrix has": Case(
        "gptq", ("dynamic describes matrices of 8 bits: found matrices of 4 bits only",),
        {"dynamic": {"+:.*down.*": {"bits": 8}}},
    ),
    "bits that are not described": Case("mixed", ("bits: found 4, expected 8",), {"dynamic": None}),
    "a pattern without settings": Case("gptq", ("dynamic.x: found 7, expected an object",), {"dynamic": {"x": 7}}),
    "a weight twice": Case("gptq", ("holds 1 weights twice, quantized and plain",),
                           damage=lambda tensors: tensors.update({f"{UP}.weight": torch.zeros(256, 128)})),
    "gemv": Case("awq", ("quantization_config.version: found 'gemv', expected gemm",), {"version": "GEMV"}),
    "gemv_fast": Case("awq", ("version: found 'gemv_fast', expected gemm",), {"version": "gemv_fast"}),
    "AWQ of other bits": Case("awq", ("bits: found '8', expected 4",), {"bits": 8}),
    "AWQ with another group": Case("awq", ("group_size: found 128", "256 columns into 4 groups"), {"group_size": 128}),
    "AWQ with tensors of GPTQ": Case("gptq", ("qweight: found shape", "Set quant_method to gptq"),
                                     {"quant_method": "awq", "checkpoint_format": None}),
    "AWQ with divided activations": Case("awq", ("mlp.act.scales divides activations",), damage=lambda tensors:
                                         tensors.update({"model.layers.0.mlp.act.scales": torch.ones(256)})),
    "AWQ zero points of another shape": Case("awq", ("qzeros: found shape [1, 32], expected shape [2, 32]",),
                                             damage=changed("qzeros", lambda tensor: tensor[:1])),
    "compressed-tensors of other bits": Case("compressed", ("group_0.weights.num_bits: found int8, expected 4 bits",),
                                             weights={"num_bits": 8}),
    "compressed-tensors of 3 bits": Case("compressed", ("num_bits: found int3",), weights={"num_bits": 3}),
    "compressed-tensors with another group": Case("compressed", ("group_size: found groups of 32",),
                                                  weights={"group_size": 32}),
    "compressed-tensors in no groups": Case("compressed", ("strategy: found channel",),
                                            weights={"strategy": "channel", "group_size": None}),
    "an unknown strategy": Case("compressed", ("strategy: found 'rows', expected one of",),
                                weights={"strategy": "rows"}),
    "an unknown layout": Case("compressed", ("format: found 'nvfp4-pack-quantized'",),
                              {"format": "nvfp4-pack-quantized"}),
    "a sparse model": Case("compressed", ("sparsity_config.format: found 'sparse-24-bitmask'",),
                           {"sparsity_config": {"format": "sparse-24-bitmask"}}),
    "no description": Case("compressed", ("config_groups is missing or empty",), {"config_groups": None}),
    "zero points although symmetric": Case("compressed", ("weight_zero_point: found the zero point", "symmetric"),
                                           weights={"symmetric": True}),
    "no zero points although asymmetric": Case("compressed", ("weight_zero_point", "symmetric is false"),
                                               damage=removed("weight_zero_point")),
    "misshapen zero points": Case("compressed", ("weight_zero_point: found shape [31, 2], expected shape [32, 2]",),
                                  damage=changed("weight_zero_point", lambda tensor: tensor[:-1])),
    "zero points as bytes that are out of range": Case(
        "compressed", ("weight_zero_point: found the zero point 9, expected -8..7",),
        damage=changed("weight_zero_point", lambda tensor: torch.full((256, 2), 9, dtype=torch.int8)),
    ),
    "a shape that is another matrix's": Case("compressed", ("weight_packed: found shape [256, 16], expected 257 rows",),
                                             damage=first_is("weight_shape", 257)),
    "a shape without a matrix": Case("compressed", (f"({UP}.weight_packed)",), damage=removed("weight_packed")),
    "no actorder in the config": Case("reordered", ("actorder: found none, expected group",),
                                      weights={"actorder": None}),
    "no actorder in the tensors": Case("reordered", ("weight_g_idx", "actorder says"), damage=removed("weight_g_idx")),
    "described weights that no tensor is": Case(
        "bytes", ("group_1.weights describes weights that no tensor of",),
        {"config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {
                "num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}},
            "group_1": {"targets": ["re:.*down_proj"], "weights": {
                "num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}},
        }},
    ),
    "bytes that are floats": Case("bytes", ("weight: found type F32, expected I8 or F8_E4M3",),
                                  damage=changed("weight", lambda tensor: tensor.float())),
    "other blocks of fp8": Case("fp8", ("weight_block_size: found [64, 64]", "weight_scale_inv"),
                                {"weight_block_size": [64, 64]}),
    "blocks of nothing": Case("fp8", ("weight_block_size: found [0, 32], expected two positive sizes",),
                              {"weight_block_size": [0, 32]}),
    "fp8 without its scales": Case("fp8", (f"({UP}.weight_scale_inv)",), damage=removed("weight_scale_inv")),
    "scales without fp8": Case("fp8", (f"{UP}.weight: found type F32, expected F8_E4M3",),
                               damage=changed("weight", lambda tensor: tensor.float())),
    "scales of other rows": Case("fp8 rows", ("weight_scale: found shape [255, 1]", "one scale a row"),
                                 damage=changed("weight_scale", lambda tensor: tensor[:-1])),
    "nf4 without a description": Case("nf4", (f"({UP}.weight.quant_state.bitsandbytes__nf4)",),
                                      damage=removed("weight.quant_state.bitsandbytes__nf4")),
    "nf4 without the inner magnitudes": Case("nf4", (f"({UP}.weight.nested_absmax)",),
                                             damage=removed("weight.nested_absmax")),
    "nf4 with too few codes": Case("nf4", ("weight: found shape [16383, 1], expected 16384 bytes",),
                                   damage=changed("weight", lambda tensor: tensor[:-1])),
    "nf4 with too few magnitudes": Case("nf4", ("weight.absmax: found shape [511], expected shape [512]",),
                                        damage=changed("weight.absmax", lambda tensor: tensor[:-1])),
    "a description that is not JSON": Case("nf4", ("quant_state.bitsandbytes__nf4", "JSON"),
                                           damage=filled("weight.quant_state.bitsandbytes__nf4", 120)),
    "an 8-bit model that is described as 4-bit": Case("int8", ("load_in_4bit: found True, expected false",),
                                                      {"load_in_4bit": True, "load_in_8bit": False}),
    "too few row magnitudes": Case("int8", ("SCB: found shape [255], expected shape [256]",),
                                   damage=changed("SCB", lambda tensor: tensor[:-1])),
    "columns of tiles": Case("int8", ("weight_format: found layout 2, expected 0, rows",),
                             damage=changed("weight_format", lambda tensor: torch.full_like(tensor, 2))),
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    place, made = tmp_path_factory.mktemp("to-damage"), dict[str, Path]()
    source = MODEL.write(place / "floats")

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = write_quantized(source, place / str(len(made)), SCHEMES[name]).path
        return made[name]

    return folder


def edit(folder: Path, case: Case) -> None:
    config = json.loads((folder / "config.json").read_text())
    section = config["quantization_config"]
    section |= case.config or {}
    if case.weights is not None:
        section["config_groups"]["group_0"]["weights"] |= case.weights
    (folder / "config.json").write_text(json.dumps(config))
    if case.damage is not None:
        tensors = load_file(folder / "model.safetensors")
        case.damage(tensors)
        save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_a_contradiction_is_refused_before_anything_is_written(
    sources: Callable[[str], Path], tmp_path: Path, refused: Refused, name: str
) -> None:
    case = CASES[name]
    folder = Path(shutil.copytree(sources(case.scheme), tmp_path / "checkpoint"))
    edit(folder, case)
    error = refused(["export", folder, tmp_path / "out", "--keep-blocks"], *case.says)
    assert str(folder) in error
    assert error.rstrip().endswith(".")
    assert left_behind(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_folders_that_are_damaged_are_sound_before(sources: Callable[[str], Path], scheme: str) -> None:
    checkpoint = open_checkpoint(str(sources(scheme)))
    assert checkpoint.blocks(f"{UP}.weight") is not None


@pytest.mark.parametrize("scheme", ["gptq", "compressed", "nf4"])
def test_half_of_the_shards_is_refused(
    sources: Callable[[str], Path], tmp_path: Path, refused: Refused, scheme: str
) -> None:
    folder = Path(shutil.copytree(sources(scheme), tmp_path / "checkpoint"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    half = {name: tensors[name] for name in names[: len(names) // 2]}
    save_file(half, folder / "model-00001-of-00002.safetensors")
    refused(["export", folder, tmp_path / "out"], "lacks", "Finish the download")
    placed = {name: f"model-0000{1 + (name not in half)}-of-00002.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    refused(["export", folder, tmp_path / "out"], "lacks 1 of 2 files", "Finish the download")
    assert left_behind(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("section", [{}, {"bits": 4}, {"bits": None, "group_size": "x"}, {"config_groups": {"a": 1}}])
def test_any_description_of_a_model_of_floats_is_refused(
    tmp_path: Path, refused: Refused, method: str, section: dict[str, Any]
) -> None:
    folder = MODEL.write(tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **section}
    (folder / "config.json").write_text(json.dumps(config))
    refused(["export", folder, tmp_path / "out"], "quantization_config")
    assert left_behind(tmp_path) == ["checkpoint"]
