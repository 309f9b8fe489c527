"""The training-time test of EAGLE-3 (https://arxiv.org/abs/2503.01840, section 3.2): a head run on its own states.

Step 0 runs the true rows of a window. Step j runs the same rows again as the j-th further draft of chains that began
j rows before: row p of step j reads what step j - 1 gave for row p - 1 as its state, and attends as in decoding::

    row p of step 0    true rows 0 ... p
    row p of step j    true rows 0 ... p-j, then row p-j+1 of step 1, ..., row p of step j

All steps of a row draft the same token x[p+2].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from shortstack.export.twin.layer import KeyValue
from shortstack.samples.recipes.training.drafter_batches import DraftBatch
from shortstack.samples.recipes.training.eagle_head import EagleHead


def unroll(head: EagleHead, batch: DraftBatch, embedding: Tensor, steps: int) -> Iterator[Tensor]:
    """Yield what each step gives for the window's rows: g, float [texts, window, hidden].

    The first j rows of step j begin in the prompt and mean nothing.

    Args:
        head: The head.
        batch: Some texts.
        embedding: The model's embedding [vocabulary, hidden].
        steps: How many steps.
    """
    positions = batch.positions[batch.window]  # [texts, window]
    u = head.fused(batch.features)  # [rows, hidden]
    tokens = functional.embedding(batch.next_ids, embedding)
    read = head.midlayer.read(tokens, u)  # [rows, 2 * hidden]
    true = head.key_value(read[batch.places], batch.positions[batch.places])
    tokens, state, read = tokens[batch.window], u[batch.window], read[batch.window]
    drafted: list[KeyValue] = []
    for step in range(steps):
        if step:
            state = moved(state, 1)
            read = head.midlayer.read(tokens, state)
            drafted.append(head.key_value(read, positions))
        seen = torch.arange(batch.places.shape[1]) <= positions[..., None] - step  # [texts, window, seq]
        mixed = chain_attention(head.query(read, positions), true, drafted, seen)
        state = head.midlayer.after_attention(state, mixed.transpose(1, 2).flatten(2))
        yield state


def chain_attention(query: Tensor, true: KeyValue, drafted: Sequence[KeyValue], seen: Tensor) -> Tensor:
    """Attend to true rows, and to the rows of one's own chain: [texts, heads, window, head_dim] -> the same.

    Args:
        query: Of the window's rows.
        true: Keys and values of the true rows, [texts, kv_heads, seq, head_dim] each.
        drafted: Those of the window's rows in step 1, 2, ..., [texts, kv_heads, window, head_dim] each.
        seen: Which true rows each row of the window sees, bool [texts, window, seq].
    """
    groups = query.shape[1] // true[0].shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in true)
    scale = query.shape[-1] ** -0.5
    scores = (query @ key.transpose(-1, -2)).float() * scale
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    last = len(drafted)
    # Step i of a chain is last - i rows before.
    chain = [
        tuple(moved(part.repeat_interleave(groups, dim=1), last - number) for part in pair)
        for number, pair in enumerate(drafted, start=1)
    ]
    own = [(query * key).sum(-1, keepdim=True).float() * scale for key, _ in chain]
    weights = torch.cat([scores, *own], dim=-1).softmax(-1).to(value.dtype)
    seq = scores.shape[-1]
    mixed: Tensor = weights[..., :seq] @ value
    for number, (_, value) in enumerate(chain):
        mixed = mixed + weights[..., seq + number, None] * value
    return mixed


def moved(x: Tensor, places: int) -> Tensor:
    """Return rows [..., rows, width] moved so many rows to the back, zeros in front."""
    return functional.pad(x, (0, 0, places, 0))[..., : x.shape[-2], :] if places else x
