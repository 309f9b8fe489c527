"""The schedules of LayerSkip and EE-LLM as plain functions of the step.

Sources: LayerSkip, https://arxiv.org/abs/2404.16710, sections 4.1.1 and 4.1.2; EE-LLM, https://arxiv.org/abs/2312.04916,
section 3. ``l`` counts layers from 0, an exit layer E is layer ``l = E - 1``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Curriculum = Literal["rotational", "gradual", "all"]
Scale = Literal["layerskip", "equal"]


def layer_dropout(num_layers: int, p_max: float, progress: float, *, from_scratch: bool) -> tuple[float, ...]:
    """Return per layer the probability that a sample skips it: S(t) * D(l) * p_max.

    D(l) = 2^(l / (L - 1)) - 1 grows from 0 to 1. S(t) = 1 for continual training and 2^t - 1 from scratch.

    Args:
        num_layers: L.
        p_max: Probability at the last layer, once S(t) is 1.
        progress: t, the part of the run that is done, 0..1.
        from_scratch: Which S(t).
    """
    scale = 2.0**progress - 1.0 if from_scratch else 1.0
    last = max(num_layers - 1, 1)
    return tuple(scale * p_max * (2.0 ** (layer / last) - 1.0) for layer in range(num_layers))


def exit_weights(num_layers: int, enabled: Sequence[int], e_scale: float, kind: Scale) -> dict[int, float]:
    """Return the normalised loss weight of each enabled depth and of the last layer; they add up to 1.

    ``layerskip``: e(l) = e_scale * sum_{i<=l} i below the last layer, e(L-1) = L - 1 + e_scale * sum_{i<=L-2} i: later
    layers weigh quadratically more. ``equal``: the last layer weighs 1 and the exits together e_scale, as TRL's recipe
    does; right for one or two very early exits, which the former all but ignores.

    Args:
        num_layers: L.
        enabled: Exit layers that count in this step, L excluded.
        e_scale: Weight of exits against the last layer.
        kind: Which rule.
    """
    if kind == "equal":
        weights = {depth: e_scale / len(enabled) for depth in enabled}
        weights[num_layers] = 1.0
    else:
        weights = {depth: e_scale * depth * (depth - 1) / 2 for depth in enabled}
        weights[num_layers] = num_layers - 1 + e_scale * (num_layers - 2) * (num_layers - 1) / 2
    total = sum(weights.values())
    return {depth: weight / total for depth, weight in weights.items()}


@dataclass(frozen=True, slots=True)
class ExitCurriculum:
    """Which exits count in which step.

    Attributes:
        exit_layers: The exits, ascending, L excluded.
        kind: ``rotational``: every ``every``-th exit, shifted by one each step. ``gradual``: from the deepest down, all
            of them from half of the run on. ``all``: each in every step.
        every: R of the rotational curriculum.
        num_layers: L.
    """

    exit_layers: tuple[int, ...]
    kind: Curriculum
    every: int
    num_layers: int

    def enabled(self, step: int, total_steps: int) -> tuple[int, ...]:
        """Return the exits that count in a step."""
        if self.kind == "rotational":
            return tuple(e for index, e in enumerate(self.exit_layers) if (index - step) % self.every == 0)
        if self.kind == "gradual":
            per_layer = total_steps / (2 * self.num_layers)
            return tuple(e for e in self.exit_layers if step >= per_layer * (self.num_layers - e))
        return self.exit_layers


def learning_rate(step: int, total_steps: int, peak: float, warmup_steps: int, final_ratio: float = 0.1) -> float:
    """Return the rate at a step: linear warm-up, then a cosine from ``peak`` to ``peak * final_ratio``."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return peak * (final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def ee_llm_weight(step: int, warmup_steps: int, start: float, end: float, style: Literal["linear", "cosine"]) -> float:
    """Return the weight of an exit's loss in EE-LLM: from ``start`` to ``end`` in ``warmup_steps``, then constant.

    ``start < end`` is a warm-up and ``start > end`` a decay.
    """
    ratio = 1.0 if warmup_steps <= 0 else min(step / warmup_steps, 1.0)
    if style == "cosine":
        ratio = 0.5 * (1 - math.cos(math.pi * ratio))
    return start + ratio * (end - start)
