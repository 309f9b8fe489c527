"""A network that drafts over a trimmed vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class DraftingNet(nn.Module):
    """What networks of all drafters have.

    Args:
        spec: What the network is, a frozen dataclass; among others ``vocab_size``, the token ids of the model.
        ids: The token ids of the rows of its LM head, ascending, int64 [draft vocabulary].

    Attributes:
        spec: See above.
        ids: These.
        row_of: The row of each token id of the model; -1 for those that it cannot draft.
    """

    spec: Any
    ids: Tensor
    row_of: Tensor

    def __init__(self, spec: Any, ids: Tensor) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("ids", ids, persistent=False)
        row_of = torch.full((spec.vocab_size,), -1, device=ids.device)
        row_of[ids] = torch.arange(len(ids), device=ids.device)
        self.register_buffer("row_of", row_of, persistent=False)
