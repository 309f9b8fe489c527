"""How a token is chosen from a head's outputs, and how a draft is judged: greedily or by exact rejection sampling.

Greedy choice reads the token that the graph has already chosen, so logits never reach Python. Sampling, and greedy
choice with a repetition penalty, read logits and work on distributions. A drafted token x is kept with probability
min(1, p(x) / q(x)). The first rejected token is replaced by a draw from max(0, p - q), normalised. The emitted tokens
are then distributed exactly as p (Leviathan et al., arXiv 2211.17192, theorem 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shortstack.runtime.decode.sampling import (
    Distribution,
    SamplingParams,
    accept,
    distribution,
    not_finite,
    residual,
)
from shortstack.runtime.engine.head import Head


@dataclass(frozen=True, slots=True)
class Proposal:
    """One drafted token.

    Attributes:
        token: Its id.
        confidence: The probability that the drafter gives to its most likely token there.
        depth: Layers run to predict it; 0 if no layer of the model was run for it.
        drawn_from: The distribution that it was drawn from; None if it was not drawn at random, such as a greedy draft
            or one found by lookup.
        source: What proposed it, such as ``lookup``; empty for an exit and for a trained drafter.
    """

    token: int
    confidence: float
    depth: int
    drawn_from: Distribution | None = None
    source: str = ""

    @property
    def origin(self) -> str:
        """The name by which it is counted: its source, ``exit``, or ``drafter`` where no layer of the model ran."""
        return self.source or ("exit" if self.depth else "drafter")


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of verification.

    Attributes:
        tokens: The tokens to emit, at most one per verified row.
        accepted: How many of them are accepted drafts; these come first.
    """

    tokens: tuple[int, ...]
    accepted: int


class Choice(Protocol):
    """A rule that picks tokens."""

    @property
    def needs_logits(self) -> bool:
        """Whether heads must return logits."""
        ...

    def pick(self, head: Head, row: int, context: Sequence[int]) -> int:
        """Choose the token that follows ``context`` from a head's outputs in ``row``."""
        ...

    def propose(self, head: Head, row: int, context: Sequence[int], depth: int) -> Proposal:
        """Draft the token that follows ``context`` from the outputs in ``row`` of the head after ``depth`` layers."""
        ...

    def judge(self, head: Head, rows: int, drafts: Sequence[Proposal], context: Sequence[int]) -> Verdict:
        """Judge drafts that follow ``context`` by the final head's outputs in rows 0..rows-1.

        Args:
            head: The final head.
            rows: As many as there are drafts, or one more for the token after the last draft.
            drafts: The drafted tokens, in order.
            context: The text before them.
        """
        ...


def confidence_of(head: Head, row: int) -> float:
    """Return the probability that a head gives to its most likely token in a row.

    Raises:
        ContractError: It is no number: weights or activations hold NaN or infinity, and the token means nothing.
    """
    confidence = float(head.top_prob[row])
    if not math.isfinite(confidence):
        raise not_finite("the probability of the most likely token", confidence)
    return confidence


class GreedyChoice:
    """Takes the most likely token, which the graph has already chosen. Its probability must be a number."""

    needs_logits = False

    def pick(self, head: Head, row: int, context: Sequence[int]) -> int:
        """See :class:`Choice`."""
        confidence_of(head, row)
        return int(head.token[row])

    def propose(self, head: Head, row: int, context: Sequence[int], depth: int) -> Proposal:
        """See :class:`Choice`."""
        return Proposal(int(head.token[row]), confidence_of(head, row), depth)

    def judge(self, head: Head, rows: int, drafts: Sequence[Proposal], context: Sequence[int]) -> Verdict:
        """See :class:`Choice`."""
        wanted = head.token[:rows].tolist()
        accepted = 0
        while accepted < len(drafts) and drafts[accepted].token == wanted[accepted]:
            accepted += 1
        for row in range(min(accepted + 1, rows)):  # the rows that decided
            confidence_of(head, row)
        return Verdict(tuple(wanted[: accepted + 1]), accepted)


class SampledChoice:
    """Draws from the distribution that the sampling parameters describe.

    Args:
        params: Temperature, truncation, penalty, seed.
    """

    needs_logits = True

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._rng = params.generator()

    def pick(self, head: Head, row: int, context: Sequence[int]) -> int:
        """See :class:`Choice`."""
        return self._distribution(head, row, context).sample(self._rng)

    def propose(self, head: Head, row: int, context: Sequence[int], depth: int) -> Proposal:
        """See :class:`Choice`."""
        offered = self._distribution(head, row, context)
        return Proposal(offered.sample(self._rng), confidence_of(head, row), depth, offered)

    def judge(self, head: Head, rows: int, drafts: Sequence[Proposal], context: Sequence[int]) -> Verdict:
        """See :class:`Choice`."""
        emitted: list[int] = []
        context = list(context)
        for row in range(rows):
            wanted = self._distribution(head, row, context)
            if row == len(drafts):
                return Verdict((*emitted, wanted.sample(self._rng)), len(emitted))
            token = drafts[row].token
            offered = drafts[row].drawn_from or Distribution.point(token)
            if not accept(wanted, offered, token, self._rng):
                return Verdict((*emitted, residual(wanted, offered).sample(self._rng)), len(emitted))
            emitted.append(token)
            context.append(token)
        return Verdict(tuple(emitted), len(emitted))

    def _distribution(self, head: Head, row: int, context: Sequence[int]) -> Distribution:
        logits, ids = head.candidates(row)
        return distribution(logits, self._params, context, ids=ids)


def make_choice(params: SamplingParams) -> Choice:
    """Return the cheapest rule for these sampling parameters."""
    return SampledChoice(params) if params.needs_logits else GreedyChoice()
