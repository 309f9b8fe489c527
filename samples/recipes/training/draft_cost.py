"""What a draft costs and what alpha is worth: the arithmetic behind every predicted speed-up of an exit.

A small model on a CPU waits for memory, so the cost of a run is the weights it reads. In units of a plain step::

    f = (E layers + branch + head) / (L layers + LM head) + launch        one draft
    S = tokens of a round / (drafts * f + c(drafts + 1))                  one row more than drafts is judged

The formula of S is in :mod:`shortstack.runtime.decode.speed_up`, but for the tokens of a round: they are counted by
walking through held-out answers. An acceptance rate that is the same everywhere flatters, since rounds start where the
one before was rejected.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shortstack.graphs.errors import RequestError
from shortstack.graphs.exit_parts import mlp_weights
from shortstack.graphs.layer_weights import Weight
from shortstack.graphs.plan import ExitSpec
from shortstack.graphs.spec import ModelSpec
from shortstack.runtime.decode.speed_up import round_cost

ROW_COSTS: Mapping[int, float] = {1: 1.0, 2: 1.06, 4: 1.17, 8: 1.52}
"""c(M) of SmolLM2-135M in float32 on two cores, as ``python -m shortstack.samples.bench`` measured it."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs in units of a plain step.

    Attributes:
        rows: c(M) for some M, 1 among them; between them it is interpolated.
        launch: What a run costs whatever it computes.
    """

    rows: Mapping[int, float]
    launch: float = 0.0

    def judging(self, rows: int) -> float:
        """Return c(rows); beyond the largest M it grows as between the last two."""
        known = sorted(self.rows)
        if rows > known[-1] and len(known) > 1:
            low, high = known[-2:]
            slope = (self.rows[high] - self.rows[low]) / (high - low)
            return self.rows[high] + slope * (rows - high)
        return float(np.interp(rows, known, [self.rows[m] for m in known]))


def read_row_costs(text: str) -> dict[int, float]:
    """Read ``1:1,2:1.06,4:1.17``.

    Raises:
        RequestError: It is not of that form, or 1 is not 1.
    """
    try:
        found = {int(rows): float(cost) for rows, cost in (pair.split(":") for pair in text.split(","))}
    except ValueError:
        found = {}
    if found.get(1) != 1.0 or not all(rows > 0 and math.isfinite(cost) and cost > 0 for rows, cost in found.items()):
        raise RequestError(
            "--row-costs",
            found=repr(text),
            expected="ROWS:COST,..., in units of one row: 1:1,2:1.06,4:1.17",
            remedy="take c(M) from python -m shortstack.samples.bench",
        )
    return found


def layer_parameters(spec: ModelSpec, layer: int = 0) -> int:
    """Return the parameters of one layer's matrices."""
    return _matrix_values(spec.weights(layer))


def _matrix_values(weights: Iterable[Weight]) -> int:
    return sum(math.prod(weight.shape) for weight in weights if weight.is_matrix)


def branch_parameters(spec: ModelSpec, exit_spec: ExitSpec) -> int:
    """Return the parameters of the matrices that an exit adds below its head."""
    width = spec.hidden_size
    if exit_spec.branch == "block":
        return _matrix_values(spec.exit_block_weights(exit_spec.exit_layer))
    if exit_spec.branch == "mlp":
        return _matrix_values(mlp_weights(spec.exit_block_weights(exit_spec.exit_layer)))
    if exit_spec.branch == "none":
        return 0
    inputs = width * (1 + exit_spec.sees_token + exit_spec.sees_state)
    return inputs * width + exit_spec.linear_mlp * (2 * inputs + width)


def head_parameters(spec: ModelSpec, exit_spec: ExitSpec) -> int:
    """Return the parameters of an exit's head."""
    rows = exit_spec.draft_vocab or spec.vocab_size
    if exit_spec.head == "low_rank":
        return exit_spec.head_rank * (spec.hidden_size + rows)
    return rows * spec.hidden_size


def draft_cost(spec: ModelSpec, exit_spec: ExitSpec, costs: Costs) -> float:
    """Return f, the cost of one draft.

    An MLP exit's own layer still runs whole: the layers above read it.
    """
    lower = exit_spec.exit_layer * layer_parameters(spec)
    whole = spec.num_hidden_layers * layer_parameters(spec) + spec.vocab_size * spec.hidden_size
    return (lower + branch_parameters(spec, exit_spec) + head_parameters(spec, exit_spec)) / whole + costs.launch


@dataclass(frozen=True, slots=True)
class Drafts:
    """What an exit drafts from each position of held-out answers, whether or not a round would start there.

    Attributes:
        is_right: bool [positions, drafts]: draft j from position t is the whole model's token behind t + j.
        confidence: float [positions, drafts]: the exit's top-1 probability.
        is_usable: bool [positions, drafts]: position t + j is inside the answer, and the text up to there is what the
            whole model predicts, so that the comparison means something.
        answer_ends: One past the last position of each answer, ascending, int64 [answers].
    """

    is_right: npt.NDArray[np.bool_]
    confidence: npt.NDArray[np.float32]
    is_usable: npt.NDArray[np.bool_]
    answer_ends: npt.NDArray[np.int64]

    @property
    def alphas(self) -> list[float]:
        """Alpha of draft 1, 2, ...: accepted given that those before were, over all positions."""
        found: list[float] = []
        alive = np.ones(len(self.is_right), dtype=bool)
        for right, usable in zip(self.is_right.T, self.is_usable.T, strict=True):
            alive = alive & usable
            found.append(float(right[alive].mean()) if alive.any() else 0.0)
            alive = alive & right
        return found


@dataclass(frozen=True, slots=True)
class Policy:
    """How many tokens to draft.

    Attributes:
        drafts: Most drafts of a round.
        threshold: A draft whose top-1 probability is below is thrown away and ends the round; 0 keeps all.
    """

    drafts: int
    threshold: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a policy gives on held-out answers.

    Attributes:
        policy: The policy.
        tokens_per_round: Emitted tokens.
        acceptance: Alpha, accepted / judged; the name stands in reports.
        speed_up: Over plain decoding, predicted from the costs.
    """

    policy: Policy
    tokens_per_round: float
    acceptance: float
    speed_up: float


def play(drafts: Drafts, policy: Policy, draft: float, costs: Costs) -> Outcome:
    """Walk through the answers round by round.

    Args:
        drafts: What is drafted from each position.
        policy: How many tokens.
        draft: f.
        costs: What judging costs.
    """
    most = min(policy.drafts, drafts.is_right.shape[1])
    sure = drafts.confidence[:, :most] >= policy.threshold
    kept = np.cumprod(sure, axis=1).sum(axis=1)  # drafts that are judged [positions]
    runs = np.minimum(kept + 1, most)
    right = np.cumprod(drafts.is_right[:, :most] & drafts.is_usable[:, :most], axis=1)
    accepted = np.array([row[:count].sum() for row, count in zip(right, kept, strict=True)])
    judging = np.array([costs.judging(rows) for rows in range(most + 2)])
    rounds = tokens = judged = 0
    cost, position = 0.0, 0
    for end in drafts.answer_ends.tolist():
        while position < end:
            emitted = min(int(accepted[position]) + 1, end - position)
            cost += round_cost(float(runs[position]), draft, float(judging[kept[position] + 1]))
            judged += min(int(accepted[position]) + 1, int(kept[position]))
            rounds, tokens, position = rounds + 1, tokens + emitted, position + emitted
    return Outcome(policy, tokens / rounds, (tokens - rounds) / max(judged, 1), tokens / cost)


def best_outcome(
    drafts: Drafts, draft: float, costs: Costs, thresholds: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
) -> Outcome:
    """Return the fastest of all lengths and thresholds; thresholds (0,) compares fixed lengths only."""
    lengths = range(1, drafts.is_right.shape[1] + 1)
    outcomes = [play(drafts, Policy(k, tau), draft, costs) for k in lengths for tau in thresholds]
    return max(outcomes, key=lambda outcome: outcome.speed_up)
