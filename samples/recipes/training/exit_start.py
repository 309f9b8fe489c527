"""How an exit starts: copied from the model as EE-LLM does, at random, or in closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from shortstack.export.twin.exits import ExitNode
from shortstack.export.twin.layer import Layer
from shortstack.export.twin.model import Twin
from shortstack.graphs.errors import RequestError
from shortstack.graphs.plan import ExitSpec
from shortstack.samples.recipes.training.closed_form import fit_linear, low_rank_factors
from shortstack.samples.recipes.training.features import Features

Start = Literal["copy", "random"]
_RANDOM_STD = 0.02  # EE-LLM's --random-init
_HEAD_POSITIONS = 16_384  # states that a low-rank head is fitted to


@torch.no_grad()
def new_exit(
    twin: Twin,
    exit_spec: ExitSpec,
    ids: Tensor | None,
    features: Features,
    rows: Sequence[int],
    start: Start,
    advance: Callable[[float], None] = lambda _: None,
) -> ExitNode:
    """Make an exit.

    ``copy``: a head of its own starts as the LM head, or as its best approximation of the rank; a norm as the final
    norm, an MLP as that of the same layer, a block as the last layer that has all of its weights (EE-Tuning,
    https://arxiv.org/abs/2402.00518, section 3.1), and a linear branch in closed form. ``random``: N(0, 0.02), output
    projections divided by sqrt(2 E), norms of ones; a linear branch passes the residual stream on.

    Args:
        twin: The model.
        exit_spec: The exit.
        ids: Token ids of a trimmed head, int64 [rows].
        features: Activations of the model, for what is fitted.
        rows: Rows of them to fit on.
        start: How.
        advance: Told the rows done while fitting, in each of three rounds.

    Raises:
        RequestError: No layer has the weights of a block that is to be copied.
    """
    node = ExitNode(twin.spec, exit_spec)
    if ids is not None:
        node.head.ids = ids.clone()
    if start == "random":
        _draw(node)
        return node
    copy_from_model(node, twin)
    if exit_spec.branch == "linear":
        fit_linear(node, twin, features, rows, advance=advance)
    _fit_low_rank_head(node, twin, features, rows)
    return node


@torch.no_grad()
def copy_from_model(node: ExitNode, twin: Twin) -> None:
    """Start an exit's own norm, MLP, block and head as EE-LLM does: as the model's; see :func:`new_exit`."""
    exit_spec = node.exit_spec
    below = twin.model.layers[exit_spec.exit_layer - 1]
    assert isinstance(below, Layer)
    if exit_spec.norm == "own":
        node.norm.load_state_dict(twin.model.norm.state_dict())
    if exit_spec.branch == "mlp":
        node.mlp.load_state_dict(below.mlp.state_dict())
    if exit_spec.branch == "block":
        node.block.load_state_dict(_last_like(node.block, twin))
    if exit_spec.head == "own":
        node.head.weight.copy_(twin.head_weight if node.ids is None else twin.head_weight[node.ids])


def _last_like(block: nn.Module, twin: Twin) -> dict[str, Tensor]:
    """Return the weights of the last layer that has those of a block.

    A block has keys and values of its own and no branch on tokens. Layers that use another one's keys and values do not
    fit, and in some families neither do those with other heads or another width.
    """
    wanted = {name: value.shape for name, value in block.state_dict().items()}
    for layer in reversed(twin.model.layers):
        own = layer.state_dict()
        if all(name in own and own[name].shape == shape for name, shape in wanted.items()):
            return {name: own[name] for name in wanted}
    raise RequestError(
        "no layer of the model has the weights that this exit's block starts from",
        remedy="put the exit above another layer, or draw its weights: ee_tuning --start random",
    )


def _fit_low_rank_head(node: ExitNode, twin: Twin, features: Features, rows: Sequence[int]) -> None:
    if node.exit_spec.head == "low_rank":
        answers = np.concatenate([np.arange(features.answer_starts[row], features.starts[row + 1]) for row in rows])
        chosen = np.sort(np.random.default_rng(0).permutation(answers)[:_HEAD_POSITIONS])
        y = torch.from_numpy(features.state[chosen]).float()
        if node.exit_spec.norm != "none":
            y = twin.state(y)
        weight = twin.head_weight if node.ids is None else twin.head_weight[node.ids]
        down, up = low_rank_factors(weight, y, node.exit_spec.head_rank)
        node.head.down.weight.copy_(down)
        node.head.up.weight.copy_(up)


def _draw(node: ExitNode) -> None:
    for name, parameter in node.named_parameters():
        if parameter.ndim == 2 and name != "linear.weight" and not name.startswith("gate."):
            is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
            parameter.normal_(0.0, _RANDOM_STD / ((2 * node.exit_spec.exit_layer) ** 0.5 if is_output else 1.0))
