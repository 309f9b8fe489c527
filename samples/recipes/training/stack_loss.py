"""The loss of a stack that learns to exit: cross-entropy at enabled exits and at the last layer, and distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from shortstack.export.twin.model import Twin
from shortstack.samples.recipes.training.data import Batch
from shortstack.samples.recipes.training.precision import short_attention


@dataclass(frozen=True, slots=True)
class ExitVocab:
    """The token ids that an exit can predict, as it will be exported with ``--draft-vocab``.

    Attributes:
        ids: Token ids int64 [rows], ascending.
        row_of: Row of each token id, -1 for those without one, int64 [vocab].
    """

    ids: Tensor
    row_of: Tensor

    @classmethod
    def most_frequent(cls, targets: Sequence[int], rows: int, vocab_size: int) -> ExitVocab:
        """Take the most frequent tokens of the training completions."""
        counts = torch.bincount(torch.tensor(targets), minlength=vocab_size)
        ids = counts.argsort(descending=True, stable=True)[:rows].sort().values
        row_of = torch.full((vocab_size,), -1)
        row_of[ids] = torch.arange(len(ids))
        return cls(ids, row_of)

    def to(self, device: str) -> ExitVocab:
        """Return the vocabulary on another device."""
        return ExitVocab(self.ids.to(device), self.row_of.to(device))


def stack_loss(
    twin: Twin,
    batch: Batch,
    weights: Mapping[int, float],
    exit_vocab: ExitVocab | None,
    teacher: Twin | None,
    distill: float,
) -> tuple[Tensor, dict[str, float]]:
    """Compute one batch's loss.

    Args:
        twin: The model.
        batch: The texts.
        weights: Loss weight by depth; layers above the deepest one do not run.
        exit_vocab: What exits can predict; None is the whole vocabulary.
        teacher: The original model, for distillation.
        distill: Weight of KL(teacher || last layer), in place of as much of the last layer's cross-entropy.

    Returns:
        The loss in nats per token, and its parts by name.
    """
    last = twin.spec.num_hidden_layers
    with short_attention(batch.ids.device.type, batch.ids.shape[1]):
        found = twin.boundaries(batch.ids, list(weights))
    total = torch.zeros((), device=batch.ids.device)
    parts: dict[str, float] = {}
    for depth, weight in weights.items():
        state = twin.state(found[depth].hidden.flatten(0, 1)[batch.rows])  # [rows, hidden]
        head, targets = twin.head_weight, batch.targets
        if depth != last and exit_vocab is not None:
            head, targets = head[exit_vocab.ids], exit_vocab.row_of[targets]
        logits = functional.linear(state, head.to(state.dtype)).float()
        loss = functional.cross_entropy(logits, targets, ignore_index=-1)
        parts["last" if depth == last else f"exit {depth}"] = float(loss.detach())
        if depth == last and teacher is not None and distill:
            with torch.no_grad():
                hidden = teacher.boundaries(batch.ids, (last,))[last].hidden.flatten(0, 1)[batch.rows]
                wanted = teacher.logits(hidden).float().log_softmax(-1)
            divergence = functional.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="batchmean")
            parts["distillation"] = float(divergence.detach())
            loss = (1 - distill) * loss + distill * divergence
        total = total + weight * loss
    return total, parts
