"""``g_idx``: the group of each column, where a tool has quantized columns in another order than they stand in.

GPTQ with ``desc_act`` rounds the columns with the largest inputs first, and columns that were rounded one after another
share a scale. So neighbours in the file may belong to any groups. Sorted by group, the columns of a group are
neighbours again, and the input is sorted in the same way.
"""

from __future__ import annotations

import numpy as np

from shortstack.export.checkpoint.quantized.codes import group_count
from shortstack.export.checkpoint.quantized.stored import StoredTensors, check_type, misfit
from shortstack.graphs.errors import CheckpointError
from shortstack.graphs.ir.block_tensor import Order

_QUANTIZE_AGAIN = "take the file from the model's repository again; if it is so there, the tool that wrote it erred"


def read_order(stored: StoredTensors, name: str, width: int, group: int) -> Order | None:
    """Read the group of each column.

    Args:
        stored: The folder.
        name: The tensor, int32 [width].
        width: Columns of the matrix.
        group: Columns of a group; -1 for one group.

    Returns:
        The columns sorted by group, int64 [width]; None where each stands in its place already.

    Raises:
        CheckpointError: Another shape or type, a group that does not exist, or groups of other sizes.
    """
    check_type(stored, name, ("I32", "I64"))
    if stored.shape(name) != (width,):
        raise misfit(stored, name, f"shape [{width}], the width of the matrix")
    index = stored.raw(name).astype(np.int64)
    if (index == -1).all():  # compressed-tensors' sign for "not used"
        return None
    count = group_count(width, group)
    if index.min() < 0 or index.max() >= count:
        bad = index.min() if index.min() < 0 else index.max()
        raise CheckpointError(
            stored.where(name), found=f"group {bad}", expected=f"groups 0..{count - 1}", remedy=_QUANTIZE_AGAIN
        )
    wanted = np.arange(width) // (width if group == -1 else group)
    if np.array_equal(index, wanted):
        return None
    order = np.argsort(index, kind="stable")
    if not np.array_equal(index[order], wanted):
        sizes = np.bincount(index, minlength=count)
        raise CheckpointError(
            stored.where(name),
            found=f"groups of {sizes.min()} to {sizes.max()} columns",
            expected=f"groups of {group} columns, as group_size says",
            remedy=_QUANTIZE_AGAIN,
        )
    return order
