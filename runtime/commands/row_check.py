"""Whether this machine computes several rows of one run as it computes them one by one: what "lossless" rests on.

Verifying M drafted tokens in one run equals decoding them one by one only if each row's result does not depend on how
many rows a run has. Kernels differ by processor and by version: measured here, through the bundle's own graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shortstack.graphs.errors import RequestError
from shortstack.runtime.model import Model

MOST_ROWS = 8


@dataclass(frozen=True, slots=True)
class RowCheck:
    """Runs of M rows against M runs of one row.

    Attributes:
        rows: M.
        max_difference: Largest difference of a logit, over its row's largest magnitude.
        same_tokens: Whether every row has the same most likely token.
    """

    rows: int
    max_difference: float
    same_tokens: bool

    @property
    def is_exact(self) -> bool:
        """Whether every logit is the same, bit for bit."""
        return self.max_difference == 0.0


def check_rows(model: Model, tokens: Sequence[int], most_rows: int = MOST_ROWS) -> list[RowCheck]:
    """Run the end of a text in runs of M rows and one by one, for M = 1..most_rows.

    Args:
        model: The bundle; its generation before is over.
        tokens: The text, longer than ``most_rows``.
        most_rows: The largest M.

    Raises:
        RequestError: The text is too short.
    """
    past = len(tokens) - most_rows
    if past < 1:
        raise RequestError("the text of the self-test", found=f"{len(tokens)} tokens", expected=f"over {most_rows}")
    stack = model.exclusive_stack()
    stack.prefill(tokens[:past], 0, with_logits=False)
    ending = tokens[past:]
    alone = []
    for row, token in enumerate(ending):
        stack.put(0, token)
        stack.verify(1, past + row, with_logits=True)
        alone.append(stack.final.logits[0].astype(np.float32))
    singles = np.stack(alone)  # [most_rows, vocab]
    checks = []
    for rows in range(1, most_rows + 1):
        for row, token in enumerate(ending[:rows]):
            stack.put(row, token)
        stack.verify(rows, past, with_logits=True)
        together, expected = stack.final.logits[:rows].astype(np.float32), singles[:rows]
        scale = np.abs(expected).max(axis=1, keepdims=True)
        checks.append(
            RowCheck(
                rows,
                float((np.abs(together - expected) / scale).max()),
                bool((together.argmax(axis=1) == expected.argmax(axis=1)).all()),
            )
        )
    return checks
