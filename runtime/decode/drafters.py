"""Where drafted tokens come from. A drafter proposes; what it proposes is judged, so it changes speed and never output.

The loop (:mod:`shortstack.runtime.decode.speculative`) knows the protocol alone. A drafter says how many rows of the
round it has already run through the lowest level: the exit has run the rows that it drafted from, since the judging run
reads what they left there. A drafter that does not run the model says 0, and the loop runs those rows. A drafter that
needs to see prompts wraps the :class:`~shortstack.runtime.engine.decoder.Decoder` that the loop receives.

:class:`ExitDrafter` is the lowest exit of the stack, which makes decoding self-speculative (LayerSkip, arXiv
2404.16710). To add a drafter: one file in this folder, and one line in ``runtime/loops.py``, where requests become
loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shortstack.runtime.decode.choice import Choice, Proposal
from shortstack.runtime.engine.decoder import Decoder


@dataclass(frozen=True, slots=True)
class Draft:
    """What a drafter proposes for one round.

    Attributes:
        proposals: Tokens that follow the newest one, in order; none makes the round a plain step.
        rows_run: Rows of the round, from the first, that the lowest level has run on already.
    """

    proposals: Sequence[Proposal]
    rows_run: int = 0


class Drafter(Protocol):
    """Proposes tokens."""

    def draft(self, past: int, tokens: Sequence[int], most: int, least_confidence: float) -> Draft:
        """Propose up to ``most`` tokens.

        Args:
            past: Position of the newest token; row r of the round is position ``past + r``. Its row 0 is set.
            tokens: The text so far, the newest token last. Not to be changed or kept.
            most: Tokens to propose at most, 1 or more.
            least_confidence: Stop after a token that is less likely than this; 0 never stops.
        """
        ...

    def observe(self, emitted: int, rows: int) -> None:
        """Learn what became of a round, or of a plain step between rounds.

        Args:
            emitted: Tokens that the round emitted: rows ``0..emitted - 1`` belong to the text.
            rows: Rows that were judged.
        """
        ...


class ExitDrafter:
    """The lowest exit of the stack drafts, row by row.

    Args:
        stack: The model, cut at that exit.
        choice: How tokens are chosen.
    """

    def __init__(self, stack: Decoder, choice: Choice) -> None:
        self._stack = stack
        self._choice = choice

    def draft(self, past: int, tokens: Sequence[int], most: int, least_confidence: float) -> Draft:
        """See :meth:`Drafter.draft`."""
        stack, choice = self._stack, self._choice
        # A greedy choice looks at no text, and the graph has put the token that it takes in the next row already.
        drawn = list(tokens) if choice.needs_logits else []
        proposals: list[Proposal] = []
        for row in range(most):
            stack.draft(row, past, with_head=True, with_logits=choice.needs_logits)
            proposals.append(choice.propose(stack.exit, row, drawn or tokens, stack.exit_layer))
            if choice.needs_logits:
                stack.put(row + 1, proposals[-1].token)
                drawn.append(proposals[-1].token)
            if proposals[-1].confidence < least_confidence:
                break
        return Draft(proposals, rows_run=len(proposals))

    def observe(self, emitted: int, rows: int) -> None:
        """See :meth:`Drafter.observe`; the exit shares the model's cache and state, so there is nothing to follow."""
