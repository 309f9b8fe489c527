"""Each round drafts by what pays most there: lookup, an exit or the trained drafter, lookup and then the exit, nothing.

What pays follows from measurements: what rounds cost on this machine (:mod:`.round_costs`) and how often drafts are
accepted (:mod:`.acceptance`). A round emits 1 + P1 + P2 + ... tokens on average, where Pi is the probability that its
first i drafts are accepted. The way with the most tokens per second is taken, if it is predicted to gain at least 2%
over a plain step (lookup: 5%). Then it can lose only what measuring costs, which is little:

============  ==========================================================================================================
lookup        what is found is compared with the text that comes, whether it was drafted or not, which is free. After
              8, 16, 32, ... and then every 256 finds a longer round is tried, if it would be better at usual costs
exit,         while it is off, some plain steps run its head too: after 8, 16, 32, ... and then every 256 steps. As long
drafter       as such drafts are accepted, the next step does so as well
plain step    after 16, 32, ... and then every 256 rounds that draft
============  ==========================================================================================================

What was learned is kept for the next generation. Rounds whose drafts come from elsewhere are reported to the exit or
drafter like its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from shortstack.graphs.plan import SplitPlan
from shortstack.runtime.decode.acceptance import LookupRates, Rate
from shortstack.runtime.decode.choice import Choice
from shortstack.runtime.decode.draft_length import DraftPolicy
from shortstack.runtime.decode.drafters import Draft, Drafter, ExitDrafter, FromExit
from shortstack.runtime.decode.lookup import Found, LookupDrafter
from shortstack.runtime.decode.remeasure import Remeasure
from shortstack.runtime.decode.round_costs import RoundCosts
from shortstack.runtime.decode.runs import Asking, DraftRow, DraftRows
from shortstack.runtime.decode.speed_up import predicted_speed_up
from shortstack.runtime.decode.text_index import TextIndex
from shortstack.runtime.decode.trained_drafter import TrainedDrafter
from shortstack.runtime.engine.decoder import State

log = logging.getLogger(__name__)

_STARTS_AT, _STAYS_AT = 1.02, 0.99  # as in draft_length, for the exit or drafter
_LOOKUP_AT = 1.05  # rates by match length rest on few drafts, and the best of several is often a lucky one
_GUESS = 0.7  # of the exit or drafter
_FEWEST_JUDGED = 3  # of its drafts, before waits begin
_FIRST_WAIT, _LAST_WAIT = 16, 256  # rounds between two measurements of a plain step
_MOST_BEFORE, _MOST_AFTER = 6, 3  # drafts of lookup and of the exit in a round of both


@dataclass(frozen=True, slots=True)
class FromHybrid:
    """Lookup and an exit or the trained drafter, whichever pays.

    With a fixed draft length nothing is measured: the exit or drafter drafts alone, or lookup in a bundle without both.

    Attributes:
        exit_layer: The exit, by the number of layers run before it. None takes the bundle's trained drafter, or the
            lowest exit where it has none.
        texts: Other texts in which drafts are looked up.
    """

    exit_layer: int | None = None
    texts: TextIndex | None = None

    def exits_in(self, plan: SplitPlan) -> tuple[int, ...]:
        """See :meth:`DraftSource.exits_in`: errors as in :class:`FromExit`, for an exit that is named."""
        if self.exit_layer is not None:
            return FromExit(self.exit_layer).exits_in(plan)
        return () if plan.drafter is not None else plan.boundaries[:1]

    def drafter(self, stack: State, choice: Choice) -> Drafter:
        """See :meth:`DraftSource.drafter`: what drafts alone; whoever measures makes a :class:`HybridDrafter`."""
        return own_drafter(stack, choice) or LookupDrafter(self.texts)


def own_drafter(stack: State, choice: Choice) -> ExitDrafter | TrainedDrafter | None:
    """Return the drafter of a stack: of the exit at which it is cut, or the bundle's trained one; None without both."""
    if stack.exit_layer:
        return ExitDrafter(stack, choice)
    return TrainedDrafter(stack, choice) if stack.has_drafter else None


@dataclass(slots=True)
class Knowledge:
    """What was learned about the rounds of one cut of a model.

    Attributes:
        costs: Measured costs.
        own: Acceptance of the exit or drafter.
        lookups: Acceptance of lookup, by the name of the index.
        is_on: The exit or drafter pays.
        goes_on: Its last draft beside a plain step was accepted, so the next step has one too.
    """

    costs: RoundCosts = field(default_factory=RoundCosts)
    own: Rate = field(default_factory=lambda: Rate(_GUESS))
    lookups: dict[str, LookupRates] = field(default_factory=lambda: {"lookup": LookupRates(), "texts": LookupRates()})
    is_on: bool = False
    goes_on: bool = False
    own_again: Remeasure = field(default_factory=Remeasure)
    lookup_again: Remeasure = field(default_factory=Remeasure)
    rounds_since_plain: int = 0
    plain_wait: int = _FIRST_WAIT


class Plan(NamedTuple):
    """What a round does.

    Attributes:
        kind: What drafts; ``probe`` is a plain step with a draft of the exit or drafter beside it.
        gain: Predicted speed over a plain step.
        looked_up: Drafts of lookup, which come first.
        own: The most drafts of the exit or drafter.
    """

    kind: Literal["plain", "lookup", "own", "both", "probe"]
    gain: float = 1.0
    looked_up: int = 0
    own: int = 0


_PLAIN, _PROBE = Plan("plain"), Plan("probe", own=1)


class HybridDrafter:
    """Chooses and drafts the rounds of one generation: a :class:`Drafter` that is its own rule for draft lengths.

    Args:
        stack: The model.
        choice: How tokens are chosen.
        policy: The most tokens of a draft; when the exit's or drafter's ends; whether its last one has a row.
        known: What was learned so far; learns more.
        own: The exit's or the trained drafter; None without either.
        lookup: Looks drafts up.

    Attributes:
        least_confidence: See :class:`DraftPolicy`.
        best_gain: Predicted speed of the best way to draft over plain decoding; 0 until costs are known.
    """

    def __init__(
        self,
        stack: State,
        choice: Choice,
        policy: DraftPolicy,
        known: Knowledge,
        own: Drafter | None,
        lookup: LookupDrafter,
    ) -> None:
        self._stack, self._choice, self._known = stack, choice, known
        self._own, self._lookup = own, lookup
        self._most_own = policy.max_draft_tokens
        if isinstance(own, TrainedDrafter):
            self._most_own = min(self._most_own, stack.drafter.most_drafts)
        self._most_looked_up = policy.max_lookup_tokens or policy.max_draft_tokens
        self._own_bonus = policy.has_bonus or isinstance(own, TrainedDrafter)
        # The exit can go on behind rows that were looked up, unless it needs its own states of them.
        self._may_continue = isinstance(own, ExitDrafter) and not getattr(stack, "sees_state", False)
        self.least_confidence = policy.confidence
        self.best_gain = 0.0
        self._plan = _PLAIN
        self._found: Found | None = None
        self._expected: list[int] = []  # what lookup says that follows
        self._length = 0  # of the text that it follows

    @property
    def has_bonus(self) -> bool:
        """Whether the last draft of the round that was chosen gets a row of its own."""
        return self._plan.kind == "lookup" or (self._plan.kind == "own" and self._own_bonus)

    def choose(self, max_rows: int, tokens: Sequence[int]) -> int:
        """Return how many tokens to draft in a round of at most ``max_rows`` rows; 0 is a plain step."""
        self._judge_lookup(tokens)
        found = self._found = self._lookup.find(tokens)
        self._length = len(tokens)
        self._expected = [] if found is None else found.tokens(self._most_looked_up)
        self._plan = self._planned(max_rows)
        known = self._known
        known.rounds_since_plain = 0 if self._plan.kind == "plain" else known.rounds_since_plain + 1
        return self._plan.looked_up + self._plan.own

    def draft(self, past: int, tokens: Sequence[int], most: int, least_confidence: float) -> Draft | Asking[Draft]:
        """See :meth:`Drafter.draft`: the round that was chosen."""
        plan = self._plan
        if plan.kind == "lookup":
            assert self._found is not None
            return Draft(self._found.proposals(plan.looked_up))
        if plan.kind == "both":
            return self._draft_both(past, tokens)
        assert self._own is not None
        return self._own.draft(past, tokens, plan.own, least_confidence)

    def start(self, tokens: Sequence[int], cached: int) -> int:
        """See :meth:`Drafter.start`."""
        self._lookup.start(tokens, cached)
        return cached if self._own is None else self._own.start(tokens, cached)

    def end(self) -> None:
        """See :meth:`Drafter.end`."""
        if self._own is not None:
            self._own.end()

    def observe(self, emitted: int, rows: int) -> None:
        """See :meth:`Drafter.observe`; the exit or drafter learns of all rounds, whoever drafted them."""
        if self._own is not None:
            self._own.observe(emitted, rows)

    def observe_plain(self, elapsed_s: float) -> None:
        """Learn the cost of a plain step."""
        self._known.costs.observe_plain(elapsed_s)

    def observe_round(
        self, drafted: int, accepted: int, rows: int, draft_s: float, verify_s: float, first_s: float | None = None
    ) -> None:
        """Learn from one judged draft; arguments as in :meth:`DraftLength.observe_round`."""
        plan, costs = self._plan, self._known.costs
        if plan.kind == "lookup":
            costs.observe_whole(rows, draft_s, verify_s)
            return
        costs.observe_judging(rows, verify_s)
        if plan.kind != "both":
            costs.observe_drafts(drafted, rows, draft_s, first_s)
        self._learn_own(drafted - plan.looked_up, accepted - plan.looked_up)

    def _learn_own(self, drafted: int, accepted: int) -> None:
        """Learn from judged drafts of the exit or drafter; a negative number are accepted if they were not judged."""
        known = self._known
        for _ in range(accepted):
            known.own.observe(accepted=True)
        if 0 <= accepted < drafted:
            known.own.observe(accepted=False)
        known.goes_on = self._plan.kind == "probe" and accepted > 0

    def _judge_lookup(self, tokens: Sequence[int]) -> None:
        """Compare what was found before the last round with what has come; drafted or not, this is its acceptance."""
        if self._found is None:
            return
        rates = self._known.lookups[self._found.name]
        for place, (token, wanted) in enumerate(zip(self._expected, tokens[self._length :], strict=False)):
            rates.at(self._found.length + place).observe(accepted=token == wanted)
            if token != wanted:
                break

    def _planned(self, max_rows: int) -> Plan:
        known = self._known
        if not known.costs.plain_s or max_rows < 2:
            return _PLAIN
        lookup, own = self._best_lookup(max_rows), self._best_own(max_rows)
        both = self._best_both(max_rows) if own is not None and lookup is not None else None
        best = max(
            (plan for plan in (lookup, own, both) if plan is not None), key=lambda plan: plan.gain, default=_PLAIN
        )
        if best is not _PLAIN:
            self.best_gain = best.gain
        pays = best.gain >= (_LOOKUP_AT if best is not own else _STAYS_AT if known.is_on else _STARTS_AT)
        if own is not None and (best is own or own.gain < _STAYS_AT):
            self._switch(pays and best is own, own)
        if lookup is not None and (again := self._measured_again(lookup, max_rows)) is not None:
            return again
        if pays:
            if known.rounds_since_plain < known.plain_wait:
                return best
            known.plain_wait = min(2 * known.plain_wait, _LAST_WAIT)
            return _PLAIN
        return _PROBE if self._own is not None and self._probes() else _PLAIN

    def _switch(self, is_on: bool, own: Plan) -> None:
        known = self._known
        if is_on != known.is_on:
            known.is_on = is_on
            known.own_again.restart()
            log.info(
                "drafting %s: rounds of %d drafts predicted at %.2fx of plain decoding",
                "on" if is_on else "off",
                own.own,
                own.gain,
            )

    def _probes(self) -> bool:
        """Return whether this plain step runs a draft beside it."""
        known = self._known
        return not known.costs.draft_s or known.own.judged < _FEWEST_JUDGED or known.goes_on or known.own_again.is_due()

    def _measured_again(self, lookup: Plan, max_rows: int) -> Plan | None:
        """Return a longer round of lookup that would pay more at usual costs, so that the measured ones may be wrong.

        None after most rounds, and where there is none.
        """
        if not self._known.lookup_again.is_due():
            return None
        guessed = self._best_lookup(max_rows, self._known.costs.guessed_whole)
        assert guessed is not None
        most = 1 if lookup.gain < _LOOKUP_AT else 2 * lookup.looked_up + 1
        drafts = min(guessed.looked_up, most)
        is_other = drafts > lookup.looked_up or lookup.gain < _LOOKUP_AT
        return Plan("lookup", lookup.gain, drafts) if guessed.gain > 1.1 * max(lookup.gain, 1.0) and is_other else None

    def _best_lookup(self, max_rows: int, cost: Callable[[int], float] | None = None) -> Plan | None:
        """Return the best round that only looks up, by measured costs or by others; None if nothing was found."""
        if self._found is None or not self._expected:
            return None
        known, most = self._known, min(len(self._expected), max_rows - 1)
        most = min(most, 2 * known.costs.most_measured - 1)  # a cost that is not known is approached in steps
        plain_s, reached, emitted, best = known.costs.plain_s, 1.0, 1.0, _PLAIN
        cost = cost or known.costs.whole
        for place, rate in enumerate(known.lookups[self._found.name].values(self._found.length, most), 1):
            reached *= rate
            emitted += reached
            gain = emitted * plain_s / cost(place + 1)
            if gain > best.gain or place == 1:
                best = Plan("lookup", gain, place)
        return best

    def _best_own(self, max_rows: int) -> Plan | None:
        known, costs = self._known, self._known.costs
        if self._own is None or not costs.draft_s:
            return None
        bonus = self._own_bonus
        best = None
        for drafts in range(2 - bonus, min(self._most_own, max_rows - bonus) + 1):
            draft_s, bonus_s = costs.draft_s, costs.draft_s if bonus else None
            if costs.first_s is not None:
                draft_s = (costs.first_s + (drafts - 1) * costs.draft_s) / drafts
                bonus_s = 0.0
            gain = predicted_speed_up(
                known.own.value, drafts, draft_s, costs.judging(drafts + bonus), bonus=bonus_s, plain=costs.plain_s
            )
            if best is None or gain > best.gain:
                best = Plan("own", gain, own=drafts)
        return best

    def _best_both(self, max_rows: int) -> Plan | None:
        """Return the best round that looks up and lets the exit go on; none of its rows is without a draft."""
        if not self._may_continue or not self._known.is_on:
            return None
        known, costs, best = self._known, self._known.costs, None
        assert self._found is not None
        rates = known.lookups[self._found.name].values(self._found.length, min(len(self._expected), _MOST_BEFORE))
        reached, emitted = 1.0, 1.0
        for before, rate in enumerate(rates, 1):
            reached *= rate
            emitted += reached
            below_s = max(costs.whole(before) - costs.judging(before), 0.0)
            last, tokens = reached, emitted
            for after in range(1, min(_MOST_AFTER, self._most_own, max_rows - before) + 1):
                seconds = below_s + after * costs.draft_s + costs.judging(before + after)
                gain = tokens * costs.plain_s / seconds
                if best is None or gain > best.gain:
                    best = Plan("both", gain, before, after)
                last *= known.own.value
                tokens += last
        return best

    def _draft_both(self, past: int, tokens: Sequence[int]) -> Asking[Draft]:
        """Run the rows of looked-up drafts, and let the exit draft behind the last one."""
        stack, choice, plan = self._stack, self._choice, self._plan
        assert self._found is not None
        proposals = self._found.proposals(plan.looked_up)
        for row, proposal in enumerate(proposals, 1):
            stack.put(row, proposal.token)
        yield DraftRows(0, len(proposals), past)
        drawn = [*tokens, *(proposal.token for proposal in proposals)]
        for row in range(len(proposals), len(proposals) + plan.own):
            yield DraftRow(row, past, with_head=True, with_logits=choice.needs_logits)
            proposals.append(choice.propose(stack.exit, row, drawn, stack.exit_layer))
            stack.put(row + 1, proposals[-1].token)
            drawn.append(proposals[-1].token)
            if proposals[-1].confidence < self.least_confidence:
                break
        return Draft(proposals, rows_run=len(proposals))
