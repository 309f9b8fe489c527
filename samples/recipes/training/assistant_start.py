"""How an assistant starts: as the best linear drafter of its width, with layers that add little yet.

By ridge regression the model's next state is a linear map W of token and state, both normalised. The head is the best
approximation of the model's of that rank, B A, so that y = A W [token; state] gives the drafts, and the least squares
of states on y give the way back.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from shortstack.export.twin.model import Twin
from shortstack.samples.recipes.training.assistant_head import Assistant, AssistantSpec
from shortstack.samples.recipes.training.closed_form import low_rank_factors
from shortstack.samples.recipes.training.drafter_batches import Row, load_batch
from shortstack.samples.recipes.training.features import Features

_TEXTS = 16  # read at once
_ROWS = 65_536  # most rows to fit on
_HEAD_ROWS = 16_384  # of these for the head
_RIDGE = 3.0
_LAYER_GAIN = 0.1  # of the products that add to the stream


@torch.no_grad()
def new_assistant(
    twin: Twin, spec: AssistantSpec, ids: Tensor, sets: Sequence[Features], rows: Sequence[Row]
) -> Assistant:
    """Return an assistant to train.

    Args:
        twin: The model.
        spec: What it is.
        ids: The token ids that it drafts, ascending.
        sets: The model's activations.
        rows: Texts of them to fit on; a random part of many.
    """
    assistant = Assistant(spec, ids)
    for name, module in assistant.named_modules():
        if isinstance(module, nn.Linear):
            gain = _LAYER_GAIN if name.endswith(("o_proj", "down_proj")) else 1.0
            module.weight.normal_(0.0, gain * module.in_features**-0.5)
    moments, products, states = _second_moments(assistant, twin, sets, rows)
    count = float(moments.diagonal().sum()) / len(moments)  # rows: entries of what is normalised are about 1
    both = torch.linalg.solve(moments + _RIDGE * torch.eye(len(moments), dtype=moments.dtype), products).T
    down, up = low_rank_factors(twin.head_weight[ids], states, min(spec.hidden_size, spec.model_hidden))
    guess = down.double() @ both  # [rank, 2 * model hidden]
    of_guess = guess @ moments @ guess.T
    size = float((of_guess.diagonal().sum() / (count * len(guess))).sqrt())  # root mean square of a row
    ridge = 1e-4 * of_guess.diagonal().mean() * torch.eye(len(of_guess), dtype=moments.dtype)
    back = torch.linalg.solve(of_guess + ridge, guess @ products).T  # [model hidden, rank]
    rank = len(guess)
    # The norm divides by the root mean square over all columns, of which some may be unused.
    scale = size * (rank / spec.hidden_size) ** 0.5
    assistant.pre_projection.weight.zero_()
    assistant.pre_projection.weight[:rank] = guess.float()
    assistant.model.norm.weight.fill_(scale)
    assistant.lm_head.weight[:, :rank] = up
    assistant.post_projection.weight[:, :rank] = back.float()
    return assistant


def _second_moments(
    assistant: Assistant, twin: Twin, sets: Sequence[Features], rows: Sequence[Row]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sums over rows: inputs by inputs, inputs by next states, in float64; and some of these states."""
    inputs, width = assistant.pre_projection.in_features, assistant.spec.model_hidden
    moments = torch.zeros(inputs, inputs, dtype=torch.float64)
    products = torch.zeros(inputs, width, dtype=torch.float64)
    order, done, kept = np.random.default_rng(0).permutation(len(rows)).tolist(), 0, list[Tensor]()
    for start in range(0, len(order), _TEXTS):
        batch = load_batch(sets, [rows[i] for i in order[start : start + _TEXTS]], ())
        window = batch.window[batch.counts]
        pair = assistant.pair(twin.embedded(batch.next_ids[window]), twin.state(batch.before[batch.counts]))
        states = twin.state(batch.state[batch.counts])
        moments += (pair.T @ pair).double()
        products += (pair.T @ states).double()
        if done < _HEAD_ROWS:
            kept.append(states[: _HEAD_ROWS - done])
        done += len(pair)
        if done >= _ROWS:
            break
    return moments, products, torch.cat(kept)
