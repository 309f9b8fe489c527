"""An EAGLE-3 head as the drafter that loss, measurement and loop train."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from shortstack.export.twin.layer import unit_rms
from shortstack.export.twin.model import Twin
from shortstack.samples.recipes.training.drafter_batches import DraftBatch
from shortstack.samples.recipes.training.eagle_files import write_head
from shortstack.samples.recipes.training.eagle_head import EagleHead
from shortstack.samples.recipes.training.eagle_unroll import unroll


@dataclass(frozen=True, slots=True)
class EagleDrafter:
    """A :class:`~shortstack.samples.recipes.training.trained_drafter.TrainedDrafter`.

    Attributes:
        net: The head.
    """

    net: EagleHead

    @property
    def depths(self) -> tuple[int, ...]:
        """The depths of the model's residual stream that it reads."""
        return self.net.spec.features

    def unroll(self, twin: Twin, batch: DraftBatch, steps: int) -> Iterator[Tensor]:
        """Yield g of each step."""
        return unroll(self.net, batch, twin.model.embed_tokens.weight, steps)

    def logits(self, rows: Tensor) -> Tensor:
        """Return the scores of g."""
        return self.net.logits(rows)

    def unit_state(self, rows: Tensor, twin: Twin) -> Tensor:
        """Return g, which stands for the model's residual stream, divided by its root mean square."""
        return unit_rms(rows, self.net.spec.eps)

    def further_parameters(self) -> int:
        """Return those of layer and head: ``fc`` is for true rows alone."""
        named = self.net.named_parameters()
        return sum(value.numel() for name, value in named if value.ndim == 2 and not name.startswith("fc"))

    def write(self, folder: Path) -> None:
        """Write the head."""
        write_head(self.net, folder)
