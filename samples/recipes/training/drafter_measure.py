"""What a trained drafter drafts on held-out answers, as decoding does: each round starts on what the model computed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from shortstack.export.twin.model import Twin
from shortstack.graphs.spec import ModelSpec
from shortstack.samples.recipes.training.draft_cost import Costs, Drafts, layer_parameters
from shortstack.samples.recipes.training.drafter_batches import DraftBatch, Row, load_batch
from shortstack.samples.recipes.training.features import Features
from shortstack.samples.recipes.training.trained_drafter import TrainedDrafter

_TEXTS = 16


@torch.no_grad()
def measure_drafter(
    drafter: TrainedDrafter, twin: Twin, sets: Sequence[Features], rows: Sequence[Row], drafts: int = 4
) -> Drafts:
    """Draft from every row of every text's window.

    A chain of drafts is compared as long as the text goes on as the model says, as greedy answers do.

    Args:
        drafter: The drafter.
        twin: The model.
        sets: Its features.
        rows: Which texts.
        drafts: Tokens drafted from each row.
    """
    was_training = drafter.net.training
    drafter.net.eval()
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    lengths: list[int] = []
    for start in range(0, len(rows), _TEXTS):
        batch = load_batch(sets, rows[start : start + _TEXTS], drafter.depths)
        found.append(_drafted(drafter, twin, batch, drafts))
        lengths += batch.counts.sum(-1).tolist()
    drafter.net.train(was_training)
    right, sure, usable = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Drafts(right, sure, usable, np.cumsum(lengths))


def alphas_of_rounds(drafts: Drafts) -> list[float]:
    """Return alpha of draft 1, 2, ... in rounds as decoding plays them: each begins behind what the last one gave."""
    most = drafts.is_right.shape[1]
    right, judged = np.zeros(most), np.zeros(most)
    position = 0
    for end in drafts.answer_ends.tolist():
        while position < end:
            usable = int(np.cumprod(drafts.is_usable[position]).sum())
            accepted = int(np.cumprod(drafts.is_right[position, :usable]).sum())
            right[:accepted] += 1
            judged[: min(accepted + 1, usable)] += 1
            position = min(position + accepted + 1, end)
    return [float(value) for value in right / np.maximum(judged, 1)]


def _drafted(
    drafter: TrainedDrafter, twin: Twin, batch: DraftBatch, drafts: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return is_right, confidence and is_usable of the rows that count, [rows, drafts] each."""
    right, sure, able = [], [], []
    usable = batch.counts
    for draft, rows in enumerate(drafter.unroll(twin, batch, drafts)):
        logits = drafter.logits(rows).float()
        hits = (drafter.net.ids[logits.argmax(-1)] == batch.targets) & batch.counts
        top = torch.exp(logits.amax(-1) - logits.logsumexp(-1))
        # Draft j from a row is step j of the row that is j further on.
        right.append(_ahead(hits, draft)[batch.counts])
        sure.append(_ahead(top, draft)[batch.counts])
        able.append(usable[batch.counts])
        usable = usable & _ahead(batch.follows, draft) & _ahead(batch.counts, draft + 1)
    return (
        torch.stack(right, -1).numpy(),
        torch.stack(sure, -1).numpy().astype(np.float32),
        torch.stack(able, -1).numpy(),
    )


def _ahead(x: torch.Tensor, places: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, places))[:, places:] if places else x


def further_draft_cost(drafter: TrainedDrafter, spec: ModelSpec, costs: Costs) -> float:
    """Return f: the parameters that a further draft reads, in those of a plain step."""
    layers = sum(layer_parameters(spec, layer) for layer in range(spec.num_hidden_layers))
    return drafter.further_parameters() / (layers + spec.vocab_size * spec.hidden_size) + costs.launch
