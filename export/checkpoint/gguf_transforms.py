"""What llama.cpp's converter changed in tensors, undone: a closed list.

==================  ==============================================================================================
transform           how a tensor is read
==================  ==============================================================================================
queries, keys       rows of each head move from neighbouring pairs, (2i, 2i + 1), back to halves, (i, i + head / 2)
heads_together      rows of all q, then all k, then all v become the q, k, v of each head (GPT-NeoX)
minus_one           1 is subtracted, which the converter added to the norms of Gemma
turned              [out, in] becomes [in, out] (GPT-2)
==================  ==============================================================================================

The first three move whole rows. So they move the rows of blocks, too, and these stay what they are.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from shortstack.graphs.errors import CheckpointError

Transform = Literal["queries", "keys", "heads_together", "minus_one", "turned"]
Number = TypeVar("Number", bound=np.generic)
Rows = npt.NDArray[np.int64]


def row_order(transform: Transform | None, rows: int, heads: int, kv_heads: int) -> Rows | None:
    """Return which row of the stored tensor each row of ours is; None for all, as they are.

    Args:
        transform: How the tensor is read.
        rows: Its rows.
        heads: Query heads.
        kv_heads: Key/value heads.

    Raises:
        CheckpointError: The rows do not divide into so many heads.
    """
    if transform == "queries":
        return unpermute(np.arange(rows), heads)
    if transform == "keys":
        return unpermute(np.arange(rows), kv_heads)
    if transform == "heads_together":
        if rows % (3 * heads):
            raise CheckpointError(f"{rows} rows of q, k and v do not divide into {heads} heads")
        return np.arange(rows).reshape(3, heads, -1).swapaxes(0, 1).reshape(-1)
    return None


def unpermute(value: npt.NDArray[Number], heads: int) -> npt.NDArray[Number]:
    """Undo the row permutation of llama.cpp's ``LlamaModel.permute``.

    llama.cpp rotates neighbouring rows (2i, 2i + 1) of a head; transformers rotates rows i and i + head_dim / 2.

    Args:
        value: A weight of q or k [heads * head_dim, hidden], or a bias or row numbers [heads * head_dim].
        heads: Query heads for q, key/value heads for k.

    Raises:
        CheckpointError: The rows do not divide into heads of even width.
    """
    if heads <= 0 or value.shape[0] % (2 * heads):
        raise CheckpointError(
            f"{value.shape[0]} rows of a q or k projection do not divide into {heads} heads of even width"
        )
    pairs = value.reshape(heads, value.shape[0] // heads // 2, 2, *value.shape[1:])
    return pairs.swapaxes(1, 2).reshape(value.shape)
