"""Reads folders whose matrices another tool has quantized, behind the interface of every checkpoint.

==================  =====================================================  ===================
``quant_method``    what its matrices become                               file
==================  =====================================================  ===================
gptq                codes, scales and zero points, bit for bit             gptq.py
awq                 the same                                               awq.py
compressed-tensors  the same for integers; floats for fp8                  compressed.py
fp8, fbgemm_fp8     floats                                                 fp8.py
bitsandbytes        floats                                                 bnb.py
==================  =====================================================  ===================

A matrix ``X.weight`` is quantized if its parts are there, such as ``X.qweight``; else it is read as any other tensor.
So models that are quantized in part need no list of names. What the config says is compared with what is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from shortstack.export.checkpoint.checkpoint import Checkpoint
from shortstack.export.checkpoint.config import Config
from shortstack.export.checkpoint.hf import HuggingFaceCheckpoint
from shortstack.export.checkpoint.quantized.awq import read_awq
from shortstack.export.checkpoint.quantized.bnb import read_bitsandbytes
from shortstack.export.checkpoint.quantized.compressed import read_compressed_tensors
from shortstack.export.checkpoint.quantized.fp8 import read_fp8
from shortstack.export.checkpoint.quantized.gptq import read_gptq
from shortstack.export.checkpoint.quantized.quantized_checkpoint import QuantizedCheckpoint
from shortstack.export.checkpoint.quantized.stored import SAME_REVISION, SECTIONS, Quantized, StoredTensors

__all__ = ["METHODS", "QuantizedCheckpoint", "dequantizable"]

METHODS: Mapping[str, Callable[[StoredTensors, Config], Quantized]] = MappingProxyType(
    {
        "gptq": read_gptq,
        "awq": read_awq,
        "compressed-tensors": read_compressed_tensors,
        "fp8": read_fp8,
        "fbgemm_fp8": read_fp8,
        "bitsandbytes": read_bitsandbytes,
    }
)
"""The readers, by ``quant_method``."""


_OLD_FILES: Mapping[str, str] = MappingProxyType({"quantize_config.json": "gptq", "quant_config.json": "awq"})
"""Where the first versions of AutoGPTQ and AutoAWQ describe a model, instead of in its config, and ``quant_method``."""


def dequantizable(folder: HuggingFaceCheckpoint) -> Checkpoint:
    """Return a folder as a checkpoint of plain weights if its config names a tool that is read; else itself.

    Raises:
        CheckpointError: Tensors are missing, misshapen or out of range, or contradict the config.
        UnsupportedError: The tool is read, but not this kind of its files.
    """
    section = _description(folder)
    if section is None:
        return folder
    method = section.data.get("quant_method")
    if not isinstance(method, str) or method not in METHODS:
        return folder
    return QuantizedCheckpoint(folder, METHODS[method](folder, section))


def _description(folder: HuggingFaceCheckpoint) -> Config | None:
    """Return what says how a folder is quantized, None for a folder of floats."""
    for key in SECTIONS:
        section = folder.config.section(key)
        if section is not None and section.data:
            return Config(section.data, section.file, section.prefix, SAME_REVISION)
    if any(name.endswith(".qweight") for name in folder.names()):
        for file, method in _OLD_FILES.items():
            if (found := folder.json_file(file)) is not None:
                return Config({"quant_method": method, **found.data}, found.file, remedy=SAME_REVISION)
    return None
