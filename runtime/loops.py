"""Builds the decoding loop that answers a request, and keeps what the loops have learned so far.

A new drafter needs nothing here: a request names its source (:class:`shortstack.runtime.decode.drafters.DraftSource`).
"""

from __future__ import annotations

from dataclasses import replace

from shortstack.runtime.decode.choice import Choice, make_choice
from shortstack.runtime.decode.draft_length import DraftLength, DraftPolicy
from shortstack.runtime.decode.drafters import DraftSource, FromExit
from shortstack.runtime.decode.hybrid import FromHybrid, HybridDrafter, Knowledge, own_drafter
from shortstack.runtime.decode.lookup import LOOKUP_DRAFTS, MOST_LOOKED_UP, FromLookup, LookupDrafter
from shortstack.runtime.decode.plain import plain
from shortstack.runtime.decode.runs import Loop
from shortstack.runtime.decode.sequence import TokenSequence
from shortstack.runtime.decode.speculative import speculative
from shortstack.runtime.decode.step import Stats
from shortstack.runtime.decode.trained_drafter import FromDrafter
from shortstack.runtime.early_exit.adaptive import Adaptive, AdaptiveThreshold
from shortstack.runtime.early_exit.auto import AutoCatchUp, WayCosts
from shortstack.runtime.early_exit.catch_up import CatchUp, FlushCatchUp
from shortstack.runtime.early_exit.loop import EarlyExit, Observer
from shortstack.runtime.early_exit.pending import PendingCap
from shortstack.runtime.early_exit.pipeline import PipelineCatchUp
from shortstack.runtime.early_exit.policy import ExitPolicy
from shortstack.runtime.engine.decoder import LeveledDecoder, LeveledState
from shortstack.runtime.request import ExitEarly, Plain, Request, Speculate


class Loops:
    """The loops of one model. What they learn about costs and acceptance is kept from one generation to the next."""

    def __init__(self) -> None:
        self._lengths: dict[tuple[DraftSource, DraftPolicy], DraftLength] = {}
        self._known: dict[tuple[int, bool], Knowledge] = {}
        self._caps: dict[tuple[int | None, tuple[int, ...]], PendingCap] = {}
        self._ways: dict[tuple[int, ...], WayCosts] = {}
        self._thresholds: dict[tuple[tuple[int, ...], Adaptive], AdaptiveThreshold] = {}

    def loop(
        self,
        request: Request,
        stack: LeveledState,
        sequence: TokenSequence,
        stats: Stats,
        limit: int,
        *,
        runner: LeveledDecoder | None = None,
    ) -> Loop:
        """Return the loop that answers a request.

        Args:
            request: The request.
            stack: The model, cut at the exits that the request's strategy uses.
            sequence: The prompt; grows by each emitted token.
            stats: Counts tokens, runs and seconds.
            limit: The most tokens to emit.
            runner: The same stack, if nothing else runs on it: then its levels may run in threads.
        """
        choice = make_choice(request.sampling)
        match request.strategy:
            case Plain():
                return plain(stack, sequence, choice, stats, limit)
            case Speculate(draft=draft) as strategy:
                policy = draft or _usual_policy(strategy.drafts_from, is_adaptive=not request.sampling.is_repeatable)
                return self._speculative(stack, sequence, choice, stats, limit, policy, strategy.drafts_from)
            case ExitEarly(policy=policy):
                return self._early_exit(
                    stack,
                    sequence,
                    choice,
                    stats,
                    limit,
                    policy,
                    is_repeatable=request.sampling.is_repeatable,
                    runner=runner,
                )

    def _speculative(
        self,
        stack: LeveledState,
        sequence: TokenSequence,
        choice: Choice,
        stats: Stats,
        limit: int,
        policy: DraftPolicy,
        source: DraftSource,
    ) -> Loop:
        measures = policy.is_adaptive and isinstance(source, FromHybrid | FromLookup)
        if isinstance(source, FromHybrid) and not measures:
            source = _that_drafts_alone(source, stack)
        if isinstance(source, FromExit):  # the same source whether it was named or not
            source = FromExit(stack.exit_layer)
        if isinstance(source, FromDrafter | FromLookup):  # drafts run no row of the model: the last one is worth a row
            policy = replace(policy, has_bonus=True)
        if not measures:
            if isinstance(source, FromDrafter):
                most = min(policy.max_draft_tokens, stack.drafter.most_drafts)
                policy = replace(policy, max_draft_tokens=most)
            length = self._lengths.setdefault((source, policy), DraftLength(policy))
            return speculative(stack, sequence, choice, stats, limit, length, source.drafter(stack, choice))
        assert isinstance(source, FromHybrid | FromLookup)
        own = own_drafter(stack, choice) if isinstance(source, FromHybrid) else None
        known = self._known.setdefault((stack.exit_layer, own is not None), Knowledge())
        drafter = HybridDrafter(stack, choice, policy, known, own, LookupDrafter(source.texts))
        return speculative(stack, sequence, choice, stats, limit, drafter, drafter)

    def _early_exit(
        self,
        stack: LeveledState,
        sequence: TokenSequence,
        choice: Choice,
        stats: Stats,
        limit: int,
        policy: ExitPolicy,
        *,
        is_repeatable: bool,
        runner: LeveledDecoder | None,
    ) -> Loop:
        used = tuple(stack.depths[:-1])
        observe: Observer | None = None
        if isinstance(wanted := policy.criterion, Adaptive):
            learned = self._thresholds.setdefault((used, wanted), AdaptiveThreshold(wanted, used))
            policy, observe = replace(policy, criterion=learned.begin()), learned.observe
        # Drafts decide how random draws are used, so with a seed their number must not depend on measured times. Nor
        # where an exit's tokens are kept: a round's first row sees the whole model's state, the others a guess.
        must_be_fixed = is_repeatable or (policy.verify == "rollback" and stack.sees_state)
        fixed = policy.max_pending or (stack.window if must_be_fixed else None)
        cap = self._caps.setdefault((fixed, used), PendingCap(stack.window, fixed))

        def flush() -> CatchUp:
            return FlushCatchUp(
                stack,
                stats,
                cap,
                recomputes=policy.kv_policy == "recompute",
                fills_all=policy.verify != "none" or observe is not None,
            )

        def pipeline() -> CatchUp:
            assert runner is not None
            return PipelineCatchUp(runner, stats)

        catch_up: CatchUp
        if stack.filling_levels == 1 or runner is None:  # no row is ever pending, or the levels run for others too
            catch_up = flush()
        elif policy.kv_policy == "auto":
            catch_up = AutoCatchUp({"flush": flush, "pipeline": pipeline}, self._ways.setdefault(used, WayCosts()))
        else:
            catch_up = pipeline() if policy.kv_policy == "pipeline" else flush()
        return EarlyExit(stack, sequence, choice, stats, limit, policy, catch_up, cap, observe).steps()


def _usual_policy(source: DraftSource, *, is_adaptive: bool) -> DraftPolicy:
    """Return the policy of a request that names none."""
    if isinstance(source, FromLookup):
        return DraftPolicy(MOST_LOOKED_UP if is_adaptive else LOOKUP_DRAFTS, is_adaptive=is_adaptive)
    return DraftPolicy(is_adaptive=is_adaptive, max_lookup_tokens=MOST_LOOKED_UP)


def _that_drafts_alone(source: FromHybrid, stack: LeveledState) -> DraftSource:
    """Return what drafts where nothing may be measured: the exit or drafter, or lookup without either."""
    if stack.exit_layer:
        return FromExit(stack.exit_layer)
    return FromDrafter() if stack.has_drafter else FromLookup(source.texts)
