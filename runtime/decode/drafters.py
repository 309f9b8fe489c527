"""Where drafted tokens come from. The whole model judges them all, so a drafter changes the speed and not the output.

The loop (:mod:`shortstack.runtime.decode.speculative`) knows only the protocol. The judging run reads what the lowest
level left in each row, so every row must have run through that level. A drafter reports how many rows of the round it
has run there already, and the loop runs the others. The exit has run the rows that it drafted from; a drafter that does
not run the model reports 0. A drafter that needs to see prompts wraps the
:class:`~shortstack.runtime.engine.decoder.State` that the loop receives.

A request names a drafter by a value, its :class:`DraftSource`. With :class:`FromExit` the lowest exit of the stack
drafts, which makes decoding self-speculative (LayerSkip, arXiv 2404.16710). A new drafter is one file in this folder
with a source of its own, which ``Speculate(source=...)`` takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shortstack.graphs.errors import RequestError
from shortstack.graphs.plan import SplitPlan
from shortstack.runtime.decode.choice import Choice, Proposal
from shortstack.runtime.decode.runs import Asking, DraftRow
from shortstack.runtime.engine.decoder import State


@dataclass(frozen=True, slots=True)
class Draft:
    """A drafter's proposal for one round.

    Attributes:
        proposals: Tokens that follow the newest one, in order; without any the round is a plain step.
        rows_run: How many rows of the round, from the first, the drafter has run through the lowest level.
        first_s: Seconds of the first proposal, where it costs another time than further ones.
        behind_s: Seconds before it that a usual round does not cost, as for a prompt that the drafter had not seen.
    """

    proposals: Sequence[Proposal]
    rows_run: int = 0
    first_s: float | None = None
    behind_s: float = 0.0


class Drafter(Protocol):
    """Proposes tokens."""

    def draft(self, past: int, tokens: Sequence[int], most: int, least_confidence: float) -> Draft | Asking[Draft]:
        """Propose up to ``most`` tokens.

        A drafter that runs the model is a generator: it yields the runs that it needs, and returns the proposals.

        Args:
            past: Position of the newest token. Row r of the round is position ``past + r``; row 0 holds the newest
                token already.
            tokens: The text so far, with the newest token last. A drafter must neither change nor keep it.
            most: The most tokens to propose, 1 or more.
            least_confidence: Stop after a proposal whose ``confidence`` is below this; 0 never stops.
        """
        ...

    def start(self, tokens: Sequence[int], cached: int) -> int:
        """Begin a text, before its prompt runs.

        Args:
            tokens: The prompt.
            cached: How many of its positions are in the model's cache already, from the text before.

        Returns:
            How many of these may stay. A drafter that must see the model run a position names fewer.
        """
        ...

    def end(self) -> None:
        """End the text."""
        ...

    def observe(self, emitted: int, rows: int) -> None:
        """Learn the outcome of a round, or of a plain step between rounds.

        Args:
            emitted: Tokens that the round emitted, so rows ``0..emitted - 1`` belong to the text.
            rows: Rows that were judged.
        """
        ...


class DraftSource(Protocol):
    """A drafter as a request names it: a frozen value, by which what was learned about its drafts is kept."""

    def exits_in(self, plan: SplitPlan) -> tuple[int, ...]:
        """Return the exits at which the stack is cut for it, ascending; none for a drafter that uses no exit.

        Raises:
            RequestError: A bundle of this plan does not have them.
        """
        ...

    def drafter(self, stack: State, choice: Choice) -> Drafter:
        """Return the drafter for one generation over a stack that is cut so."""
        ...


@dataclass(frozen=True, slots=True)
class FromExit:
    """An exit drafts.

    Attributes:
        exit_layer: Which one, by the number of layers run before it; None takes the lowest.
    """

    exit_layer: int | None = None

    def exits_in(self, plan: SplitPlan) -> tuple[int, ...]:
        """See :meth:`DraftSource.exits_in`."""
        exits = plan.boundaries
        if not exits and plan.drafter is not None:
            raise RequestError(
                "an exit cannot draft, since this bundle has none",
                found=self.exit_layer,
                remedy="leave out the exit, so that the bundle's trained drafter drafts",
            )
        if not exits:
            raise RequestError(
                "self-speculation needs an exit, and this bundle has none",
                remedy=f"re-export with --exit-layer {self.exit_layer or 'E'}, or use the plain strategy",
            )
        if self.exit_layer is not None and self.exit_layer not in exits:
            raise RequestError(
                "exit_layer is not an exit of this bundle",
                found=self.exit_layer,
                expected=f"one of {list(exits)}",
                remedy=f"re-export with --exit-layer {self.exit_layer}"
                if 0 < self.exit_layer < plan.num_layers
                else f"choose one of these; the model has {plan.num_layers} layers",
            )
        return (exits[0] if self.exit_layer is None else self.exit_layer,)

    def drafter(self, stack: State, choice: Choice) -> Drafter:
        """See :meth:`DraftSource.drafter`."""
        return ExitDrafter(stack, choice)


class ExitDrafter:
    """Drafts row by row with the lowest exit of the stack.

    Args:
        stack: The model, cut at that exit.
        choice: How tokens are chosen.
    """

    def __init__(self, stack: State, choice: Choice) -> None:
        self._stack = stack
        self._choice = choice

    def draft(self, past: int, tokens: Sequence[int], most: int, least_confidence: float) -> Asking[Draft]:
        """See :meth:`Drafter.draft`."""
        stack, choice = self._stack, self._choice
        # A greedy choice does not look at the text, and the graph has already put its token in the next row.
        drawn = list(tokens) if choice.needs_logits else []
        proposals: list[Proposal] = []
        for row in range(most):
            yield DraftRow(row, past, with_head=True, with_logits=choice.needs_logits)
            proposals.append(choice.propose(stack.exit, row, drawn or tokens, stack.exit_layer))
            if choice.needs_logits:
                stack.put(row + 1, proposals[-1].token)
                drawn.append(proposals[-1].token)
            if proposals[-1].confidence < least_confidence:
                break
        return Draft(proposals, rows_run=len(proposals))

    def start(self, tokens: Sequence[int], cached: int) -> int:
        """See :meth:`Drafter.start`."""
        return cached

    def end(self) -> None:
        """See :meth:`Drafter.end`."""

    def observe(self, emitted: int, rows: int) -> None:
        """See :meth:`Drafter.observe`; the exit shares the model's cache and state, so there is nothing to do."""
