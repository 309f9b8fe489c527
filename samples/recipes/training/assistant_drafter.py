"""An assistant as the drafter that loss, measurement and loop train."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shortstack.export.twin.layer import Norm, unit_rms
from shortstack.export.twin.model import Twin
from shortstack.samples.recipes.training.assistant_files import write_assistant
from shortstack.samples.recipes.training.assistant_head import Assistant
from shortstack.samples.recipes.training.assistant_unroll import unroll
from shortstack.samples.recipes.training.drafter_batches import DraftBatch


@dataclass(frozen=True, slots=True)
class AssistantDrafter:
    """A :class:`~shortstack.samples.recipes.training.trained_drafter.TrainedDrafter`.

    Attributes:
        net: The assistant.
    """

    net: Assistant

    @property
    def depths(self) -> tuple[int, ...]:
        """The depths of the model's residual stream below the layers whose keys and values it reads."""
        return self.net.spec.depths

    def unroll(self, twin: Twin, batch: DraftBatch, steps: int) -> Iterator[Tensor]:
        """Yield y of each step."""
        return unroll(self.net, twin, batch, steps)

    def logits(self, rows: Tensor) -> Tensor:
        """Return the scores of y."""
        return self.net.logits(rows)

    def unit_state(self, rows: Tensor, twin: Twin) -> Tensor:
        """Return the state that y passes on, without the weight of the model's final norm, as the model's are kept."""
        guess, norm = self.net.state(rows), twin.model.norm
        assert isinstance(norm, Norm)
        weight = torch.where(norm.weight == 0, 1.0, norm.weight)
        return unit_rms(guess / weight, self.net.spec.eps)

    def further_parameters(self) -> int:
        """Return those of all of it: every draft reads the same."""
        return sum(value.numel() for value in self.net.parameters() if value.ndim == 2)

    def write(self, folder: Path) -> None:
        """Write the assistant."""
        write_assistant(self.net, folder)
