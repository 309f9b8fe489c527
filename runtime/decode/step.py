"""What the decoding loops yield and count.

Accounting identity, at every moment between two steps and after any end::

    emitted + discarded == prefilled + plain + exited + accepted + corrected + bonus
    drafted             == accepted + rejected
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Step:
    """One emitted token.

    Attributes:
        token: Its id.
        from_draft: The exit proposed it and the whole model accepted it.
        exit_layer: Layers run before the head that named it; all of the model's for the final head.
        confidence: Probability that this head gave its most likely token.
        pending: Positions that waited for the layers above when it was decided, its own included; 0 where none did.
    """

    token: int
    from_draft: bool
    exit_layer: int
    confidence: float
    pending: int = 0


@dataclass(slots=True)
class Stats:
    """What one generation did. Tokens unless the name says otherwise.

    Attributes:
        prompt: Tokens of the prompt.
        reused: Prompt tokens whose cache was kept from the generation before.
        emitted: Handed to the caller.
        discarded: Decided, but not handed over: the rest of a round inside which the caller stopped, or is still.
        prefilled: Decided by the prefill run (0 or 1).
        plain: Decided by full runs without a draft.
        exited: Decided by an exit, without verification.
        exits: Emitted tokens by the depth of the head that named them.
        drafted: Proposed by the exit.
        accepted: Drafted ones that the whole model agreed with, up to the first it did not.
        rejected: The other drafted ones.
        corrected: The whole model's own token in place of the first rejected one.
        bonus: The whole model's token after a fully accepted draft.
        rounds: Rounds with at least one drafted token.
        drafted_at: Drafted tokens by position in their round, from 0.
        accepted_at: Accepted tokens by position in their round, from 0.
        prefill_s: Seconds of the prefill.
        draft_s: Seconds in the lower segments.
        verify_s: Seconds in the upper segments; with a pipeline, beside those in the lower ones.
        settle_s: Seconds in which the upper segments caught up at the end.
        elapsed_s: Seconds from the request to the last token, the caller's own time included.
        first_token_s: Seconds from the request to the first token.
        draft_runs: Rows run through the lower segments.
        verify_runs: Runs of the upper segments.
        predicted_gain: Speed of drafting over plain decoding that the adaptive rule predicted last; 0 before it could.
    """

    prompt: int = 0
    reused: int = 0
    emitted: int = 0
    discarded: int = 0
    prefilled: int = 0
    plain: int = 0
    exited: int = 0
    exits: dict[int, int] = field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0
    rejected: int = 0
    corrected: int = 0
    bonus: int = 0
    rounds: int = 0
    drafted_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    prefill_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    settle_s: float = 0.0
    elapsed_s: float = 0.0
    first_token_s: float = 0.0
    draft_runs: int = 0
    verify_runs: int = 0
    predicted_gain: float = 0.0

    def count_emitted(self, depth: int) -> None:
        """Count one token handed over, named by the head after ``depth`` layers."""
        self.emitted += 1
        self.exits[depth] = self.exits.get(depth, 0) + 1

    def count_round(self, drafted: int, accepted: int, decided: int) -> None:
        """Count one judged round.

        Args:
            drafted: Tokens proposed; a round without any is a plain step.
            accepted: Those of them that the whole model agreed with, up to the first that it did not.
            decided: Tokens that the round decided: the accepted ones, and the whole model's own behind them, if any.
        """
        if not drafted:
            self.plain += decided
            return
        is_bonus = decided > drafted
        self.bonus += is_bonus
        self.corrected += decided - accepted - is_bonus
        self.rounds += 1
        self.drafted += drafted
        self.accepted += accepted
        self.rejected += drafted - accepted
        while len(self.drafted_at) < drafted:
            self.drafted_at.append(0)
            self.accepted_at.append(0)
        for position in range(drafted):
            self.drafted_at[position] += 1
            self.accepted_at[position] += position < accepted

    @property
    def is_balanced(self) -> bool:
        """Whether the accounting identity holds."""
        decided = self.prefilled + self.plain + self.exited + self.accepted + self.corrected + self.bonus
        return self.emitted + self.discarded == decided and self.drafted == self.accepted + self.rejected

    @property
    def acceptance(self) -> float:
        """Accepted / drafted; 0 when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def alpha(self) -> float:
        """Probability that one judged token is accepted: accepted / (accepted + corrected).

        Unlike :attr:`acceptance` it does not count tokens drafted after the first rejected one. A round that ends in
        a full accept without bonus adds no correction.
        """
        judged = self.accepted + self.corrected
        return self.accepted / judged if judged else 0.0

    @property
    def tokens_per_round(self) -> float:
        """Tokens decided per run of the upper segments, the prefill left out."""
        decided = self.plain + self.exited + self.accepted + self.corrected + self.bonus
        return decided / self.verify_runs if self.verify_runs else 0.0

    @property
    def mean_exit_layer(self) -> float:
        """Mean depth of the heads that named the emitted tokens; 0 before the first."""
        return sum(depth * count for depth, count in self.exits.items()) / self.emitted if self.emitted else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed after the first token."""
        decode_s = self.elapsed_s - self.first_token_s
        return (self.emitted - 1) / decode_s if self.emitted > 1 and decode_s > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return counts and derived figures as JSON-ready data."""
        derived = ("acceptance", "alpha", "tokens_per_round", "mean_exit_layer", "tokens_per_s")
        return asdict(self) | {name: getattr(self, name) for name in derived}
