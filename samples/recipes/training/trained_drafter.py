"""What loss, measurement and loop ask of a drafter that is trained beside a frozen model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from torch import Tensor

from shortstack.export.twin.model import Twin
from shortstack.samples.recipes.training.drafter_batches import DraftBatch
from shortstack.samples.recipes.training.drafting_net import DraftingNet


class TrainedDrafter(Protocol):
    """A drafter of one kind; *rows* are those of its last layer's output, [..., width]."""

    @property
    def net(self) -> DraftingNet:
        """What is trained."""

    @property
    def depths(self) -> tuple[int, ...]:
        """The depths of the model's residual stream that it reads, ascending."""

    def unroll(self, twin: Twin, batch: DraftBatch, steps: int) -> Iterator[Tensor]:
        """Yield the rows of the windows in each step of the training-time test, [texts, window, width].

        The first j rows of step j begin in the prompt and mean nothing.
        """

    def logits(self, rows: Tensor) -> Tensor:
        """Return the scores of the rows' tokens, [..., draft vocabulary]."""

    def unit_state(self, rows: Tensor, twin: Twin) -> Tensor:
        """Return the model's state that rows guess, divided by its root mean square, [..., model hidden]."""

    def further_parameters(self) -> int:
        """Return the parameters of matrices that a further draft of a round reads."""

    def write(self, folder: Path) -> None:
        """Write it for ``export --drafter``; one that is there is replaced."""
