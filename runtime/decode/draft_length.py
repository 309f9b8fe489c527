"""How many tokens to draft: fixed, cut short when the exit is unsure, or chosen from measured costs and acceptance.

With alpha the probability that one drafted token is accepted, d the seconds of a draft row, v(r) those of judging r
rows and t those of a plain step, a round of k drafts without bonus emits (1 - alpha^k) / (1 - alpha) tokens on
average and takes k d + v(k) seconds; with bonus it emits (1 - alpha^(k+1)) / (1 - alpha) and takes (k + 1) d + v(k +
1). The adaptive rule takes the k with the most tokens per second, and k = 0, a plain step, where no k wins (the
formula of Leviathan et al., arXiv 2211.17192, section 3.3, with measured instead of assumed costs). Rounds of one row
are not considered: they emit one token, as a plain step does. Whichever of drafting and plain steps loses is measured
again after 8, 16, 32, ... steps, so that neither one slow run nor one hard passage decides a whole generation.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from shortstack.graphs.errors import RequestError
from shortstack.runtime.decode.remeasure import Remeasure
from shortstack.runtime.decode.speed_up import predicted_speed_up

log = logging.getLogger(__name__)

_ALPHA_WEIGHT = 0.1  # of one judged token in the running mean: a memory of about ten tokens
_COST_WEIGHT = 0.2  # of one measurement in a running cost, if it is higher
_MUST_WIN_BY = 1.02  # below this a draft is not worth its variance


@dataclass(frozen=True, slots=True)
class DraftPolicy:
    """What the caller asks for.

    Attributes:
        max_draft_tokens: Drafted tokens per round at most; 1..15.
        confidence: Stop a draft after a token whose probability at the exit is below this; 0 never stops.
        is_adaptive: Choose the length from measured costs and acceptance instead of always drafting the maximum.
        has_bonus: Give the last drafted token a row of its own, for one more token after a full accept.
    """

    max_draft_tokens: int = 4
    confidence: float = 0.0
    is_adaptive: bool = False
    has_bonus: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.max_draft_tokens <= 15:
            raise RequestError("max_draft_tokens", found=self.max_draft_tokens, expected="1..15")
        if not 0.0 <= self.confidence <= 1.0:
            raise RequestError("confidence", found=self.confidence, expected="0..1")


class DraftLength:
    """What one policy has learned so far; outlives a generation.

    Args:
        policy: What the caller asks for.

    Attributes:
        has_bonus: See :class:`DraftPolicy`.
        least_confidence: A draft stops after a token that is less likely than this.
        alpha: Running probability that a judged token is accepted.
        best_gain: Predicted speed of the best draft length over plain decoding; 0 until costs are known.
    """

    def __init__(self, policy: DraftPolicy) -> None:
        self._policy = policy
        self.has_bonus = policy.has_bonus
        self.least_confidence = policy.confidence
        self.alpha = 0.7
        self.best_gain = 0.0
        self._draft_row_s: float | None = None
        self._plain_s: float | None = None
        self._verify_s: dict[int, float] = {}
        self._is_winning: bool | None = None
        self._remeasure = Remeasure()

    def choose(self, max_rows: int) -> int:
        """Return how many tokens to draft, 0 for a plain step, in a round of at most ``max_rows`` rows."""
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
        is_winning = self.best_gain >= _MUST_WIN_BY
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
        """Return the speed of rounds of ``drafts`` tokens over plain decoding, from what was measured so far."""
        assert self._plain_s is not None
        assert self._draft_row_s is not None
        judging_s = self._verify_cost_s(drafts + self.has_bonus)
        bonus_s = self._draft_row_s if self.has_bonus else None
        return predicted_speed_up(self.alpha, drafts, self._draft_row_s, judging_s, bonus=bonus_s, plain=self._plain_s)

    def observe_plain(self, elapsed_s: float) -> None:
        """Learn what a plain step takes."""
        self._plain_s = _cost_s(self._plain_s, elapsed_s)

    def observe_round(self, drafted: int, accepted: int, rows: int, draft_s: float, verify_s: float) -> None:
        """Learn from one judged draft: tokens drafted and accepted, rows run, seconds below and above the exit."""
        for _ in range(accepted):
            self.alpha += _ALPHA_WEIGHT * (1.0 - self.alpha)
        if accepted < drafted:
            self.alpha -= _ALPHA_WEIGHT * self.alpha
        self._draft_row_s = _cost_s(self._draft_row_s, draft_s / rows)
        self._verify_s[rows] = _cost_s(self._verify_s.get(rows), verify_s)

    def _verify_cost_s(self, rows: int) -> float:
        """Return the seconds of judging ``rows`` rows: measured, or those of the nearest measured row count."""
        nearest = min(self._verify_s, key=lambda r: (abs(r - rows), r))
        return self._verify_s[nearest]


def _cost_s(known_s: float | None, measured_s: float) -> float:
    """Return a running cost: a lower measurement counts at once, since disturbances only ever slow a run down."""
    if known_s is None or measured_s < known_s:
        return measured_s
    return known_s + _COST_WEIGHT * (measured_s - known_s)
