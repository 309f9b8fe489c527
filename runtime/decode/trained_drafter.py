"""A trained drafter of the bundle drafts: an EAGLE head, or a layer for multi-token prediction.

It runs no layer of the model. It reads what the model left of the rows before, so a round begins with a refill, which
is the first draft (:mod:`shortstack.runtime.engine.drafter_rows`).

No output depends on a drafter. So where its own numbers overflow, as they may in float16, the rest of the text is
decoded plainly, and the log warns once for each loaded model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from shortstack.graphs.errors import ContractError, RequestError
from shortstack.graphs.plan import SplitPlan
from shortstack.runtime.decode.choice import Choice, Proposal
from shortstack.runtime.decode.drafters import Draft
from shortstack.runtime.decode.runs import Asking, OwnRun
from shortstack.runtime.engine.decoder import State


@dataclass(frozen=True, slots=True)
class FromDrafter:
    """The bundle's trained drafter drafts."""

    def exits_in(self, plan: SplitPlan) -> tuple[int, ...]:
        """See :meth:`DraftSource.exits_in`: it uses no exit."""
        if plan.drafter is None:
            raise RequestError(
                "this bundle has no trained drafter",
                remedy="export it with --drafter, or let an exit draft",
            )
        return ()

    def drafter(self, stack: State, choice: Choice) -> TrainedDrafter:
        """See :meth:`DraftSource.drafter`."""
        return TrainedDrafter(stack, choice)


class TrainedDrafter:
    """Drafts with the trained drafter of a bundle.

    Args:
        stack: The model, uncut.
        choice: How tokens are chosen.
    """

    def __init__(self, stack: State, choice: Choice) -> None:
        self._rows = stack.drafter
        self._clock = stack.clock
        self._choice = choice
        self._has_failed = False

    def start(self, tokens: Sequence[int], cached: int) -> int:
        """See :meth:`Drafter.start`."""
        return self._rows.start(tokens, cached)

    def draft(self, past: int, tokens: Sequence[int], most: int, least_confidence: float) -> Asking[Draft]:
        """See :meth:`Drafter.draft`: no proposals once the drafter has failed on the text."""
        rows, choice = self._rows, self._choice
        if self._has_failed:
            return Draft([])
        drawn = list(tokens) if choice.needs_logits else []
        proposals: list[Proposal] = []
        asked = self._clock()
        if rows.is_behind():
            yield OwnRun(partial(rows.catch_up, tokens))
        started, first_s = self._clock(), 0.0
        for row in range(min(most, rows.most_drafts)):
            if row == 0:
                yield OwnRun(partial(rows.refill, tokens, choice.needs_logits))
                first_s = self._clock() - started
            else:
                yield OwnRun(partial(rows.step, row, choice.needs_logits))
            try:
                proposals.append(choice.propose(rows.head, row, drawn or tokens, 0))
            except ContractError:  # probabilities that are no numbers
                rows.warn_of_overflow()
                self._has_failed = True
                break
            if choice.needs_logits:
                drawn.append(proposals[-1].token)
            if proposals[-1].confidence < least_confidence:
                break
            rows.put(row + 1, proposals[-1].token)
        return Draft(proposals, first_s=first_s, behind_s=started - asked)

    def observe(self, emitted: int, rows: int) -> None:
        """See :meth:`Drafter.observe`: the rows that belong to the text are queued for the next refill."""
        if not self._has_failed:
            self._rows.keep_round(emitted)

    def end(self) -> None:
        """See :meth:`Drafter.end`."""
        self._rows.end()
