"""Exits without a gradient step: least squares from what an exit reads to the state of the whole model.

A linear exit that sees states is fitted in rounds, as in DAgger (https://arxiv.org/abs/1011.0686): the first on true
states, each later one also on the states that the fit before would have fed back, one draft deeper every round. Also
here: the best low-rank head for the states that it will meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from shortstack.export.twin.exits import ExitNode, states_before
from shortstack.export.twin.layer import unit_rms
from shortstack.export.twin.model import Twin
from shortstack.samples.recipes.training.exit_batches import SpanBatch, load_spans
from shortstack.samples.recipes.training.features import Features

_ROWS = 64
_FED_BACK_WEIGHT = 0.7  # of positions whose state is a guess, against those with the true one


@torch.no_grad()
def fit_linear(
    node: ExitNode,
    twin: Twin,
    features: Features,
    rows: Sequence[int],
    *,
    rounds: int = 3,
    ridge: float = 3.0,
    advance: Callable[[float], None] = lambda _: None,
) -> None:
    """Set the linear map of a linear exit by ridge regression to the whole model's state, on positions of answers.

    Args:
        node: The exit; a gated MLP next to the map is left as it is, and must be zero.
        twin: The model.
        features: Its activations.
        rows: Rows to fit on.
        rounds: Passes over the rows; 1 for an exit that sees no state.
        ridge: Added to the diagonal of the inputs' second moments, whose entries are about the number of positions.
        advance: Told the rows done in each round.
    """
    assert node.exit_spec.branch == "linear"
    inputs = node.linear.weight.shape[1]
    moments = torch.zeros(inputs + 1, inputs + 1)
    products = torch.zeros(inputs + 1, node.spec.hidden_size)
    depth = node.exit_spec.exit_layer
    for fed_back in range(rounds if node.exit_spec.sees_state else 1):
        for start in range(0, len(rows), _ROWS):
            batch = load_spans(features, rows[start : start + _ROWS], (depth,), whole_rows=False)
            before, counts = batch.state_before, batch.counts
            for _ in range(fed_back):
                before, counts = guessed_before(node, twin, batch, before), later(counts)
            u = node.linear_input(
                batch.boundaries[depth].hidden[counts], embeddings(twin, batch)[counts], before[counts]
            )
            u = functional.pad(u, (0, 1), value=1.0)  # [positions, inputs + 1]
            weight = _FED_BACK_WEIGHT if fed_back else 1.0
            moments += weight * (u.T @ u)
            products += weight * (u.T @ batch.state[counts])
            advance(float(len(batch.ids)))
        solved = torch.linalg.solve((moments + ridge * torch.eye(len(moments))).double(), products.double()).float()
        node.linear.weight.copy_(solved[:-1].T)
        node.linear.bias.copy_(solved[-1])


def embeddings(twin: Twin, batch: SpanBatch) -> Tensor:
    """Return the tokens' embeddings [batch, seq, hidden]."""
    return twin.embedded(batch.ids)


def guessed_before(node: ExitNode, twin: Twin, batch: SpanBatch, before: Tensor) -> Tensor:
    """Return the states of the positions before as the exit guesses them, given ``before`` [batch, seq, hidden]."""
    boundary = batch.boundaries[node.exit_spec.exit_layer]
    return states_before(unit_rms(node.branch(boundary, embeddings(twin, batch), before, twin).float(), node.eps))


def later(counts: Tensor) -> Tensor:
    """Return which positions [batch, seq] count if each needs one more that counts before it."""
    return counts & functional.pad(counts, (1, 0))[:, :-1]


@torch.no_grad()
def low_rank_factors(weight: Tensor, inputs: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the A [rank, hidden] and B [rows, rank] that minimise the mean of |W y - B A y|^2 over the inputs.

    With C = L L^T the inputs' second moments: the truncated singular value decomposition of W L, times L^-1.

    Args:
        weight: W [rows, hidden].
        inputs: Some y [positions, hidden].
        rank: Width between the two.
    """
    moments = inputs.double().T @ inputs.double() / len(inputs)
    moments += 1e-4 * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)
    root = torch.linalg.cholesky(moments)
    # W L = U S V^T; its right factors are the eigenvectors of (W L)^T (W L), which is small
    scaled = weight.double() @ root
    _, vectors = torch.linalg.eigh(scaled.T @ scaled)
    right = vectors[:, -rank:].flip(-1)  # [hidden, rank]
    down = torch.linalg.solve_triangular(root.T, right, upper=True).T  # A = V^T L^-1
    return down.float(), (scaled @ right).float()
