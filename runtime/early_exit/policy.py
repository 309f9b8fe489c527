"""A caller's settings for early exit: when tokens leave, whether they are checked, how the layers above catch up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from shortstack.graphs.arguments import expect, expect_flags, is_between, is_whole, shown
from shortstack.graphs.errors import RequestError
from shortstack.graphs.plan import SplitPlan
from shortstack.runtime.early_exit.adaptive import Adaptive
from shortstack.runtime.early_exit.criteria import Criterion, MaxDepth

Verify = Literal["none", "rollback", "exact"]
KVPolicy = Literal["flush", "pipeline", "auto", "recompute"]
ROLLBACK_BELOW = 0.05
"""Below this probability ``rollback`` discards a token, unless the caller says another."""


@dataclass(frozen=True, slots=True)
class ExitPolicy:
    """How tokens leave early.

    Attributes:
        criterion: When a token leaves at an exit.
        exit_layers: The exits in use, ascending, each by the number of layers run before it; None: all of the bundle.
        verify: ``none``: a token that leaves is emitted at once, and the layers above only fill their cache (EE-LLM,
            CALM). ``rollback``: the whole model sees pending tokens before they are emitted. It discards the first one
            to which it gives less than ``rollback_below``, and all after it (FREE, https://arxiv.org/abs/2310.05424).
            ``exact``: the whole model discards the first one that it would not have chosen, and all after it. The
            output is then that of plain decoding.
        rollback_below: The probability below which ``rollback`` discards a token, 0..1. None: 0.05.
        kv_policy: How the layers above catch up. ``flush``: in one run over all pending positions, when a token does
            not leave. ``pipeline``: on separate threads, while the layers below start the next token. ``auto``:
            whichever of the two is measured to be faster. ``recompute``: pending tokens run through the lower layers
            again; with ``prefill_exit`` this is EE-LLM's method with one stage, for comparison.
        max_pending: How many positions may wait for the layers above; more than 16 counts as 16. Without verification
            it changes no token. None: chosen from the measured costs of runs over several rows.
        prefill_exit: Whether the prompt may leave early, too. The first token then comes sooner. The prompt runs
            through the remaining layers when a later token needs them.

    Raises:
        RequestError: A value does not exist or is out of range, or two values do not go together.
    """

    criterion: Criterion
    exit_layers: tuple[int, ...] | None = None
    verify: Verify = "none"
    rollback_below: float | None = None
    kv_policy: KVPolicy = "flush"
    max_pending: int | None = None
    prefill_exit: bool = False

    def __post_init__(self) -> None:
        expect(
            callable(getattr(self.criterion, "leaves", None)),
            "exit criterion",
            self.criterion,
            "a criterion such as parse_criterion('top_prob >= 0.9')",
        )
        for name, kind in (("verify", Verify), ("kv_policy", KVPolicy)):
            value, names = getattr(self, name), get_args(kind)
            expect(isinstance(value, str) and value in names, name, value, " or ".join(names))
        below, pending = self.rollback_below, self.max_pending
        expect(below is None or is_between(below, 0, 1), "rollback_below", below, "a probability, 0..1")
        if below is not None and self.verify != "rollback":
            raise RequestError(f"rollback_below does nothing with verify {self.verify}", remedy="verify by rollback")
        expect(pending is None or is_whole(pending, 1), "max_pending", pending, "1 or more")
        expect_flags(self, "prefill_exit")
        if self.exit_layers is not None:
            self._check_exit_layers()
        if self.verify != "none" and self.kv_policy in ("pipeline", "auto"):
            raise RequestError(
                f"kv_policy {self.kv_policy} does not go with verify {self.verify}",
                expected="flush, since tokens to be verified wait for the layers above anyway",
                remedy="use flush, or verify none",
            )
        if isinstance(self.criterion, Adaptive) and self.kv_policy in ("pipeline", "auto"):
            raise RequestError(
                f"exit criterion {self.criterion} does not go with kv_policy {self.kv_policy}",
                expected="flush, since the threshold is learned from the final head over all pending positions",
                remedy="use flush, or give a number as the threshold",
            )
        if self.prefill_exit and (self.verify != "none" or self.kv_policy not in ("flush", "recompute")):
            raise RequestError(
                "prefill_exit goes with verify none and with kv_policy flush or recompute only",
                found=f"verify {self.verify}, kv_policy {self.kv_policy}",
            )

    def _check_exit_layers(self) -> None:
        layers: object = self.exit_layers
        is_right = isinstance(layers, Sequence) and not isinstance(layers, str | bytes)
        if not is_right or not all(is_whole(layer) for layer in self.exit_layers or ()):
            raise RequestError(
                "exit_layers",
                found=shown(layers),
                expected="exits such as (4, 8), each by the number of layers run before it",
            )
        if not layers:
            raise RequestError("exit_layers is empty", remedy="name an exit, or leave it out to use all")

    @property
    def takes_back_below(self) -> float:
        """The probability below which ``rollback`` discards a token; 0 with any other way to verify."""
        if self.verify != "rollback":
            return 0.0
        return ROLLBACK_BELOW if self.rollback_below is None else self.rollback_below

    def exits_in(self, plan: SplitPlan) -> tuple[int, ...]:
        """Return the exits in use in a bundle of this plan.

        Raises:
            RequestError: The bundle lacks an exit that the policy names, or an output that the criterion needs; or the
                policy needs more exits, or other ones.
        """
        specs: Mapping[int, object] = {e.exit_layer: e for e in plan.exits}
        if not specs:
            raise RequestError(
                "early exit needs an exit, and this bundle has none", remedy="re-export with --exit-layer E"
            )
        wanted = tuple(specs) if self.exit_layers is None else self.exit_layers
        named = set(wanted) | self.criterion.exit_layers
        if unknown := sorted(named - specs.keys()):
            raise RequestError(
                f"unknown exit {', '.join(map(str, unknown))}",
                expected=f"one of {list(specs)}",
                remedy=f"use those, or re-export with {' '.join(f'--exit-layer {layer}' for layer in unknown)}",
            )
        used = tuple(sorted(set(wanted)))
        if isinstance(self.criterion, MaxDepth) and self.criterion.last > used[-1]:
            raise RequestError(
                f"exit criterion {self.criterion} lets no token leave: the bound stays above every exit in use",
                found=list(used),
                expected=f"a last bound of {used[-1]} or less",
                remedy=f"write max_depth = {max(self.criterion.first, used[-1])}..{used[0]}",
            )
        if self.criterion.least_exits > len(used):
            raise RequestError(
                f"exit criterion {self.criterion} needs at least {self.criterion.least_exits} exits in use",
                found=list(used),
                remedy="use more exits, or another criterion",
            )
        exits = [e for e in plan.exits if e.exit_layer in used]
        if "gate" in self.criterion.needs and not any(e.has_gate for e in exits):
            raise RequestError(
                f"exit criterion {self.criterion} needs a gate",
                found=f"no gate at the exits after {', '.join(map(str, used))} layers",
                remedy="train exits with a gate, or use another criterion such as top_prob or margin",
            )
        if self.prefill_exit and any(e.sees_state for e in exits):
            raise RequestError(
                "prefill_exit does not go with exits that see the whole model's state",
                remedy="leave out prefill_exit, or use other exits",
            )
        return used
