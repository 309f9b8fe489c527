"""The block types of GGUF files that the kernels can compute with as they are, bit for bit.

======  ==============  ===================================================================================
type    weight          32 neighbouring weights of a row
======  ==============  ===================================================================================
Q4_0    d * (code - 8)  float16 d, 16 bytes: the lower halves are weights 0-15, the upper halves 16-31
Q8_0    d * code        float16 d, 32 int8
======  ==============  ===================================================================================

There is no other such type. Q4_1 and Q5_1 add a float minimum instead of subtracting an integer zero point; MatMulNBits
takes float zero points, but is about 100 times slower with them. Codes of 5 and 6 bits have no kernel. K-quants scale
their scales. The layouts are ``block_q4_0`` and ``block_q8_0`` in
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from shortstack.graphs.ir.block_tensor import BlockTensor
from shortstack.graphs.precision import BlockFormat

EXACT_FORMATS: Mapping[str, BlockFormat] = MappingProxyType(
    {
        "Q4_0": BlockFormat(4, 32, is_symmetric=True),
        "Q8_0": BlockFormat(8, 32, is_symmetric=True),
    }
)
"""The block format that holds the same blocks, by ggml type."""

_SCALE_BYTES = 2


def unpack_blocks(rows: npt.NDArray[np.uint8], kind: str) -> BlockTensor:
    """Return a matrix of a GGUF file in blocks, with the codes and scales that the file stores.

    Args:
        rows: The matrix's bytes, [rows, blocks * bytes of a block].
        kind: A key of EXACT_FORMATS.
    """
    block_format = EXACT_FORMATS[kind]
    code_bytes = block_format.block_size * block_format.bits // 8
    blocks = rows.reshape(len(rows), -1, _SCALE_BYTES + code_bytes)
    scales = np.ascontiguousarray(blocks[..., :_SCALE_BYTES]).view("<f2")[..., 0].astype(np.float32)
    packed = blocks[..., _SCALE_BYTES:]  # [rows, blocks, code_bytes]
    # [rows, blocks, 32]; adding 128 to an int8 flips the sign bit of the byte.
    codes = np.concatenate([packed & 0x0F, packed >> 4], axis=2) if block_format.bits == 4 else packed ^ np.uint8(0x80)
    return BlockTensor(block_format, codes.reshape(len(rows), -1), scales, None)
