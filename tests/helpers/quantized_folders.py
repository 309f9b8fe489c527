"""Folders as GPTQ, AWQ and compressed-tensors publish them, made from folders of floats.

Every packer is written from the tool's description of its layout, code by code, and shares nothing with the readers.
Matrices are rounded to nearest: which codes a tool would choose does not matter here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
PROJECTIONS = ("_proj.weight",)


@dataclass(frozen=True)
class Packed:
    """One quantized matrix.

    Attributes:
        tensors: What the file holds, by what stands behind the layer's name.
        floats: What it stands for, float32 [out, in].
    """

    tensors: Tensors
    floats: np.ndarray


Pack = Callable[[np.ndarray, str], Packed]
"""From a matrix [out, in] and its layer to what a tool stores."""


@dataclass(frozen=True)
class Scheme:
    """How a tool quantizes a model.

    Attributes:
        pack: Of one matrix.
        config: ``quantization_config``.
        leaves: Parts of the names of matrices that stay floats.
        suffixes: What the names of matrices that are quantized end with.
        field: The field of config.json that describes it.
    """

    pack: Pack
    config: Mapping[str, Any]
    leaves: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = PROJECTIONS
    field: str = "quantization_config"

    def but(self, **config: Any) -> Scheme:
        """The same with other fields in the config."""
        return replace(self, config={**self.config, **config})


@dataclass(frozen=True)
class QuantizedFolder:
    """A folder and the weights that it stands for, by name."""

    path: Path
    floats: dict[str, np.ndarray] = field(default_factory=dict)


def write_quantized(source: Path, out: Path, scheme: Scheme) -> QuantizedFolder:
    """Quantize a folder of floats."""
    shutil.copytree(source, out)
    floats = {name: np.asarray(value, np.float32) for name, value in load_file(out / "model.safetensors").items()}
    stored: Tensors = {}
    for name, value in list(floats.items()):
        is_left = any(part in name for part in scheme.leaves)
        if name.endswith(scheme.suffixes) and value.ndim == 2 and not is_left:
            layer = name.removesuffix(".weight")
            packed = scheme.pack(value, layer)
            stored |= {f"{layer}.{part}": tensor.clone().contiguous() for part, tensor in packed.tensors.items()}
            floats[name] = packed.floats
        else:
            stored[name] = torch.from_numpy(value.astype(np.float16))
            floats[name] = value.astype(np.float16).astype(np.float32)
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config[scheme.field] = dict(scheme.config)
    (out / "config.json").write_text(json.dumps(config))
    return QuantizedFolder(out, floats)


def write_plain(source: Path, out: Path, folder: QuantizedFolder) -> Path:
    """Write the folder of floats that a quantized one stands for."""
    shutil.copytree(source, out)
    save_file({n: torch.from_numpy(v) for n, v in folder.floats.items()}, out / "model.safetensors", {"format": "pt"})
    return out


# Integers in 32-bit words


def words_along_rows(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Pack codes [n, columns] along n into int32, the way of AutoGPTQ's ``pack``: column by column, word by word."""
    count, columns = codes.shape
    out = np.zeros((count * bits // 32, columns), np.uint32)
    codes = codes.astype(np.uint32)
    if bits != 3:
        per_word = 32 // bits
        for i in range(count):
            out[i // per_word] |= codes[i] << np.uint32(bits * (i % per_word))
        return torch.from_numpy(out.view(np.int32))
    for start in range(0, count, 32):  # 32 codes in three words; the 11th and the 22nd lie across a border
        word = start * 3 // 32
        for i in range(10):
            out[word] |= codes[start + i] << np.uint32(3 * i)
        out[word] |= codes[start + 10] << np.uint32(30)
        out[word + 1] |= (codes[start + 10] >> np.uint32(2)) & np.uint32(1)
        for i in range(10):
            out[word + 1] |= codes[start + 11 + i] << np.uint32(3 * i + 1)
        out[word + 1] |= codes[start + 21] << np.uint32(31)
        out[word + 2] |= (codes[start + 21] >> np.uint32(1)) & np.uint32(3)
        for i in range(10):
            out[word + 2] |= codes[start + 22 + i] << np.uint32(3 * i + 2)
    return torch.from_numpy(out.view(np.int32))


def on_grid(
    weight: np.ndarray, group_of: np.ndarray, bits: int, *, symmetric: bool, scale_type: torch.dtype = torch.float16
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Round a matrix [out, in] to a grid for each group of columns.

    Returns:
        Codes [out, in], scales [out, groups] and zero points [out, groups], and what they stand for.
    """
    top, groups = (1 << bits) - 1, int(group_of.max()) + 1
    scales, zeros = np.empty((len(weight), groups), np.float32), np.empty((len(weight), groups), np.int64)
    for group in range(groups):
        part = weight[:, group_of == group]
        if symmetric:
            scale, zero = np.abs(part).max(axis=1) * 2 / top, np.full(len(weight), 1 << (bits - 1))
        else:
            low, high = np.minimum(part.min(axis=1), -1e-3), np.maximum(part.max(axis=1), 1e-3)
            scale = (high - low) / top
            zero = np.clip(np.rint(-low / scale), 1, top)
        scales[:, group] = torch.from_numpy(scale.astype(np.float32)).to(scale_type).float().numpy()
        zeros[:, group] = zero
    codes = np.clip(np.rint(weight / scales[:, group_of]) + zeros[:, group_of], 0, top).astype(np.int64)
    floats = scales[:, group_of] * (codes - zeros[:, group_of]).astype(np.float32)
    return codes, scales, zeros, floats.astype(np.float32)


def _groups(width: int, group: int) -> np.ndarray:
    return np.arange(width) // (width if group == -1 else group)


def _act_order(width: int, group: int, layer: str, orders: Mapping[str, int]) -> np.ndarray:
    """The group of each column, after ranking columns by how large their inputs are; layers of one input agree."""
    above, own = layer.rpartition(".")[::2]
    seed = sum(map(ord, f"{above}{SHARED_INPUTS.get(own, own)}")) + orders.get(own, 0)
    ranked = np.random.default_rng(seed).permutation(width)
    found = np.empty(width, np.int64)
    found[ranked] = _groups(width, group)
    return found


SHARED_INPUTS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "mlp", "up_proj": "mlp"}


def gptq(
    bits: int = 4,
    group: int = 64,
    *,
    symmetric: bool = True,
    act_order: bool = False,
    version: int = 1,
    own_bits: Mapping[str, int] | None = None,
    orders: Mapping[str, int] | None = None,
    **more: Any,
) -> Scheme:
    """GPTQ. ``own_bits``: other bits by the end of a layer's name. ``orders``: layers with an order of their own."""
    own = own_bits or {}

    def pack(weight: np.ndarray, layer: str) -> Packed:
        width, own_width = weight.shape[1], own.get(layer.rpartition(".")[2], bits)
        group_of = _act_order(width, group, layer, orders or {}) if act_order else _groups(width, group)
        codes, scales, zeros, floats = on_grid(weight, group_of, own_width, symmetric=symmetric)
        tensors = {
            "qweight": words_along_rows(codes.T, own_width),
            "qzeros": words_along_rows(zeros - (version == 1), own_width).T,
            "scales": torch.from_numpy(scales.T.copy()).half(),
            "g_idx": torch.from_numpy(group_of.astype(np.int32)),
        }
        return Packed(tensors, floats)

    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "damp_percent": 0.1,
        "desc_act": act_order,
        "static_groups": False,
        "sym": symmetric,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    if own:
        config["dynamic"] = {rf"+:.*\.{name}$": {"bits": value} for name, value in own.items()}
    return Scheme(pack, {**config, **more})


def awq(group: int = 64, **more: Any) -> Scheme:
    """AWQ for its gemm kernels."""

    def words(codes: np.ndarray) -> torch.Tensor:  # [n, outputs] -> [n, outputs / 8]
        out = np.zeros((len(codes), codes.shape[1] // 8), np.uint32)
        for column in range(out.shape[1]):
            for place, member in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                out[:, column] |= codes[:, column * 8 + member].astype(np.uint32) << np.uint32(4 * place)
        return torch.from_numpy(out.view(np.int32))

    def pack(weight: np.ndarray, layer: str) -> Packed:
        codes, scales, zeros, floats = on_grid(weight, _groups(weight.shape[1], group), 4, symmetric=False)
        scale = torch.from_numpy(scales.T.copy()).half()
        return Packed({"qweight": words(codes.T), "qzeros": words(zeros.T), "scales": scale}, floats)

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return Scheme(pack, {**config, "modules_to_not_convert": None, **more})


def compressed(
    bits: int = 4,
    group: int = 64,
    *,
    symmetric: bool = True,
    act_order: bool = False,
    layout: str = "pack-quantized",
    inputs: Mapping[str, Any] | None = None,
) -> Scheme:
    """compressed-tensors; ``group`` -1 is its strategy ``channel``."""

    def words(codes: np.ndarray) -> torch.Tensor:  # [rows, n] -> [rows, n * bits / 32], the last word filled up
        per_word = 32 // bits
        padded = np.zeros((len(codes), -(-codes.shape[1] // per_word) * per_word), np.uint32)
        padded[:, : codes.shape[1]] = codes
        out = np.zeros((len(codes), padded.shape[1] // per_word), np.uint32)
        for i in range(per_word):
            out |= padded[:, i::per_word] << np.uint32(bits * i)
        return torch.from_numpy(out.view(np.int32))

    def pack(weight: np.ndarray, layer: str) -> Packed:
        width = weight.shape[1]
        group_of = _act_order(width, group, layer, {}) if act_order else _groups(width, group)
        codes, scales, zeros, floats = on_grid(weight, group_of, bits, symmetric=symmetric, scale_type=torch.bfloat16)
        tensors: Tensors = {"weight_scale": torch.from_numpy(scales).bfloat16()}
        if layout == "int-quantized":
            tensors["weight"] = torch.from_numpy((codes - (1 << (bits - 1))).astype(np.int8))
            if not symmetric:
                tensors["weight_zero_point"] = torch.from_numpy((zeros - (1 << (bits - 1))).astype(np.int8))
            return Packed(tensors, floats)
        tensors["weight_packed"] = words(codes)
        tensors["weight_shape"] = torch.tensor(weight.shape, dtype=torch.int64)
        if not symmetric:
            tensors["weight_zero_point"] = words(zeros.T).T
        if act_order:
            tensors["weight_g_idx"] = torch.from_numpy(group_of.astype(np.int32))
        return Packed(tensors, floats)

    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "group_size": None if group == -1 else group,
        "strategy": "channel" if group == -1 else "group",
        "block_structure": None,
        "dynamic": False,
        "actorder": "group" if act_order else None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    return Scheme(pack, compressed_config(layout, weights, inputs))


def compressed_config(layout: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "global_compression_ratio": 1.5,
        "kv_cache_scheme": None,
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": dict(weights),
                "input_activations": inputs,
                "output_activations": None,
            }
        },
    }


INT8_INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
