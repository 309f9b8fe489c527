"""What a drafter is trained for: the model's next tokens, at each step of the training-time test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from shortstack.export.twin.model import Twin
from shortstack.samples.recipes.training.drafter_batches import DraftBatch
from shortstack.samples.recipes.training.trained_drafter import TrainedDrafter


@dataclass(frozen=True, slots=True)
class DrafterLossSpec:
    """What a drafter is trained for.

    Attributes:
        steps: Of the training-time test.
        decay: Weight of each step's loss in that of the step before; the paper's implementation has 0.8.
        hard: Part of the loss on the model's most likely token alone; the rest is on its distribution over the draft
            vocabulary.
        regression: Weight of the smooth L1 distance between the state that a row guesses, norm aside, and the model's
            own, as in EAGLE-1; EAGLE-3 has none.
    """

    steps: int
    decay: float
    hard: float
    regression: float = 0.0


def drafter_loss(drafter: TrainedDrafter, twin: Twin, batch: DraftBatch, spec: DrafterLossSpec) -> list[Tensor]:
    """Return the mean loss of each step, in nats per row.

    Rows whose token the drafter cannot draft teach nothing, and are left out.
    """
    targets = drafter.net.row_of[batch.targets]
    counts = batch.counts & (targets >= 0)
    soft = None
    if spec.hard < 1.0:
        with torch.no_grad():
            states = twin.state(batch.state[counts])
            products = functional.linear(states, twin.head_weight[drafter.net.ids])
            known = torch.zeros((*counts.shape, len(drafter.net.ids)), dtype=torch.float32)
            known[counts] = twin.scaled_logits(products.float()).softmax(-1)
            soft = known
    losses = []
    for step, rows in enumerate(drafter.unroll(twin, batch, spec.steps)):
        taught = counts.clone()
        taught[:, :step] = False
        found = drafter.logits(rows[taught]).float().log_softmax(-1)
        if not len(found):
            losses.append(rows.sum() * 0.0)
            continue
        loss = found.new_zeros(())
        if spec.hard:
            loss = spec.hard * functional.nll_loss(found, targets[taught])
        if soft is not None:
            loss = loss - (1 - spec.hard) * (soft[taught] * found).sum(-1).mean()
        if spec.regression:
            guess = drafter.unit_state(rows[taught], twin)
            loss = loss + spec.regression * functional.smooth_l1_loss(guess, batch.state[taught])
        losses.append(loss)
    return losses


def weighted(losses: Sequence[Tensor], decay: float) -> Tensor:
    """Return the weighted mean of the steps' losses."""
    weights = [decay**step for step in range(len(losses))]
    total = torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum()
    return total / sum(weights)
