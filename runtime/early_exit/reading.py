"""What an exit computes for one position: everything that a criterion may use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shortstack.runtime.engine.decoder import LeveledState


@dataclass(frozen=True, slots=True)
class Reading:
    """The outputs of one exit for one position.

    Attributes:
        exit_layer: Layers run before the exit.
        token: The most likely token.
        top_prob: The probability of that token, 0..1.
        margin: Its probability minus that of the second most likely token, 0..1.
        entropy: Entropy of the distribution in nats.
        gate: Output of the exit's learned gate, 0..1; None without a gate.
        similarity: Cosine between the residual stream here and at the exit below, -1..1; None at the lowest exit, or
            if the criterion does not need it.
        position: Tokens generated before this one.
        max_new_tokens: The most tokens that the generation may emit.
        below: The readings of the exits below for the same position, lowest first.
    """

    exit_layer: int
    token: int
    top_prob: float
    margin: float
    entropy: float
    gate: float | None
    similarity: float | None
    position: int
    max_new_tokens: int
    below: tuple[Reading, ...]


def read(
    stack: LeveledState,
    level: int,
    row: int,
    below: Sequence[Reading],
    *,
    position: int,
    max_new_tokens: int,
    with_similarity: bool,
) -> Reading:
    """Return the reading of a level's exit for a row on which the level has just run."""
    head = stack.heads[level]
    similarity = None
    if with_similarity and level:
        similarity = cosine(stack.hidden(level - 1, row), stack.hidden(level, row))
    return Reading(
        exit_layer=stack.depths[level],
        token=int(head.token[row]),
        top_prob=float(head.top_prob[row]),
        margin=float(head.margin[row]),
        entropy=float(head.entropy[row]),
        gate=None if head.gate is None else float(head.gate[row]),
        similarity=similarity,
        position=position,
        max_new_tokens=max_new_tokens,
        below=tuple(below),
    )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Return the cosine between two vectors, in float32; 0 if one of them is zero."""
    x, y = a.astype(np.float32, copy=False), b.astype(np.float32, copy=False)
    norms = float(np.sqrt(np.dot(x, x) * np.dot(y, y)))
    return float(np.dot(x, y)) / norms if norms > 0 else 0.0
