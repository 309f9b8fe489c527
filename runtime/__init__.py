"""From a bundle to tokens: sessions, KV buffers, decoding loops, sampling, text.

Never needs torch, transformers or onnx. Importing this package imports nothing heavy; :func:`load` and the rest come
in when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shortstack.runtime.draft_length import DraftPolicy
    from shortstack.runtime.model import Model, Result, load
    from shortstack.runtime.sampling import SamplingParams

__all__ = ["DraftPolicy", "Model", "Result", "SamplingParams", "load"]

_HOMES = {
    "DraftPolicy": "draft_length",
    "Model": "model",
    "Result": "model",
    "SamplingParams": "sampling",
    "load": "model",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"shortstack.runtime.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
