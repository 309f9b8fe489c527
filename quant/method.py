"""The rounding methods by the names of the command line: what each needs, and its steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from shortstack.graphs.errors import RequestError
from shortstack.quant.methods import Rounding
from shortstack.quant.methods.gptq import GPTQ_ROWS, gptq
from shortstack.quant.methods.hqq import hqq
from shortstack.quant.methods.k_quant import k_quant
from shortstack.quant.methods.rtn import rtn


@dataclass(frozen=True, slots=True)
class Method:
    """One way to round a model.

    Attributes:
        name: What the command line calls it.
        round: Rounds one matrix, see :mod:`shortstack.quant.methods`.
        uses_text: Whether it looks at the inputs of matrices, if there is calibration text.
        needs_text: Whether it cannot work without calibration text.
        scales_layers: Whether AWQ's scaling of a layer comes first.
        rows: Rows that it takes at a time where it looks at text; None for what fits into a core's cache.
    """

    name: str
    round: Rounding
    uses_text: bool = True
    needs_text: bool = False
    scales_layers: bool = False
    rows: int | None = None


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            Method("rtn", rtn, uses_text=False),
            Method("k-quant", k_quant),
            Method("hqq", hqq, uses_text=False),
            Method("gptq", gptq, needs_text=True, rows=GPTQ_ROWS),
            Method("awq", k_quant, needs_text=True, scales_layers=True),
            Method("awq-gptq", gptq, needs_text=True, scales_layers=True, rows=GPTQ_ROWS),
        )
    }
)


def find_method(name: str) -> Method:
    """Return a method by name.

    Raises:
        RequestError: No method has that name.
    """
    if name not in METHODS:
        raise RequestError("--method is unknown", found=repr(name), expected=f"one of {', '.join(METHODS)}")
    return METHODS[name]
