"""What an exit drafts on held-out answers, the way decoding uses it.

The first draft of a round is made on the true state of the position before, later ones on the states that the exit
guessed itself.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from shortstack.export.twin.exits import ExitNode
from shortstack.export.twin.model import Twin
from shortstack.samples.recipes.training.closed_form import embeddings, guessed_before
from shortstack.samples.recipes.training.draft_cost import Drafts
from shortstack.samples.recipes.training.exit_batches import following, held_out_batches, load_spans
from shortstack.samples.recipes.training.exit_loss import rows_of
from shortstack.samples.recipes.training.features import Features
from shortstack.samples.recipes.training.measure import DepthQuality

_ROWS = 16


@torch.no_grad()
def measure_drafts(node: ExitNode, twin: Twin, features: Features, drafts: int = 4) -> Drafts:
    """Draft from every position of every held-out answer.

    Args:
        node: The exit.
        twin: The model.
        features: Its activations.
        drafts: Tokens drafted from each position.
    """
    depth = node.exit_spec.exit_layer
    whole_rows = node.exit_spec.branch == "block"
    was_training = node.training
    node.eval()
    rights, sures, usables, lengths = [], [], [], []
    for rows in held_out_batches(features, _ROWS):
        batch = load_spans(features, rows, (depth,), whole_rows=whole_rows)
        before = batch.state_before
        follows = batch.targets[:, :-1] == batch.ids[:, 1:]  # the text continues as the whole model predicts
        usable = batch.counts
        right, sure, able = [], [], []
        for draft in range(drafts):
            if draft == 0 or node.exit_spec.sees_state:
                if draft:
                    before = guessed_before(node, twin, batch, before)
                out = node.logits(node.branch(batch.boundaries[depth], embeddings(twin, batch), before, twin), twin)
                hits = out.argmax(-1) == rows_of(node, batch.targets)
                confident = out.softmax(-1).amax(-1)
            # draft d from position t is the exit at t + d, on a chain that began d positions before
            right.append(_ahead(hits, draft)[batch.counts])
            sure.append(_ahead(confident, draft)[batch.counts])
            able.append(usable[batch.counts])
            usable = usable & functional.pad(_ahead(follows, draft), (0, 1)) & _ahead(batch.counts, draft + 1)
        rights.append(torch.stack(right, -1))
        sures.append(torch.stack(sure, -1))
        usables.append(torch.stack(able, -1))
        lengths += batch.counts.sum(-1).tolist()
    node.train(was_training)
    return Drafts(
        is_right=torch.cat(rights).numpy(),
        confidence=torch.cat(sures).numpy().astype(np.float32),
        is_usable=torch.cat(usables).numpy(),
        answer_ends=np.cumsum(lengths),
    )


def _ahead(x: Tensor, places: int) -> Tensor:
    """Return x [batch, seq] with each value moved ``places`` positions to the front; zeros behind."""
    return functional.pad(x, (0, places))[:, places:] if places else x


@torch.no_grad()
def measure_exit(node: ExitNode, twin: Twin, features: Features) -> DepthQuality:
    """Measure an exit on held-out answers, with the true state of the position before.

    Agreement counts every position. Accuracy and perplexity are against the text, perplexity over the tokens that the
    exit's head can predict.
    """
    depth = node.exit_spec.exit_layer
    tally = _Tally()
    for rows in held_out_batches(features, _ROWS):
        batch = load_spans(features, rows, (depth,), whole_rows=node.exit_spec.branch == "block")
        x = node.branch(batch.boundaries[depth], embeddings(twin, batch), batch.state_before, twin)
        logits = node.logits(x[batch.counts], twin)
        said, text = batch.targets[batch.counts], following(batch)[batch.counts]
        tally.add(logits, rows_of(node, said), rows_of(node, text), int((text >= 0).sum()))
    return tally.quality()


@torch.no_grad()
def measure_last(twin: Twin, features: Features) -> DepthQuality:
    """Measure the whole model on held-out answers."""
    tally = _Tally()
    for rows in held_out_batches(features, _ROWS):
        batch = load_spans(features, rows, (), whole_rows=False)
        logits = twin.logits(batch.state[batch.counts])
        text = following(batch)[batch.counts]
        tally.add(logits, batch.targets[batch.counts], text, int((text >= 0).sum()))
    return tally.quality()


class _Tally:
    """Sums over positions, and the qualities they make."""

    def __init__(self) -> None:
        self.positions = self.agreeing = self.followed = self.right = self.sayable = 0
        self.nats = 0.0

    def add(self, logits: Tensor, said: Tensor, text: Tensor, followed: int) -> None:
        """Add positions.

        Args:
            logits: The exit's [positions, rows].
            said: Row of the whole model's next token, -1 if there is none [positions].
            text: The same of the text's.
            followed: Positions after which the text continues.
        """
        best = logits.argmax(-1)
        self.positions += len(best)
        self.agreeing += int((best == said).sum())
        self.followed += followed
        self.right += int((best == text).sum())
        can = text >= 0
        self.sayable += int(can.sum())
        self.nats += float(functional.cross_entropy(logits[can].float(), text[can], reduction="sum"))

    def quality(self) -> DepthQuality:
        """Return the qualities."""
        nats = self.nats / max(self.sayable, 1)
        return DepthQuality(
            self.agreeing / self.positions, self.right / max(self.followed, 1), math.exp(min(nats, 50.0))
        )
