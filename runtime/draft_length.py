"""How many tokens to draft: fixed, cut short when the exit is unsure, or chosen from measured costs and acceptance.

With alpha the probability that one drafted token is accepted, d the seconds of a draft row, v(r) those of judging r
rows and t those of a plain step, a round of k drafts without bonus emits (1 - alpha^k) / (1 - alpha) tokens on
average and takes k d + v(k) seconds; with bonus it emits (1 - alpha^(k+1)) / (1 - alpha) and takes (k + 1) d + v(k +
1). The adaptive rule takes the k with the most tokens per second, and k = 0, a plain step, where no k wins (the
formula of Leviathan et al., arXiv 2211.17192, section 3.3, with measured instead of assumed costs).
"""

from __future__ import annotations

from dataclasses import dataclass

from shortstack.graphs.errors import RequestError

_ALPHA_WEIGHT = 0.1  # of one judged token in the running mean: a memory of about ten tokens
_COST_WEIGHT = 0.2  # of one measurement in the running mean of a cost
_FIRST_PROBE_STEPS = 8
_LAST_PROBE_STEPS = 256
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
    """The state of one generation's policy.

    Args:
        policy: What the caller asks for.
    """

    def __init__(self, policy: DraftPolicy) -> None:
        self._policy = policy
        self.has_bonus = policy.has_bonus
        self.alpha = 0.7
        self._draft_row_s: float | None = None
        self._plain_s: float | None = None
        self._verify_s: dict[int, float] = {}
        self._plain_steps_left = 0
        self._probe_steps = _FIRST_PROBE_STEPS

    def choose(self, max_rows: int) -> int:
        """Return how many tokens to draft, 0 for a plain step, in a round of at most ``max_rows`` rows."""
        most = min(self._policy.max_draft_tokens, max_rows)
        if not self._policy.is_adaptive:
            return most
        if self._plain_s is None:
            return 0
        if self._draft_row_s is None:
            return min(2, most)
        if self._plain_steps_left:
            self._plain_steps_left -= 1
            return 0
        best, gain = max(((k, self.predicted_gain(k)) for k in range(1, most + 1)), key=lambda pair: pair[1])
        if gain >= _MUST_WIN_BY:
            self._probe_steps = _FIRST_PROBE_STEPS
            return best
        # Losing: go plain, but look again after a while, less and less often while it stays so.
        self._plain_steps_left = self._probe_steps
        self._probe_steps = min(2 * self._probe_steps, _LAST_PROBE_STEPS)
        return min(1, most)

    def is_unsure(self, top_prob: float) -> bool:
        """Return whether a draft stops after a token of this probability."""
        return top_prob < self._policy.confidence

    def predicted_gain(self, drafts: int) -> float:
        """Return the speed of rounds of ``drafts`` tokens over plain decoding, from what was measured so far."""
        assert self._plain_s is not None
        assert self._draft_row_s is not None
        rows = drafts + self.has_bonus
        tokens = sum(self.alpha**i for i in range(rows))
        round_s = rows * self._draft_row_s + self._verify_cost_s(rows)
        return tokens * self._plain_s / round_s

    def observe_plain(self, elapsed_s: float) -> None:
        """Learn what a plain step takes."""
        self._plain_s = _mean(self._plain_s, elapsed_s, _COST_WEIGHT)

    def observe_round(self, drafted: int, accepted: int, rows: int, draft_s: float, verify_s: float) -> None:
        """Learn from one judged draft: tokens drafted and accepted, rows run, seconds below and above the exit."""
        for _ in range(accepted):
            self.alpha += _ALPHA_WEIGHT * (1.0 - self.alpha)
        if accepted < drafted:
            self.alpha -= _ALPHA_WEIGHT * self.alpha
        self._draft_row_s = _mean(self._draft_row_s, draft_s / rows, _COST_WEIGHT)
        self._verify_s[rows] = _mean(self._verify_s.get(rows), verify_s, _COST_WEIGHT)

    def _verify_cost_s(self, rows: int) -> float:
        """Return the seconds of judging ``rows`` rows: measured, or those of the nearest measured row count."""
        nearest = min(self._verify_s, key=lambda r: (abs(r - rows), r))
        return self._verify_s[nearest]


def _mean(mean: float | None, value: float, weight: float) -> float:
    return value if mean is None else mean + weight * (value - mean)
