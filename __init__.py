"""shortstack: cut a trained causal language model at its exits into ONNX graphs, shrink them, decode with them.

::

    from shortstack import load

    with load("bundle/") as model:
        print(model.generate("Once upon a time", max_new_tokens=64, strategy="self-speculative").text)

Importing this package imports nothing heavy: each public name brings in what it needs when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shortstack.graphs.errors import ShortstackError as ShortstackError
    from shortstack.runtime.decode.draft_length import DraftPolicy as DraftPolicy
    from shortstack.runtime.decode.lookup import FromLookup as FromLookup
    from shortstack.runtime.decode.sampling import SamplingParams as SamplingParams
    from shortstack.runtime.decode.step import Stats as Stats
    from shortstack.runtime.decode.stream import Stream as Stream
    from shortstack.runtime.decode.stream import Token as Token
    from shortstack.runtime.decode.text_index import TextIndex as TextIndex
    from shortstack.runtime.early_exit.expression import parse_criterion as parse_criterion
    from shortstack.runtime.early_exit.policy import ExitPolicy as ExitPolicy
    from shortstack.runtime.engine.session import Placement as Placement
    from shortstack.runtime.model import Model as Model
    from shortstack.runtime.model import load as load
    from shortstack.runtime.request import ExitEarly as ExitEarly
    from shortstack.runtime.request import Plain as Plain
    from shortstack.runtime.request import Request as Request
    from shortstack.runtime.request import Speculate as Speculate
    from shortstack.runtime.result import Result as Result

__version__ = "0.1.0"

# Public name -> the module that defines it.
_HOMES = {
    "DraftPolicy": "runtime.decode.draft_length",
    "ExitEarly": "runtime.request",
    "ExitPolicy": "runtime.early_exit.policy",
    "FromLookup": "runtime.decode.lookup",
    "Model": "runtime.model",
    "Placement": "runtime.engine.session",
    "Plain": "runtime.request",
    "Request": "runtime.request",
    "Result": "runtime.result",
    "SamplingParams": "runtime.decode.sampling",
    "ShortstackError": "graphs.errors",
    "Speculate": "runtime.request",
    "Stats": "runtime.decode.step",
    "Stream": "runtime.decode.stream",
    "TextIndex": "runtime.decode.text_index",
    "Token": "runtime.decode.stream",
    "load": "runtime.model",
    "parse_criterion": "runtime.early_exit.expression",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        try:
            return getattr(import_module(f"shortstack.{_HOMES[name]}"), name)
        except ModuleNotFoundError as error:
            from shortstack.missing import missing_dependency

            explained = missing_dependency(f"shortstack.{name}", error)
            if explained is None:
                raise
            raise explained from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
