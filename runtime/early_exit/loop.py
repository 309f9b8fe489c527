"""Early exit: a token leaves at the first exit that is sure of it; the layers above catch up with pending rows later.

One round without verification, with exits after 4 and 12 layers. Each level's line shows the rows that its runs cover::

    row          0       1       2       3
    level 0      run     run     run     run          each on its own
    exit 4       leaves  leaves  unsure  unsure
    level 1      -       -       0 1 2   3            one run fills the rows that are missing
    exit 12                      leaves  unsure
    level 2      -       -       -       0 1 2 3      the round ends: every cache is exact
    final                                decides

The prompt runs through all layers, so the whole model predicts the first token (unless ``prefill_exit`` is set). A
round ends with a row that no exit is sure of, or when so many rows are pending that waiting longer does not pay
(:mod:`.pending`). Then the levels above catch up. This changes no decision, so the output does not depend on when it
happens. If the iteration stops while rows are pending, they are filled then, and the next generation can use the cache.

With verification, no token is emitted before the whole model has judged it. A round is then self-speculative decoding:
any exit may draft, and a draft ends at the first row where no token leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from shortstack.runtime.decode.choice import Choice, Proposal, Verdict, confidence_of
from shortstack.runtime.decode.emission import emit
from shortstack.runtime.decode.plain import prefill
from shortstack.runtime.decode.runs import Asking, Ended, Loop, PrefillLevel, Run
from shortstack.runtime.decode.sequence import TokenSequence
from shortstack.runtime.decode.step import Stats, Step
from shortstack.runtime.early_exit.catch_up import CatchUp
from shortstack.runtime.early_exit.criteria import Criterion
from shortstack.runtime.early_exit.pending import PendingCap
from shortstack.runtime.early_exit.policy import ExitPolicy
from shortstack.runtime.early_exit.reading import Reading, read
from shortstack.runtime.engine.decoder import LeveledState
from shortstack.runtime.engine.head import Head

Observer = Callable[[Reading, bool], None]


@dataclass(frozen=True, slots=True)
class Decision:
    """Which head decides a row's token.

    Attributes:
        level: The level of that head; the last level has the final head.
        reading: The exit's reading; None for the final head.
    """

    level: int
    reading: Reading | None


class EarlyExit:
    """One generation; iterate over :meth:`steps`.

    Args:
        stack: The model.
        sequence: The prompt, with at least one token that is not cached; grows by each emitted token.
        choice: How tokens are chosen.
        stats: Counts tokens, runs and seconds.
        max_new_tokens: The most tokens to emit.
        policy: How tokens leave; its exits are those of the stack.
        catch_up: Runs the levels on the rows; the generation closes it at the end.
        cap: How many rows may be pending.
        observe: Called for every token that left, with the exit's reading and whether the whole model predicted the
            same token. It makes the final head run on all pending rows. None: no observer.
    """

    def __init__(
        self,
        stack: LeveledState,
        sequence: TokenSequence,
        choice: Choice,
        stats: Stats,
        max_new_tokens: int,
        policy: ExitPolicy,
        catch_up: CatchUp,
        cap: PendingCap,
        observe: Observer | None = None,
    ) -> None:
        self._stack = stack
        self._sequence = sequence
        self._choice = choice
        self._stats = stats
        self._max_new_tokens = max_new_tokens
        self._policy = policy
        self._criterion: Criterion = policy.criterion
        self._with_similarity = "similarity" in policy.criterion.needs
        self._catch_up = catch_up
        self._cap = cap
        self._observe = observe
        self._last = len(stack.heads) - 1
        self._leaves_holes = stack.filling_levels > 1  # otherwise no row is ever pending
        self._recomputes = policy.kv_policy == "recompute" and self._leaves_holes
        self._left: list[Reading] = []  # the exits' readings for the round's pending rows
        self._prompt: _PendingPrompt | None = None

    def steps(self) -> Loop:
        """Yield runs, and one step per token. However it ends, all tokens but the newest are cached afterwards."""
        try:
            if self._max_new_tokens > 0:
                yield (yield from self._first())
                yield from self._unverified() if self._policy.verify == "none" else self._verified()
        except Ended:
            yield from self._fill_at_the_end()
            raise
        else:
            yield from self._fill_at_the_end()
        finally:
            self._catch_up.close()

    def _first(self) -> Asking[Step]:
        """Decide the first token from the prompt."""
        if self._policy.prefill_exit:
            return (yield from self._leave_from_prompt())
        token = yield from prefill(self._stack, self._sequence, self._choice, self._stats)
        return self._emit(token, self._last, 0, 0)

    def _leave_from_prompt(self) -> Asking[Step]:
        """Run the prompt up to the first exit that is sure, or else through all levels; return the first step."""
        started = self._stack.clock()
        prompt = _PendingPrompt(self._sequence.tokens[self._sequence.cached :], self._sequence.cached)
        below: list[Reading] = []
        for level in range(self._last):
            yield from prompt.raise_to(level, with_head=True, with_logits=self._choice.needs_logits)
            reading = self._read(level, 0, below)
            if self._criterion.leaves(reading):
                self._prompt = prompt
                self._stats.prefill_s += self._stack.clock() - started
                self._stats.exited += 1
                token = self._choice.pick(self._stack.heads[level], 0, self._sequence.tokens)
                return self._emit(token, level, 0, len(prompt.tokens) if self._leaves_holes else 0)
            below.append(reading)
        yield from prompt.raise_to(self._last, with_head=True, with_logits=self._choice.needs_logits)
        token = self._choice.pick(self._stack.final, 0, self._sequence.tokens)
        self._sequence.commit(len(prompt.tokens))
        self._stats.prefill_s += self._stack.clock() - started
        self._stats.prefilled += 1
        return self._emit(token, self._last, 0, 0)

    def _unverified(self) -> Loop:
        """Emit each token as soon as it leaves."""
        while self._has_room():
            if len(self._left) >= (self._cap.rows if self._leaves_holes else self._stack.window):
                yield from self._fill_all()
            row = len(self._left)
            if row == 0:
                self._catch_up.begin_round(len(self._sequence) - 1)
            self._stack.put(row, self._sequence.tokens[-1])
            decision = yield from self._decide(row)
            if decision.reading is None:
                yield from self._run_to_the_top(row, 1 if self._observe is None else row + 1)
                token = self._choice.pick(self._stack.final, row, self._sequence.tokens)
                self._label()
                self._left.clear()
                self._sequence.commit(row + 1)
                self._stack.keep_state(row)
                self._stats.plain += 1
                yield self._emit(token, decision.level, row, 0)
            else:
                token = self._choice.pick(self._stack.heads[decision.level], row, self._sequence.tokens)
                self._catch_up.mark_pending(decision.level, row)
                self._left.append(decision.reading)
                self._stats.exited += 1
                yield self._emit(token, decision.level, row, row + 1 if self._leaves_holes else 0)

    def _verified(self) -> Loop:
        """Emit tokens only after the whole model has judged them."""
        while self._has_room():
            first = len(self._sequence)
            rows = min(self._cap.rows, self._max_new_tokens - self._stats.emitted, self._stack.max_length - first)
            context = list(self._sequence.tokens)
            drafts: list[Proposal] = []
            self._catch_up.begin_round(first - 1)
            self._stack.put(0, context[-1])
            for row in range(rows):
                decision = yield from self._decide(row)
                if decision.reading is None:
                    break
                self._left.append(decision.reading)
                head, depth = self._stack.heads[decision.level], self._stack.depths[decision.level]
                drafts.append(self._choice.propose(head, row, context, depth))
                context.append(drafts[-1].token)
                self._stack.put(row + 1, drafts[-1].token)
            yield from self._run_to_the_top(row, row + 1)
            self._label()
            verdict = self._judge(row + 1, drafts)
            self._left.clear()
            self._sequence.commit(1)
            self._stack.keep_state(len(verdict.tokens) - 1)
            self._stats.count_round(len(drafts), verdict.accepted, len(verdict.tokens))
            yield from emit(self._stack, self._sequence, self._stats, drafts, verdict, pending=len(drafts))

    def _decide(self, row: int) -> Asking[Decision]:
        """Run a row up to the first exit that is sure of it. If no exit is, the last level has yet to run on it."""
        with_logits = self._choice.needs_logits
        if self._prompt is not None and self._recomputes:
            self._prompt.restart()
        yield from self._raise_prompt(0)
        yield from self._catch_up.run_lowest(row, with_logits)
        below: list[Reading] = []
        for level in range(self._last):
            if level:
                yield from self._raise_prompt(level)
                yield from self._catch_up.run_level(level, row, 1, with_logits)
            reading = self._read(level, row, below)
            if self._criterion.leaves(reading):
                return Decision(level, reading)
            below.append(reading)
        return Decision(self._last, None)

    def _run_to_the_top(self, row: int, num_rows: int) -> Iterable[Run]:
        """Run every level on all rows up to this one, and the final head on the last ``num_rows`` of them."""
        yield from self._raise_prompt(self._last)
        for level in range(1, self._last):
            yield from self._catch_up.run_level(level, row, 0, False)
        with_logits = self._choice.needs_logits or self._policy.verify == "rollback"
        yield from self._catch_up.run_level(self._last, row, num_rows, with_logits)

    def _fill_all(self) -> Iterable[Run]:
        """Complete all pending rows in every level and end the round."""
        rows = len(self._left)
        yield from self._raise_prompt(self._last)
        if self._observe is None:
            yield from self._catch_up.fill_pending(rows)
        else:
            yield from self._run_to_the_top(rows - 1, rows)
            self._label()
        self._left.clear()
        self._sequence.commit(rows)
        self._stack.keep_state(rows)  # the exit's guess, which the next row would have seen without catching up

    def _read(self, level: int, row: int, below: Sequence[Reading]) -> Reading:
        return read(
            self._stack,
            level,
            row,
            below,
            position=self._stats.emitted + (len(self._left) if self._policy.verify != "none" else 0),
            max_new_tokens=self._max_new_tokens,
            with_similarity=self._with_similarity,
        )

    def _judge(self, rows: int, drafts: Sequence[Proposal]) -> Verdict:
        if self._policy.verify == "exact":
            return self._choice.judge(self._stack.final, rows, drafts, self._sequence.tokens)
        return judge_likely(self._stack.final, rows, drafts, self._policy.takes_back_below)

    def _label(self) -> None:
        """Report to the observer on which pending rows the whole model agrees with the exit."""
        if self._observe is not None:
            for row, reading in enumerate(self._left):
                self._observe(reading, reading.token == int(self._stack.final.token[row]))

    def _emit(self, token: int, level: int, row: int, pending: int) -> Step:
        self._sequence.append(token)
        depth = self._stack.depths[level]
        self._stats.count_emitted(depth)
        confidence = float(self._stack.heads[level].top_prob[row])
        return Step(token, False, depth, confidence, pending)

    def _has_room(self) -> bool:
        return self._stats.emitted < self._max_new_tokens and len(self._sequence) < self._stack.max_length

    def _raise_prompt(self, level: int) -> Iterable[Run]:
        """Run a prompt that left early through a level, before the rows after it run there."""
        if self._prompt is not None:
            top = self._stack.filling_levels - 1
            yield from self._prompt.raise_to(min(level, top))
            if level >= top:
                self._sequence.commit(len(self._prompt.tokens))
                self._prompt = None

    def _fill_at_the_end(self) -> Iterable[Run]:
        """Complete the prompt and all pending rows in every level."""
        started = self._stack.clock()
        yield from self._raise_prompt(self._last)
        if self._left:
            yield from self._fill_all()
        self._stats.settle_s += self._stack.clock() - started


class _PendingPrompt:
    """A prompt that has not run through all levels yet."""

    def __init__(self, tokens: Sequence[int], past: int) -> None:
        self._past = past
        self._levels = 0
        self.tokens = tokens

    def restart(self) -> None:
        """Let the prompt run through all levels again, as EE-LLM does for every token until one does not leave."""
        self._levels = 0

    def raise_to(self, level: int, *, with_head: bool = False, with_logits: bool = False) -> Iterable[Run]:
        """Run all levels up to this one that the prompt has not been through."""
        while self._levels <= level:
            yield PrefillLevel(self._levels, self.tokens, self._past, with_head, with_logits)
            self._levels += 1


def judge_likely(head: Head, rows: int, drafts: Sequence[Proposal], least: float) -> Verdict:
    """Accept drafts up to the first that the whole model finds less likely than ``least``; its own token replaces it.

    This is the rule of FREE (arXiv 2310.05424, section 3.3) with a probability instead of a loss: -log p > rho is the
    same as p < e^-rho. A draft that is the whole model's most likely token is always accepted.

    Args:
        head: The final head, with logits in rows 0..rows-1.
        rows: As many as there are drafts, or one more for the token after the last draft.
        drafts: The tokens that left.
        least: The lowest probability that is accepted.
    """
    accepted = 0
    for row, draft in enumerate(drafts):
        confidence_of(head, row)
        if int(head.token[row]) != draft.token and _probability(head.logits[row], draft.token) < least:
            break
        accepted += 1
    own = head.token[accepted : min(accepted + 1, rows)].tolist()
    if own:
        confidence_of(head, accepted)
    return Verdict((*(draft.token for draft in drafts[:accepted]), *own), accepted)


def _probability(logits: np.ndarray, token: int) -> float:
    shifted = logits.astype(np.float64) - float(logits.max())
    return float(np.exp(shifted[token]) / np.exp(shifted).sum())
