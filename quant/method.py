"""The rounding methods by the names of the command line: what each needs to see, and its steps."""

from __future__ import annotations

from dataclasses import dataclass

from shortstack.graphs.errors import RequestError
from shortstack.quant.methods import METHODS, Rounding
from shortstack.quant.recipe import METHOD_NAMES


@dataclass(frozen=True, slots=True)
class Method:
    """One way to round a model.

    Attributes:
        name: What the command line calls it.
        round: Rounds one matrix, see :mod:`shortstack.quant.methods`.
        uses_text: Whether it looks at what matrices multiply, if there is calibration text.
        needs_text: Whether it cannot do without.
        scales_layers: Whether AWQ's scaling of a layer comes first.
    """

    name: str
    round: Rounding
    uses_text: bool = True
    needs_text: bool = False
    scales_layers: bool = False


_METHODS = {
    method.name: method
    for method in (
        Method("rtn", METHODS["rtn"], uses_text=False),
        Method("k-quant", METHODS["k-quant"]),
        Method("hqq", METHODS["hqq"], uses_text=False),
        Method("gptq", METHODS["gptq"], needs_text=True),
        Method("awq", METHODS["k-quant"], needs_text=True, scales_layers=True),
        Method("awq-gptq", METHODS["gptq"], needs_text=True, scales_layers=True),
    )
}
assert tuple(_METHODS) == METHOD_NAMES


def find_method(name: str) -> Method:
    """Return a method by name.

    Raises:
        RequestError: There is none of that name.
    """
    if name not in _METHODS:
        raise RequestError("--method is unknown", found=repr(name), expected=f"one of {', '.join(METHOD_NAMES)}")
    return _METHODS[name]
