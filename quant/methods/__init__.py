"""Rounding methods, one per file: from a matrix [out, in], its format and its inputs to a BlockTensor.

::

    rtn      every weight to the nearest code of a grid that covers its block
    k_quant  grids searched for the least weighted error of each block (grid.py)
    hqq      grids fitted to all but the outliers of each block
    gptq     codes that compensate each other's errors on the calibration text
    awq      not a rounding: scales a layer's channels before it is rounded, so that strong inputs meet finer weights
"""

from __future__ import annotations

from collections.abc import Callable

from shortstack.graphs.ir.block_tensor import BlockTensor
from shortstack.graphs.precision import BlockFormat
from shortstack.quant.methods.stats import Floats, InputStats

# A matrix [out, in], its format, and its inputs.
Rounding = Callable[[Floats, BlockFormat, InputStats | None], BlockTensor]
