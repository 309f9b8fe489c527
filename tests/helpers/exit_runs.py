"""Generations of early exit over scripted levels, checked after every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from helpers.scripted_levels import ScriptedLevels
from helpers.scripted_texts import GREEDY
from shortstack.runtime.decode.choice import make_choice
from shortstack.runtime.decode.runs import solo
from shortstack.runtime.decode.sampling import SamplingParams
from shortstack.runtime.decode.sequence import TokenSequence
from shortstack.runtime.decode.step import Stats, Step
from shortstack.runtime.decode.stream import close_steps
from shortstack.runtime.early_exit.auto import AutoCatchUp, WayCosts
from shortstack.runtime.early_exit.catch_up import CatchUp, FlushCatchUp
from shortstack.runtime.early_exit.loop import EarlyExit, Observer
from shortstack.runtime.early_exit.pending import PendingCap
from shortstack.runtime.early_exit.pipeline import PipelineCatchUp
from shortstack.runtime.early_exit.policy import ExitPolicy, KVPolicy
from shortstack.runtime.early_exit.reading import Reading


@dataclass(frozen=True)
class Pattern:
    """A criterion that follows a script of which token leaves at (position, exit), and repeats it."""

    leaves_at: Sequence[bool]
    needs = frozenset[str]()
    least_exits = 1
    exit_layers = frozenset[int]()

    def leaves(self, reading: Reading) -> bool:
        return self.leaves_at[(3 * reading.position + reading.exit_layer // 2) % len(self.leaves_at)]


@dataclass
class Run:
    """One generation."""

    steps: list[Step]
    stats: Stats
    levels: ScriptedLevels
    sequence: TokenSequence

    @property
    def tokens(self) -> list[int]:
        return [step.token for step in self.steps]


def catch_up_of(kind: KVPolicy, levels: ScriptedLevels, stats: Stats, cap: PendingCap) -> CatchUp:
    if kind == "pipeline":
        return PipelineCatchUp(levels, stats)
    if kind == "auto":
        ways = {
            "flush": lambda: FlushCatchUp(levels, stats, cap),
            "pipeline": lambda: PipelineCatchUp(levels, stats),
        }
        return AutoCatchUp(ways, WayCosts())
    return FlushCatchUp(levels, stats, cap, recomputes=kind == "recompute")


def run(
    levels: ScriptedLevels,
    prompt: Sequence[int],
    policy: ExitPolicy,
    count: int = 20,
    *,
    stop_after: int | None = None,
    sampling: SamplingParams = GREEDY,
    observe: Observer | None = None,
) -> Run:
    """Decode to the end or until ``stop_after`` tokens, and check the caches and counts after every step."""
    stats, sequence = Stats(prompt=len(prompt)), TokenSequence(prompt)
    cap = PendingCap(levels.window, policy.max_pending)
    catch_up = catch_up_of(policy.kv_policy, levels, stats, cap)
    steps: list[Step] = []
    choice = make_choice(sampling)
    loop = EarlyExit(levels, sequence, choice, stats, count, policy, catch_up, cap, observe).steps()
    iterator = solo(loop, levels)
    for step in iterator:
        steps.append(step)
        assert stats.is_balanced
        assert stats.emitted == len(steps) == sum(stats.exits.values())
        assert sequence.tokens == [*prompt, *(s.token for s in steps)]
        if policy.kv_policy in ("flush", "recompute"):  # in a pipeline the rows are being filled meanwhile
            levels_hold(levels, sequence)
        if len(steps) == stop_after:
            close_steps(iterator)
    assert sequence.cached == len(sequence) - 1, "rows are still pending"
    levels_hold(levels, sequence)
    return Run(steps, stats, levels, sequence)


def levels_hold(levels: ScriptedLevels, sequence: TokenSequence) -> None:
    levels.assert_holds(sequence.tokens[: sequence.cached])
