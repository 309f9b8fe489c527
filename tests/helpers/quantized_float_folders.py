"""Schemes of fp8 and bitsandbytes, whose matrices have no blocks, for folders as these tools publish them."""

from __future__ import annotations

import json
from typing import Any

import ml_dtypes
import numpy as np
import torch

from helpers.quantized_folders import Packed, Scheme, Tensors, compressed_config

E4M3_LARGEST = 448.0


def fp8(kind: str = "blocks", block: int = 32) -> Scheme:
    """fp8 with scales of blocks, of rows or of the matrix; ``compressed-tensors`` is its layout for rows."""

    def pack(weight: np.ndarray, layer: str) -> Packed:
        rows, width = weight.shape
        if kind == "blocks":
            shape = -(-rows // block), -(-width // block)
            scale = np.empty(shape, np.float32)
            spread = np.empty_like(weight)
            for i in range(shape[0]):
                for j in range(shape[1]):
                    place = np.s_[i * block : (i + 1) * block, j * block : (j + 1) * block]
                    scale[i, j] = np.abs(weight[place]).max() / E4M3_LARGEST
                    spread[place] = scale[i, j]
        elif kind == "matrix":
            scale = np.array(np.abs(weight).max() / E4M3_LARGEST, np.float32)
            spread = np.full_like(weight, scale)
        else:
            scale = (np.abs(weight).max(axis=1, keepdims=True) / E4M3_LARGEST).astype(np.float32)
            spread = np.broadcast_to(scale, weight.shape)
        codes = (weight / spread).astype(ml_dtypes.float8_e4m3fn)
        stored = torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn)
        part = "weight_scale_inv" if kind == "blocks" else "weight_scale"
        tensors = {"weight": stored, part: torch.from_numpy(scale)}
        if kind == "matrix":
            tensors["input_scale"] = torch.ones(1)
        return Packed(tensors, codes.astype(np.float32) * spread)

    if kind == "compressed-tensors":
        weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
        inputs = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
        return Scheme(pack, compressed_config("float-quantized", weights, inputs))
    config: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    if kind == "blocks":
        config["weight_block_size"] = [block, block]
    return Scheme(pack, config)


NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = (0.0, 0.005208333333333333, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)


def bitsandbytes(kind: str = "nf4", *, nested: bool = True) -> Scheme:
    """bitsandbytes: ``nf4`` or ``fp4``, with magnitudes that are quantized themselves, or ``int8``."""
    table = np.array(NF4 if kind == "nf4" else (*FP4, *(-value for value in FP4)), np.float32)

    def pack_4_bits(weight: np.ndarray, layer: str) -> Packed:
        flat = weight.reshape(-1)
        blocks = flat.reshape(-1, 64)
        absmax = np.abs(blocks).max(axis=1)
        state: dict[str, Any] = {
            "quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)
        }  # fmt: skip
        tensors: Tensors = {}
        if nested:
            offset = float(absmax.mean())
            code = np.linspace(-1, 1, 256).astype(np.float32)
            centred = np.pad(absmax - np.float32(offset), (0, -len(absmax) % 256)).reshape(-1, 256)
            inner = np.abs(centred).max(axis=1).astype(np.float32)
            index = np.abs(centred[..., None] / inner[:, None, None] - code).argmin(axis=-1).astype(np.uint8)
            restored = (code[index] * inner[:, None]).reshape(-1)[: len(absmax)] + np.float32(offset)
            tensors["weight.absmax"] = torch.from_numpy(index.reshape(-1)[: len(absmax)].copy())
            tensors["weight.nested_absmax"] = torch.from_numpy(inner)
            tensors["weight.nested_quant_map"] = torch.from_numpy(code)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            absmax = restored.astype(np.float32)
        else:
            tensors["weight.absmax"] = torch.from_numpy(absmax)
        codes = np.abs(blocks[..., None] / absmax[:, None, None] - table).argmin(axis=-1).reshape(-1).astype(np.uint8)
        tensors["weight"] = torch.from_numpy((codes[0::2] << 4 | codes[1::2]).reshape(-1, 1))
        tensors["weight.quant_map"] = torch.from_numpy(table)
        text = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
        tensors[f"weight.quant_state.bitsandbytes__{kind}"] = torch.from_numpy(text)
        floats = (table[codes].reshape(-1, 64) * absmax[:, None]).astype(np.float32)
        return Packed(tensors, floats.reshape(weight.shape))

    def pack_8_bits(weight: np.ndarray, layer: str) -> Packed:
        scb = np.abs(weight).max(axis=1).astype(np.float32)
        codes = np.rint(weight / scb[:, None] * 127).astype(np.int8)
        stored = {
            "weight": torch.from_numpy(codes),
            "SCB": torch.from_numpy(scb),
            "weight_format": torch.tensor(0, dtype=torch.uint8),
        }
        return Packed(stored, (codes * (scb / np.float32(127))[:, None]).astype(np.float32))

    config = {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": kind != "int8",
        "_load_in_8bit": kind == "int8",
        "load_in_4bit": kind != "int8",
        "load_in_8bit": kind == "int8",
        "bnb_4bit_quant_type": kind if kind != "int8" else "fp4",
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": "bfloat16",
        "llm_int8_skip_modules": None,
    }
    return Scheme(pack_8_bits if kind == "int8" else pack_4_bits, config)
