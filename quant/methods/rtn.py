"""RTN: each weight to the nearest code of a grid that just covers its block."""

from __future__ import annotations

from shortstack.graphs.ir.block_tensor import BlockTensor, nearest
from shortstack.graphs.precision import BlockFormat
from shortstack.quant.methods.stats import Floats, InputStats


def rtn(weight: Floats, block_format: BlockFormat, stats: InputStats | None) -> BlockTensor:
    """Round a matrix [out, in] to nearest; looks at no text."""
    return nearest(weight, block_format)
