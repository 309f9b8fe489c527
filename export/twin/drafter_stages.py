"""Several layers that draft one token each, in PyTorch; the formula of :mod:`shortstack.graphs.drafter_spec`.

A stage is a twin of one layer (:class:`~shortstack.export.twin.drafter.DrafterTwin`) with a projection and norms of its
own. Stage i of row p reads what stage i - 1 gave for that row, and the token at p + 1 + i. It stands at position p.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from shortstack.export.twin.drafter import DrafterTwin
from shortstack.export.twin.drafter_parts import Drafted, DraftedText, DrafterWeights, ModelParts, with_given
from shortstack.graphs import names
from shortstack.graphs.drafter_spec import DrafterSpec
from shortstack.graphs.drafter_weights import stage_of, stage_part


class StagesTwin:
    """The :class:`~shortstack.export.twin.drafter_parts.TwinOfDrafter` of such layers.

    Args:
        spec: What they are.
        weights: Their weights.
        model: What they use of their model.

    Attributes:
        spec: What they are.
        head_ids: The rows of the heads.
    """

    def __init__(self, spec: DrafterSpec, weights: DrafterWeights, model: ModelParts) -> None:
        self.spec = spec
        self._stages = [
            DrafterTwin(
                replace(spec, layers=(own,), layer_per_draft=False),
                DrafterWeights(
                    {
                        part.removeprefix(stage_part("", number)): value
                        for part, value in weights.parts.items()
                        if stage_of(spec, part) == number
                    },
                    (weights.layers[number],),
                    weights.rope_factors,
                ),
                model,
            )
            for number, own in enumerate(spec.layers)
        ]
        self.head_ids = self._stages[0].head_ids

    def fused(self, taps: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`TwinOfDrafter.fused`."""
        return taps[names.DRAFT_STATE]

    def all_rows(self, text: DraftedText) -> list[Drafted]:
        """See :meth:`TwinOfDrafter.all_rows`: stage i has T - 1 - i rows."""
        found, states = list[Drafted](), text.states
        for number, stage in enumerate(self._stages):
            if ids := text.tokens[1 + number :]:
                found.append(stage.rows(states[: len(ids)], ids))
                states = found[-1].states
        return found

    def round(self, text: DraftedText, length: int) -> _StagesRound:
        """See :meth:`TwinOfDrafter.round`."""
        return _StagesRound(self._stages, text.states[: length - 1], text.tokens[:length])


class _StagesRound:
    def __init__(self, stages: Sequence[DrafterTwin], states: Tensor, tokens: Sequence[int]) -> None:
        self._stages, self._states, self._tokens = stages, states, tokens

    def draft(self, before: Sequence[int], given: Tensor | None = None) -> Drafted:
        """See :meth:`TwinRound.draft`: all rows of the next stage, the last ones of which pair with drafts."""
        number, states = len(before), with_given(self._states, given)
        found = self._stages[number].rows(states, [*self._tokens, *before][1 + number :], heads=1)
        self._states = found.states
        return found
