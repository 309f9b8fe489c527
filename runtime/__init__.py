"""From a bundle to tokens: sessions, KV buffers, decoding loops, sampling, text.

Never needs torch, transformers or onnx. Importing this package imports nothing heavy; :func:`load` and the rest come
in when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shortstack.runtime.decode.draft_length import DraftPolicy
    from shortstack.runtime.decode.sampling import SamplingParams
    from shortstack.runtime.early_exit.expression import parse_criterion
    from shortstack.runtime.early_exit.policy import ExitPolicy
    from shortstack.runtime.engine.session import Placement
    from shortstack.runtime.model import Model, Result, load

__all__ = ["DraftPolicy", "ExitPolicy", "Model", "Placement", "Result", "SamplingParams", "load", "parse_criterion"]

_HOMES = {
    "DraftPolicy": "decode.draft_length",
    "ExitPolicy": "early_exit.policy",
    "Model": "model",
    "Placement": "engine.session",
    "Result": "model",
    "SamplingParams": "decode.sampling",
    "load": "model",
    "parse_criterion": "early_exit.expression",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"shortstack.runtime.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
