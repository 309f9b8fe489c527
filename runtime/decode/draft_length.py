"""How many tokens to draft: a fixed number, fewer when the drafter is unsure, or as measured costs and acceptance say.

Let alpha be the probability that one drafted token is accepted, d the seconds of a draft row, v(r) the seconds to judge
r rows, and t the seconds of a plain step. On average a round of k drafts ::

    without bonus   emits (1 - alpha^k) / (1 - alpha) tokens        in k d + v(k) seconds
    with bonus      emits (1 - alpha^(k+1)) / (1 - alpha) tokens    in (k + 1) d + v(k + 1) seconds

With a trained drafter the first draft takes d0 seconds, which refills its cache, and a row for the last draft costs no
draft: k drafts take d0 + (k - 1) d.

The adaptive rule takes the k with the most tokens per second. If no k beats a plain step, it takes k = 0, a plain step:
drafting begins at a predicted gain of 2% and goes on until it would lose 1%.
(The formula is that of Leviathan et al., arXiv 2211.17192, section 3.3, with measured instead of assumed costs.) Rounds
of one row are not considered, since they emit one token, as a plain step does. Whichever of drafting and plain steps
loses is measured again after 8, 16, 32, ... choices (:mod:`.remeasure`), so that neither one slow run nor one hard
passage decides a whole generation.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shortstack.graphs.arguments import expect, expect_flags, is_between, is_whole
from shortstack.runtime.decode.remeasure import Remeasure
from shortstack.runtime.decode.round_costs import running_cost
from shortstack.runtime.decode.speed_up import predicted_speed_up

log = logging.getLogger(__name__)

USUAL_DRAFTS = 4
_ALPHA_WEIGHT = 0.1  # of one judged token in the running mean: a memory of about ten tokens
# Predictions vary from round to round. With one bound for both, drafting would go on and off around it.
_STARTS_AT = 1.02  # below this gain, drafting that is off is not worth its variance
_STAYS_AT = 0.99  # below this gain, drafting that is on loses


@dataclass(frozen=True, slots=True)
class DraftPolicy:
    """The rule for draft lengths that a caller asks for.

    Attributes:
        max_draft_tokens: The most tokens to draft in a round; 1..15.
        confidence: A draft ends after a token at which the drafter gives its most likely token less probability than
            this; 0 never ends a draft.
        is_adaptive: Choose the length from measured costs and acceptance instead of always drafting the maximum.
        has_bonus: Run the last drafted token as a row too, which gives one more token if all drafts are accepted.
        max_lookup_tokens: The most tokens to look up in a round, 1..15, where something else drafts as well; None: as
            many as ``max_draft_tokens``.
    """

    max_draft_tokens: int = USUAL_DRAFTS
    confidence: float = 0.0
    is_adaptive: bool = False
    has_bonus: bool = False
    max_lookup_tokens: int | None = None

    def __post_init__(self) -> None:
        most = self.max_draft_tokens
        expect(is_whole(most, 1, 15), "max_draft_tokens", most, "1..15")
        looked_up = self.max_lookup_tokens
        expect(looked_up is None or is_whole(looked_up, 1, 15), "max_lookup_tokens", looked_up, "1..15, or None")
        expect(is_between(self.confidence, 0, 1), "confidence", self.confidence, "0..1")
        expect_flags(self, "is_adaptive", "has_bonus")


class DraftRule(Protocol):
    """Chooses draft lengths for the loop."""

    least_confidence: float
    best_gain: float

    @property
    def has_bonus(self) -> bool:
        """Whether the last draft of the round that was chosen gets a row of its own."""
        ...

    def choose(self, max_rows: int, tokens: Sequence[int]) -> int:
        """Return how many tokens to draft in a round of at most ``max_rows`` rows after a text; 0 is a plain step."""
        ...

    def observe_plain(self, elapsed_s: float) -> None:
        """Learn the cost of a plain step."""
        ...

    def observe_round(
        self, drafted: int, accepted: int, rows: int, draft_s: float, verify_s: float, first_s: float | None = None
    ) -> None:
        """Learn from one judged draft; see :meth:`DraftLength.observe_round`."""
        ...


class DraftLength:
    """Chooses draft lengths by one policy, and keeps what it has learned from one generation to the next.

    Args:
        policy: The rule that the caller asks for.

    Attributes:
        has_bonus: See :class:`DraftPolicy`.
        least_confidence: The policy's ``confidence``, see :class:`DraftPolicy`.
        alpha: Running estimate of the probability that a judged token is accepted.
        best_gain: Predicted speed of the best draft length over plain decoding; 0 until costs are known.
    """

    def __init__(self, policy: DraftPolicy) -> None:
        self._policy = policy
        self.has_bonus = policy.has_bonus
        self.least_confidence = policy.confidence
        self.alpha = 0.7
        self.best_gain = 0.0
        self._draft_row_s: float | None = None
        self._first_draft_s: float | None = None  # where it has a cost of its own
        self._plain_s: float | None = None
        self._verify_s: dict[int, float] = {}
        self._is_winning: bool | None = None
        self._remeasure = Remeasure()

    def choose(self, max_rows: int, tokens: Sequence[int] = ()) -> int:
        """Return how many tokens to draft in a round of at most ``max_rows`` rows; 0 is a plain step."""
        most = min(self._policy.max_draft_tokens, max_rows)
        if not self._policy.is_adaptive:
            return most
        lengths = range(2 - self.has_bonus, min(most, max_rows - self.has_bonus) + 1)  # two rows at least
        if not lengths or self._plain_s is None:
            return 0
        if self._draft_row_s is None:
            return lengths[0]
        best = max(lengths, key=self.predicted_gain)
        self.best_gain = self.predicted_gain(best)
        is_winning = self.best_gain >= (_STAYS_AT if self._is_winning else _STARTS_AT)
        if is_winning != self._is_winning:
            self._is_winning = is_winning
            self._remeasure.restart()
            log.info(
                "drafting %s: rounds of %d drafts predicted at %.2fx of plain decoding",
                "on" if is_winning else "off",
                best,
                self.best_gain,
            )
        drafts_now = is_winning != self._remeasure.is_due()  # when it is due, the way that loses is taken
        return best if drafts_now else 0

    def predicted_gain(self, drafts: int) -> float:
        """Return the predicted speed of rounds with ``drafts`` drafted tokens over plain decoding."""
        assert self._plain_s is not None
        assert self._draft_row_s is not None
        judging_s = self._verify_cost_s(drafts + self.has_bonus)
        draft_s, bonus_s = self._draft_row_s, self._draft_row_s if self.has_bonus else None
        if self._first_draft_s is not None:
            draft_s = (self._first_draft_s + (drafts - 1) * self._draft_row_s) / drafts
            bonus_s = 0.0 if self.has_bonus else None
        return predicted_speed_up(self.alpha, drafts, draft_s, judging_s, bonus=bonus_s, plain=self._plain_s)

    def observe_plain(self, elapsed_s: float) -> None:
        """Learn the cost of a plain step."""
        self._plain_s = running_cost(self._plain_s, elapsed_s)

    def observe_round(
        self, drafted: int, accepted: int, rows: int, draft_s: float, verify_s: float, first_s: float | None = None
    ) -> None:
        """Learn from one judged draft.

        Args:
            drafted: Tokens drafted.
            accepted: Those of them that were accepted.
            rows: Rows judged.
            draft_s: Seconds of drafting.
            verify_s: Seconds of judging.
            first_s: Seconds of the first draft, where it costs another time than further ones.
        """
        for _ in range(accepted):
            self.alpha += _ALPHA_WEIGHT * (1.0 - self.alpha)
        if accepted < drafted:
            self.alpha -= _ALPHA_WEIGHT * self.alpha
        if first_s is None:
            self._draft_row_s = running_cost(self._draft_row_s, draft_s / rows)
        else:
            self._first_draft_s = running_cost(self._first_draft_s, first_s)
            if drafted > 1 or self._draft_row_s is None:
                row_s = (draft_s - first_s) / (drafted - 1) if drafted > 1 else first_s
                self._draft_row_s = running_cost(self._draft_row_s, row_s)
        self._verify_s[rows] = running_cost(self._verify_s.get(rows), verify_s)

    def _verify_cost_s(self, rows: int) -> float:
        """Return the seconds to judge ``rows`` rows, or the nearest number of rows that has been measured."""
        nearest = min(self._verify_s, key=lambda r: (abs(r - rows), r))
        return self._verify_s[nearest]
