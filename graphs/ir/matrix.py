"""The three uses of a weight matrix, whichever way it is stored: a projection, a head, an embedding.

======================  ==============================  =========================================
use                     stored as floats                stored in blocks
======================  ==============================  =========================================
projection              MatMul with [in, out]           MatMulNBits with [out, blocks of in]
head                    Gemm with [vocab, hidden]       MatMulNBits with [vocab, blocks of hidden]
embedding               Gather from [vocab, hidden]     GatherBlockQuantized from the same bytes
side product of those                                   a MatMulNBits whose result is appended to x
order of inputs                                         a Gather of the columns of x, before all else
======================  ==============================  =========================================

A tied embedding and head are the same bytes either way. A vocabulary matrix in blocks may have its first rows in
another matrix (:func:`names.first_rows`), of another format.
"""

from __future__ import annotations

import onnx_ir as ir

from shortstack.graphs import names
from shortstack.graphs.ir.builder import MICROSOFT, GraphBuilder
from shortstack.graphs.ir.weights import BlockMatrix
from shortstack.graphs.precision import ACCURACY_LEVEL


def project(g: GraphBuilder, x: ir.Value, weight: str, node: str) -> ir.Value:
    """Append the product of ``x`` [..., in] with a projection; returns [..., out]."""
    g.projected[weight] = x
    matrix = g.block_matrix(weight)
    if matrix is None:
        return g.op("MatMul", [x, g.weight(weight)], f"{node}/MatMul")
    return _block_product(g, x, weight, matrix, node)


def head_product(g: GraphBuilder, x: ir.Value, weight: str, node: str) -> ir.Value:
    """Append the product of ``x`` [rows, hidden] with a head's weight; returns logits [rows, vocab]."""
    g.projected[weight] = x
    matrix = g.block_matrix(weight)
    if matrix is None:
        return g.op("Gemm", [x, g.weight(weight)], f"{node}/Gemm", transB=1)
    out = _block_product(g, x, weight, matrix, node)
    if (first := g.block_matrix(names.first_rows(weight))) is None:
        return out
    logits = _block_product(g, x, names.first_rows(weight), first, f"{node}/first_rows")
    return g.op("Concat", [logits, out], f"{node}/Concat", axis=-1)


def embed(g: GraphBuilder, ids: ir.Value, weight: str, node: str) -> ir.Value:
    """Append the look-up of token ids [batch, seq] in an embedding; returns [batch, seq, hidden]."""
    matrix = g.block_matrix(weight)
    if matrix is None:
        return g.op("Gather", [g.weight(weight), ids], f"{node}/Gather")
    first = g.block_matrix(names.first_rows(weight))
    if first is None:
        return _block_rows(g, ids, weight, matrix, node)
    # Both look something up, the one that has the id is taken.
    limit, last, zero = g.constant(first.rows), g.constant(first.rows - 1), g.constant(0)
    low = _block_rows(g, g.op("Min", [ids, last], f"{node}/Min"), names.first_rows(weight), first, f"{node}/first_rows")
    shifted = g.op("Max", [g.op("Sub", [ids, limit], f"{node}/Sub"), zero], f"{node}/Max")
    high = _block_rows(g, shifted, weight, matrix, node)
    is_first = g.op("Unsqueeze", [g.op("Less", [ids, limit], f"{node}/Less"), g.constant([-1])], f"{node}/Unsqueeze")
    return g.op("Where", [is_first, low, high], f"{node}/Where")


def _block_rows(g: GraphBuilder, ids: ir.Value, weight: str, matrix: BlockMatrix, node: str) -> ir.Value:
    """Append the look-up of rows [batch, seq] in a matrix stored in blocks; returns [batch, seq, width]."""
    block_format = matrix.format
    assert not block_format.is_reordered, f"{weight} is looked up in, and has no input"
    blocks = block_format.blocks(matrix.width)
    flat = (matrix.rows, blocks * block_format.code_bytes)
    inputs = [g.reshaped_weight(names.block_codes(weight), flat), ids, g.weight(names.block_scales(weight))]
    if not block_format.is_symmetric:
        inputs.append(g.weight(names.block_zero_points(weight)))
    out = g.op(
        "GatherBlockQuantized",
        inputs,
        f"{node}/GatherBlockQuantized",
        domain=MICROSOFT,
        gather_axis=0,
        quantize_axis=1,
        bits=block_format.bits,
        block_size=block_format.block_size,
    )
    if blocks * block_format.block_size == matrix.width:
        return out
    # The last block is longer than the row: [batch, seq, blocks * block_size] -> [batch, seq, hidden].
    return g.op("Slice", [out, g.constant([0]), g.constant([matrix.width]), g.constant([-1])], f"{node}/drop_padding")


def _extended(g: GraphBuilder, x: ir.Value, weight: str, matrix: BlockMatrix) -> ir.Value:
    """Append what the further columns of a matrix multiply behind ``x`` [batch, seq, width].

    First the side product's A x, then the sums of the blocks of ``x``. Made once for all products of one input.
    """
    blocks, size = matrix.format.blocks(matrix.width), matrix.format.block_size
    factor = names.side_factor(weight) if matrix.format.side_columns else None

    def extend() -> ir.Value:
        parts, last = [x], "block_sums" if factor is None else "side"
        if factor is not None:
            right = g.block_matrix(factor)
            assert right is not None, f"{factor} is not stored"
            parts.append(_block_product(g, x, factor, right, f"{x.name}/side"))  # [batch, seq, side columns]
        if matrix.format.has_offsets:
            node = f"{x.name}/block_sums"
            by_block = g.op("Reshape", [x, g.constant([0, 0, blocks, size])], f"{node}/Reshape", allowzero=0)
            parts.append(g.op("ReduceSum", [by_block, g.constant([3])], f"{node}/ReduceSum", keepdims=0))
        return g.op("Concat", parts, f"{x.name}/{last}/Concat", axis=-1)

    return g.once((x.name, size, factor, matrix.format.has_offsets), extend)


def _reordered(g: GraphBuilder, x: ir.Value, weight: str, node: str) -> ir.Value:
    """Append the columns of ``x`` [..., width] in the order of a matrix; made once for all products of one input."""
    order = names.input_order(weight)
    return g.once((x.name, order), lambda: g.op("Gather", [x, g.weight(order)], f"{node}/input_order/Gather", axis=-1))


def _block_product(g: GraphBuilder, x: ir.Value, weight: str, matrix: BlockMatrix, node: str) -> ir.Value:
    if matrix.format.is_reordered:
        x = _reordered(g, x, weight, node)
    if matrix.format.has_offsets or matrix.format.side_columns:
        x = _extended(g, x, weight, matrix)
    inputs = [x, g.weight(names.block_codes(weight)), g.weight(names.block_scales(weight))]
    if not matrix.format.is_symmetric:
        inputs.append(g.weight(names.block_zero_points(weight)))
    return g.op(
        "MatMulNBits",
        inputs,
        f"{node}/MatMulNBits",
        domain=MICROSOFT,
        K=matrix.format.stored_width(matrix.width),
        N=matrix.rows,
        bits=matrix.format.bits,
        block_size=matrix.format.block_size,
        accuracy_level=ACCURACY_LEVEL,
    )
