"""What a comparison of a drafter with its twin found, in words and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from shortstack.export.parity.bundle_weights import WeightError
from shortstack.export.parity.compare import HeadError, LayerError, Tolerance

_SUSPICIOUS = 0.2
_JUDGED = 20  # first drafts, below which an acceptance rate says little
_FEW = 0.05
"""Of the drafts of a quantized bundle, single ones may differ by more than a near tie: single logits do. Measured on
tiny models: at most 1.2%."""
_MAX_LISTED = 6


@dataclass(frozen=True, slots=True)
class DraftFork:
    """A draft that is not the twin's.

    Attributes:
        text: Which text.
        where: How the draft came about.
        position: The position that it is for.
        draft: Its number in its round, from 1.
        ours: The bundle's token.
        theirs: The twin's.
        gap: By how much the twin's logit of its own token is larger; infinite where its head has no row for ours.
    """

    text: int
    where: str
    position: int
    draft: int
    ours: int
    theirs: int
    gap: float


@dataclass(slots=True)
class DrafterParity:
    """The result of all comparisons.

    Attributes:
        kind: Of the drafter.
        features: The depths that it reads; none where it reads the final state.
        shared: The layers of the model whose keys and values it reads; none where it has its own.
        tolerance: The differences that are allowed.
        drafts: The logits of first drafts, second ones and so on; ``depth`` is the number of the draft.
        tensors: What the model leaves for the drafter, its fused states, and the states that drafts give.
        weights: How far a quantized bundle's weights are from the published ones.
        forks: Drafts that are not the twin's, near ties included.
        compared: Drafts that were compared.
        drafted_at: Drafted tokens by position in their round.
        accepted_at: Those of them that the model accepted.
    """

    kind: str
    features: tuple[int, ...]
    tolerance: Tolerance
    drafts: list[HeadError] = field(default_factory=list)
    tensors: list[LayerError] = field(default_factory=list)
    weights: list[WeightError] = field(default_factory=list)
    forks: list[DraftFork] = field(default_factory=list)
    compared: int = 0
    shared: tuple[int, ...] = ()
    drafted_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)

    @property
    def acceptance(self) -> float:
        """The acceptance rate of all drafts; 0 without any."""
        return sum(self.accepted_at) / max(1, sum(self.drafted_at))

    @property
    def first_acceptance(self) -> float:
        """The acceptance rate of first drafts; 0 without any."""
        return self.accepted_at[0] / self.drafted_at[0] if self.drafted_at else 0.0

    @property
    def is_suspicious(self) -> bool:
        """Whether so few first drafts are accepted that something may be wrong with what the drafter reads."""
        return bool(self.drafted_at) and self.drafted_at[0] >= _JUDGED and self.first_acceptance < _SUSPICIOUS

    def problems(self) -> list[str]:
        """Return one sentence for each finding out of tolerance."""
        found, limit = [], self.tolerance
        for draft in self.drafts:
            unit = self._unit(draft)
            if draft.max_abs > limit.max_abs * unit or draft.mean_abs > limit.mean_abs * unit:
                text, row, column = draft.worst
                found.append(
                    f"draft {draft.depth} of the drafter: logits max {draft.max_abs:.2e} (allowed "
                    f"{limit.max_abs * unit:.0e}), mean {draft.mean_abs:.2e} (allowed {limit.mean_abs * unit:.0e}), "
                    f"worst at text {text}, row {row}, row {column} of the head"
                )
        found += [
            f"{tensor.what} is off by {tensor.relative:.1e} of its size (allowed {limit.relative:.0e}), worst at text "
            f"{tensor.worst[0]}, position {tensor.worst[1]}"
            for tensor in self.tensors
            if not tensor.relative <= limit.relative
        ]
        found += [
            f"{weight.what} is not the published one: off by {weight.relative:.2f} of its size (allowed "
            f"{limit.weights})"
            for weight in self.weights
            if weight.relative > limit.weights
        ]
        wrong = [fork for fork in self.forks if not self._is_near(fork)]
        if limit.in_deviations and len(wrong) <= _FEW * self.compared:
            wrong = []
        found += [
            f"text {fork.text}, {fork.where}: draft {fork.draft}, of position {fork.position}, is {fork.ours} instead "
            f"of {fork.theirs}, whose lead is {fork.gap:.1e} (a near tie is below {self._tie(fork):.0e})"
            for fork in wrong[:_MAX_LISTED]
        ]
        if len(wrong) > _MAX_LISTED:
            found.append(f"and {len(wrong) - _MAX_LISTED} more drafts are not the twin's")
        return found

    @property
    def tie(self) -> float:
        """The lead of the twin's token below which another first draft is a near tie."""
        return self.tolerance.tie * (self._unit(self.drafts[0]) if self.drafts else 1.0)

    def _tie(self, fork: DraftFork) -> float:
        """Return it for one draft: in a quantized bundle, each is made from states that earlier ones rounded."""
        return self.tie * (fork.draft if self.tolerance.in_deviations else 1)

    def _is_near(self, fork: DraftFork) -> bool:
        return fork.gap < self._tie(fork)

    def _unit(self, draft: HeadError) -> float:
        """Return what differences are measured in: logits of drafters without norms grow from draft to draft."""
        return draft.deviation if self.tolerance.in_deviations else max(1.0, draft.deviation)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        derived = ("acceptance", "first_acceptance", "is_suspicious")
        return asdict(self) | {name: getattr(self, name) for name in derived} | {"problems": self.problems()}

    def lines(self) -> Iterator[str]:
        """Yield it as lines for the user."""
        reads = f"depths {', '.join(map(str, self.features))}" if self.features else "the final state"
        if self.shared:
            reads += f" and keys and values of layers {', '.join(map(str, sorted(set(self.shared))))}"
        yield f"drafter ({self.kind}, reads {reads}): {self.compared} drafts compared with its twin"
        for draft in self.drafts:
            yield (
                f"{f'draft {draft.depth}':<14} logits: max {draft.max_abs:.1e}, mean {draft.mean_abs:.1e}, "
                f"same top token {draft.agreement:.2%}"
            )
        worst = max(self.tensors, key=lambda each: each.relative)
        yield f"worst of the drafter's states: {worst.what}, relative {worst.relative:.1e}"
        if self.weights:
            furthest = max(self.weights, key=lambda each: each.relative)
            yield f"drafter weights: furthest from the published {furthest.what}, relative {furthest.relative:.1e}"
        near = [fork for fork in self.forks if self._is_near(fork)]
        for fork in near[:_MAX_LISTED]:
            yield (
                f"near tie: text {fork.text}, {fork.where}, draft {fork.draft} of position {fork.position}: "
                f"{fork.ours} / {fork.theirs}, lead {fork.gap:.1e}"
            )
        if not self.forks:
            yield "drafts: identical"
        if not self.drafted_at:
            yield "acceptance: not measured (--greedy-tokens is too small)"
            return
        rates = ", ".join(
            f"{accepted / drafted:.0%}" for drafted, accepted in zip(self.drafted_at, self.accepted_at, strict=True)
        )
        yield f"acceptance: {self.acceptance:.1%} of {sum(self.drafted_at)} drafts (by place in a round: {rates})"
        if self.is_suspicious:
            yield (
                f"note: the model accepts {self.first_acceptance:.0%} of {self.drafted_at[0]} first drafts, and "
                "trained drafters reach 40% and more. "
                + (
                    f"Check that the drafter was trained on depths {', '.join(map(str, self.features))} of this model "
                    "(eagle_aux_hidden_state_layer_ids), and that the texts are like those of its training"
                    if self.features
                    else "Check that it was trained for this model, on texts like these"
                )
            )
