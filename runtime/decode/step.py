"""What the decoding loops yield and count.

These identities hold between any two steps, and after a generation ends in any way::

    emitted + discarded == prefilled + plain + exited + accepted + corrected + bonus
    drafted             == accepted + rejected
    drafted, accepted   == the sums of drafted_by, accepted_by
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Step:
    """One emitted token.

    Attributes:
        token: Its id.
        from_draft: Whether a drafter proposed it and the whole model accepted it.
        exit_layer: Layers run to predict it: those before the exit that predicted it, or all layers of the model; 0 if
            the drafter runs no layer.
        confidence: The probability that this head or drafter gave to its most likely token.
        pending: Positions that waited for the layers above when it was decided, including its own; 0 if none waited.
    """

    token: int
    from_draft: bool
    exit_layer: int
    confidence: float
    pending: int = 0


@dataclass(slots=True)
class Stats:
    """What one generation did: counts of tokens, unless the description says otherwise.

    Attributes:
        prompt: Tokens of the prompt.
        reused: Prompt tokens whose cache was kept from the generation before.
        emitted: Tokens that the caller received.
        discarded: Tokens that were decided but not emitted: the rest of a round in which the caller stopped, or of the
            round that is being emitted.
        prefilled: Tokens decided by the prefill run (0 or 1).
        plain: Tokens decided by full runs without a draft.
        exited: Tokens decided by an exit, without verification.
        exits: Emitted tokens by the number of layers run to predict them.
        drafted: Tokens that the drafter proposed.
        accepted: Drafted tokens that the whole model agreed with, up to the first that it rejected.
        rejected: All other drafted tokens.
        corrected: Tokens of the whole model in place of the first rejected one of a round.
        bonus: Tokens of the whole model after a fully accepted draft.
        rounds: Rounds with at least one drafted token.
        drafted_at: Drafted tokens by position in their round, from 0.
        accepted_at: Accepted tokens by position in their round, from 0.
        drafted_by: Drafted tokens by what proposed them: ``exit``, ``drafter``, ``lookup`` (in the text so far) or
            ``texts`` (in other texts).
        accepted_by: Accepted tokens likewise.
        prefill_s: Seconds of the prefill.
        draft_s: Seconds of drafting and in the lower segments.
        verify_s: Seconds in the upper segments; with a pipeline they overlap with those in the lower ones.
        settle_s: Seconds that the upper segments took to catch up at the end.
        elapsed_s: Seconds from the request to the last token, including the caller's own time.
        first_token_s: Seconds from the request to the first token.
        draft_runs: Rows run through the lower segments.
        verify_runs: Runs of the upper segments.
        predicted_gain: The adaptive rule's latest prediction of the speed of drafting over plain decoding; 0 until
            there is one.
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
    drafted_by: dict[str, int] = field(default_factory=dict)
    accepted_by: dict[str, int] = field(default_factory=dict)
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
        """Count one emitted token that was predicted after ``depth`` layers."""
        self.emitted += 1
        self.exits[depth] = self.exits.get(depth, 0) + 1

    def count_round(self, drafted: int, accepted: int, decided: int, origins: Sequence[str] | None = None) -> None:
        """Count one judged round.

        Args:
            drafted: Tokens proposed; a round without any is a plain step.
            accepted: Proposed tokens that the whole model agreed with, up to the first that it rejected.
            decided: Tokens that the round decided: the accepted ones, and the whole model's own after them, if any.
            origins: What proposed each; None: an exit.
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
            origin = "exit" if origins is None else origins[position]
            self.drafted_by[origin] = self.drafted_by.get(origin, 0) + 1
            self.accepted_by[origin] = self.accepted_by.get(origin, 0) + (position < accepted)

    @property
    def is_balanced(self) -> bool:
        """Whether the identities of the module's docstring hold."""
        decided = self.prefilled + self.plain + self.exited + self.accepted + self.corrected + self.bonus
        by_source = sum(self.drafted_by.values()), sum(self.accepted_by.values())
        return (
            self.emitted + self.discarded == decided
            and self.drafted == self.accepted + self.rejected
            and by_source == (self.drafted, self.accepted)
        )

    @property
    def acceptance(self) -> float:
        """The acceptance rate, accepted / drafted; 0 if nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def alpha(self) -> float:
        """The probability that one judged token is accepted: accepted / (accepted + corrected).

        Unlike :attr:`acceptance`, it does not count tokens drafted after the first rejected one. A round whose drafts
        are all accepted adds no correction.
        """
        judged = self.accepted + self.corrected
        return self.accepted / judged if judged else 0.0

    @property
    def tokens_per_round(self) -> float:
        """Tokens decided per run of the upper segments, without the prefill."""
        decided = self.plain + self.exited + self.accepted + self.corrected + self.bonus
        return decided / self.verify_runs if self.verify_runs else 0.0

    @property
    def mean_exit_layer(self) -> float:
        """Mean number of layers run to predict the emitted tokens; 0 before the first."""
        return sum(depth * count for depth, count in self.exits.items()) / self.emitted if self.emitted else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed in tokens per second, after the first token."""
        decode_s = self.elapsed_s - self.first_token_s
        return (self.emitted - 1) / decode_s if self.emitted > 1 and decode_s > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the counts, and the figures derived from them, as JSON data."""
        derived = ("acceptance", "alpha", "tokens_per_round", "mean_exit_layer", "tokens_per_s")
        return asdict(self) | {name: getattr(self, name) for name in derived}
