"""The loss of exits on a frozen model, from cached activations: EE-LLM's, distillation, fed-back drafts, CALM's gate.

An exit that sees states is unrolled as it will draft: on the true state of the position before, then on its own guess
of it, and so on (the idea of EAGLE, https://arxiv.org/abs/2401.15077, with the alignment of HASS,
https://arxiv.org/abs/2408.15766).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from shortstack.export.twin.exits import ExitNode, states_before
from shortstack.export.twin.layer import unit_rms
from shortstack.export.twin.model import Twin
from shortstack.samples.recipes.training.closed_form import embeddings
from shortstack.samples.recipes.training.exit_batches import SpanBatch, following

Target = Literal["model", "text"]


@dataclass(frozen=True, slots=True)
class ExitLossSpec:
    """What exits are trained for.

    Attributes:
        target: ``model``: Kullback-Leibler divergence from the whole model's distribution over the exit's rows;
            ``text``: cross-entropy with the next token, as EE-LLM trains.
        hard: Of the former: part that is cross-entropy with the whole model's most likely token instead.
        is_token_weighted: Each position's loss is multiplied with the exit's top-1 probability, detached (EE-LLM).
        regression: Weight of the smooth L1 distance between the states guessed and true, for exits that see states.
        unroll: Drafts in a row, for exits that see states.
    """

    target: Target = "model"
    hard: float = 0.0
    is_token_weighted: bool = False
    regression: float = 5.0
    unroll: int = 3


@dataclass(frozen=True, slots=True)
class ExitLoss:
    """The loss of one exit on one batch.

    Attributes:
        loss: To be minimised.
        agreement: Part of the positions where the exit predicts what the whole model does, with the true state before.
    """

    loss: Tensor
    agreement: float


def exit_loss(node: ExitNode, twin: Twin, batch: SpanBatch, spec: ExitLossSpec) -> ExitLoss:
    """Compute the loss of one exit: a mean over positions of answers, summed over the drafts in a row.

    A draft counts only behind drafts that were accepted, so that each weighs as often as decoding would make it.
    """
    hidden = batch.boundaries[node.exit_spec.exit_layer].hidden
    before, counts = batch.state_before, batch.counts
    text = following(batch)
    total, agreement, positions = torch.zeros(()), 0.0, int(counts.sum())
    for draft in range(spec.unroll if node.exit_spec.sees_state else 1):
        x = _branch(node, twin, batch, before, counts).float()  # [positions, hidden]
        logits = node.logits(x, twin).float()  # [positions, rows]
        said = rows_of(node, batch.targets[counts])
        right = logits.argmax(-1) == said
        wanted = said if spec.target == "model" else rows_of(node, text[counts])
        share = len(x) / positions
        total = total + share * _mean(_token_loss(node, twin, batch.state[counts], logits, wanted, spec), wanted >= 0)
        if draft == 0:
            agreement = float(right.float().mean())
            if node.exit_spec.has_gate:
                total = total + gate_loss(node, hidden[counts], right)
        if node.exit_spec.sees_state:
            guess = unit_rms(x, node.eps)
            distance = functional.smooth_l1_loss(guess, batch.state[counts], reduction="none").mean(-1)
            total = total + share * spec.regression * distance.mean()
            before = states_before(torch.zeros_like(batch.state).index_put(torch.where(counts), guess))
            accepted = torch.zeros_like(counts).index_put(torch.where(counts), right)
            counts = batch.counts & functional.pad(accepted, (1, 0))[:, :-1]
            if not counts.any():
                break
    return ExitLoss(total, agreement)


def _branch(node: ExitNode, twin: Twin, batch: SpanBatch, before: Tensor, counts: Tensor) -> Tensor:
    """Return what the branch makes of the positions that count, [positions, hidden]."""
    boundary, tokens = batch.boundaries[node.exit_spec.exit_layer], embeddings(twin, batch)
    if node.exit_spec.branch != "linear":
        return node.branch(boundary, tokens, before, twin)[counts]
    return node.linear(node.linear_input(boundary.hidden[counts], tokens[counts], before[counts]))  # type: ignore[no-any-return]


def rows_of(node: ExitNode, tokens: Tensor) -> Tensor:
    """Return the row of the exit's head for each token id; -1 for those that a trimmed head does not have."""
    if node.ids is None:
        return tokens
    place = torch.searchsorted(node.ids, tokens).clamp(max=len(node.ids) - 1)
    return torch.where(node.ids[place] == tokens, place, -1)


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    """Return the mean of the values that count; 0 if none does."""
    return (values * counts).sum() / counts.sum().clamp(min=1)


def _token_loss(
    node: ExitNode, twin: Twin, state: Tensor, logits: Tensor, wanted: Tensor, spec: ExitLossSpec
) -> Tensor:
    """Return each position's loss in nats.

    Args:
        node: The exit.
        twin: The model.
        state: What the whole model holds [positions, hidden].
        logits: What the exit predicts [positions, rows].
        wanted: The row of the token to predict; where it is -1, what is returned means nothing [positions].
        spec: What exits are trained for.
    """
    said = logits.log_softmax(-1)
    nats = -said.gather(-1, wanted.clamp(min=0)[:, None]).squeeze(-1)
    if spec.target == "model" and spec.hard < 1.0:
        with torch.no_grad():
            head = twin.head_weight if node.ids is None else twin.head_weight[node.ids]
            model = functional.linear(twin.state(state), head).float().log_softmax(-1)
        nats = (1 - spec.hard) * (model.exp() * (model - said)).sum(-1) + spec.hard * nats
    if spec.is_token_weighted:
        nats = nats * said.detach().amax(-1).exp()
    return nats


def gate_loss(node: ExitNode, hidden: Tensor, right: Tensor) -> Tensor:
    """Return CALM's loss of a gate: class-balanced cross-entropy with "the exit predicts what the model predicts".

    Section 3.3 of https://arxiv.org/abs/2207.07061. Trains the gate only.

    Args:
        node: The exit.
        hidden: The residual stream at the boundary [positions, hidden].
        right: The labels, bool [positions].
    """
    said = node.gate(unit_rms(hidden.detach(), node.eps)).squeeze(-1).float()
    loss = functional.binary_cross_entropy_with_logits(said, right.float(), reduction="none")
    classes = [loss[kind].mean() for kind in (right, ~right) if kind.any()]
    return torch.stack(classes).mean()


def weighted_sum(losses: Mapping[int, ExitLoss], weights: Mapping[int, float]) -> Tensor:
    """Return EE-LLM's loss: each exit's, times its weight."""
    return torch.stack([weights[depth] * one.loss for depth, one in losses.items()]).sum()
