"""Where and in what precision to train: bfloat16 autocast where the processor multiplies it faster."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from shortstack.graphs.errors import RequestError

_SHORT_TEXT = 128  # tokens
_CPU_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")


def pick_device(name: str | None) -> str:
    """Return the device to train on: the one named, or a GPU if there is one.

    Raises:
        RequestError: The device is not there.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] == "cuda" and not torch.cuda.is_available():
        raise RequestError("--device", found=name, expected="cpu: torch sees no GPU", remedy="leave --device out")
    return name


def is_bf16_fast(device: str) -> bool:
    """Tell whether bfloat16 products are faster than float32 ones here."""
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported())
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False
    return any(flag in flags for flag in _CPU_FLAGS)


def autocast(device: str, use_bf16: bool) -> AbstractContextManager[object]:
    """Return a context in which products are in bfloat16, or in float32."""
    return torch.autocast(device.split(":")[0], torch.bfloat16, enabled=use_bf16)


def short_attention(device: str, seq: int) -> AbstractContextManager[object]:
    """Return a context in which attention over short texts, in bfloat16 on a CPU, is plain products.

    torch's fused kernel is slow there: 23 ms forward and back against 5 over 32 texts of 36 tokens with 4 heads of 32,
    42 against 26 over 128 tokens, and faster from 256 on (torch 2.13).
    """
    if device == "cpu" and torch.is_autocast_enabled("cpu") and seq <= _SHORT_TEXT:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()
