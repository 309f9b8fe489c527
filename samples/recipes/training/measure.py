"""What a trained stack is worth, on text it has not seen: agreement of exits with the last layer, quality by depth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from shortstack.export.twin.exits import ExitNode
from shortstack.export.twin.model import Boundary, Twin
from shortstack.samples.recipes.training.data import Example, collate
from shortstack.samples.recipes.training.precision import autocast

_BATCH = 16
_ROWS = 512


@dataclass(frozen=True, slots=True)
class DepthQuality:
    """What the final norm and head predict after some layers, on the tokens that count.

    Attributes:
        agreement: Part of the positions where the most likely token is the last layer's: the acceptance of a draft of
            one token.
        accuracy: Part of the positions where it is the token of the text.
        perplexity: exp of the mean cross-entropy in nats.
    """

    agreement: float
    accuracy: float
    perplexity: float

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        return asdict(self)


@torch.no_grad()
def measure_depths(
    twin: Twin,
    examples: Sequence[Example],
    depths: Sequence[int],
    device: str = "cpu",
    *,
    use_bf16: bool = False,
    exits: Mapping[int, ExitNode] = MappingProxyType({}),
    exit_ids: Tensor | None = None,
) -> dict[int, DepthQuality]:
    """Measure exits, and the last layer itself.

    Args:
        twin: The model; its mode is kept.
        examples: Text that is not trained on.
        depths: Exit layers; L is added.
        device: Where the model is.
        use_bf16: Compute in bfloat16.
        exits: Exit nodes with the whole vocabulary, by depth; other depths go through the shared final norm and head.
        exit_ids: The only tokens that an exit can predict, int64 [rows]; None is all. Perplexity is over all tokens.

    Returns:
        Quality by depth.
    """
    was_training = twin.training
    twin.eval()
    last = twin.spec.num_hidden_layers
    wanted = sorted({*depths, last})
    sums = {depth: [0.0, 0.0, 0.0] for depth in wanted}
    count = 0
    ordered = sorted(examples, key=lambda example: len(example.ids))
    for start in range(0, len(ordered), _BATCH):
        batch = collate(ordered[start : start + _BATCH]).to(device)
        with autocast(device, use_bf16):
            found = twin.boundaries(batch.ids, wanted)
            streams = {depth: exit_stream(twin, exits.get(depth), found[depth], batch.ids) for depth in wanted}
            for begin in range(0, len(batch.rows), _ROWS):
                rows, targets = batch.rows[begin : begin + _ROWS], batch.targets[begin : begin + _ROWS]
                logits = {d: _logits(twin, exits.get(d), streams[d].flatten(0, 1)[rows]).float() for d in wanted}
                best = logits[last].argmax(-1)
                for depth, sum_of in sums.items():
                    if exit_ids is None or depth == last:
                        guess = logits[depth].argmax(-1)
                    else:
                        guess = exit_ids[logits[depth][:, exit_ids].argmax(-1)]
                    sum_of[0] += float((guess == best).sum())
                    sum_of[1] += float((guess == targets).sum())
                    sum_of[2] += float(functional.cross_entropy(logits[depth], targets, reduction="sum"))
        count += len(batch.rows)
    twin.train(was_training)
    return {
        depth: DepthQuality(agree / count, right / count, math.exp(min(nats / count, 50.0)))
        for depth, (agree, right, nats) in sums.items()
    }


def exit_stream(twin: Twin, node: ExitNode | None, boundary: Boundary, ids: Tensor) -> Tensor:
    """Return what an exit puts in the place of the last layer's output, [batch, seq, hidden].

    Args:
        twin: The model.
        node: The exit; None is the shared norm and head on the residual stream as it is.
        boundary: What the stack holds at its depth.
        ids: Token ids [batch, seq].
    """
    if node is None:
        return boundary.hidden
    tokens = twin.embedded(ids).float() if node.exit_spec.sees_token else None
    return node.branch(boundary, tokens, None, twin)


def _logits(twin: Twin, node: ExitNode | None, stream: Tensor) -> Tensor:
    return twin.logits(stream) if node is None else node.logits(stream, twin)
