"""Compares a bundle with transformers' PyTorch model of the same checkpoint, and names where they differ.

There are three comparisons, each on real text:

1. teacher-forced: the logits of every exit and of the final head, at every position. An exit with its own weights is
   compared with the PyTorch twin, since transformers has no exits;
2. layer by layer: the keys and values that each layer left in the cache, and the hidden states at each cut. They show
   which layer is the first that went wrong;
3. greedy: continuations token by token, plain and self-speculative. A fork is a problem unless the reference's own best
   two logits are a near tie there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from shortstack.export.parity.bundle_weights import WeightError
from shortstack.export.parity.exits import TwinExits, check_exits, columns, random_states
from shortstack.export.parity.reference import Reference
from shortstack.export.parity.twin_reference import TwinReference
from shortstack.graphs.errors import RequestError
from shortstack.graphs.manifest import Manifest
from shortstack.graphs.spec import DType, ModelSpec
from shortstack.runtime.decode.draft_length import DraftPolicy
from shortstack.runtime.engine.whole_text import Activations, Array
from shortstack.runtime.model import Model
from shortstack.runtime.request import Plain, Speculate, Strategy


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far logits may be from the reference.

    Attributes:
        max_abs: Largest difference of one logit.
        mean_abs: Mean difference over all logits of a head.
        tie: Gap between the reference's best two logits below which a greedy fork is a near tie.
        relative: Largest difference of a tensor in the cache or at a cut, divided by its largest value. A tensor above
            it is named as the cause when logits are wrong.
        in_deviations: The first three are in units of the standard deviation of the reference's logits, and a tensor
            above ``relative`` is itself a problem: among many layers, one matrix moves the logits little.
        weights: Largest difference of a weight from the checkpoint's, see :class:`WeightError`.
    """

    max_abs: float
    mean_abs: float
    tie: float
    relative: float
    in_deviations: bool = False
    weights: float = 0.0


# float32: what a first bundle must meet. float16: 11 bits of mantissa in every layer, measured on SmolLM2-135M.
TOLERANCES: dict[DType, Tolerance] = {
    "float32": Tolerance(1e-3, 5e-5, 1e-4, 1e-3),
    "float16": Tolerance(0.5, 0.03, 0.1, 5e-2),
}
QUANTIZED = Tolerance(5.0, 0.08, 1.0, 0.6, in_deviations=True, weights=0.3)
"""For blocks or an int8 cache, against PyTorch with the weights that the blocks stand for: products round their inputs
to 8 bits, and such a cache rounds keys and values. Nothing else differs. Where a random model leaves the range that its
cache was calibrated for, single logits are off by up to 3 deviations, so it is the mean that judges.

Measured: a mean of 0.044 with SmolLM2-135M, whose keys and values are off by 0.07, and 0.05 with tiny random models,
which fork at leads of up to 0.53. One product with the matrix of another layer: at least 0.20 and 0.12. Weights in int8
are 0.006 from the checkpoint's, in int4 0.12; another matrix is 1.4 away, zeros 1."""


def tolerance_of(manifest: Manifest) -> Tolerance:
    """Return how far a bundle's logits may be from the reference."""
    return TOLERANCES[manifest.dtype] if manifest.precision.is_float else QUANTIZED


_MAX_LISTED = 6
_MAY_DIFFER = ("model_type", "max_position_embeddings")
"""In two descriptions of one model: a GGUF file says scaling as divisors, and may allow shorter texts."""


@dataclass(frozen=True, slots=True)
class HeadError:
    """How far one head's logits are from the reference, over all texts and positions.

    Attributes:
        depth: Layers run before the head; L is the final head.
        max_abs: Largest absolute difference.
        mean_abs: Mean absolute difference.
        worst: Text, position and token id of the largest difference.
        agreement: Share of positions at which both sides have the same most likely token.
        deviation: Standard deviation of the reference's logits.
    """

    depth: int
    max_abs: float
    mean_abs: float
    worst: tuple[int, int, int]
    agreement: float
    deviation: float


@dataclass(frozen=True, slots=True)
class LayerError:
    """How far one tensor is from the reference.

    Attributes:
        what: ``layer 7 key``, ``layer 7 value`` or ``hidden after 8 layers``.
        relative: The largest difference, divided by the reference's largest value.
        worst: Text and position of the largest difference.
    """

    what: str
    relative: float
    worst: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Fork:
    """Where a greedy continuation leaves the reference's, and the gap of the reference's best two logits there."""

    text: int
    strategy: str
    position: int
    ours: int
    theirs: int
    gap: float


@dataclass(slots=True)
class ParityReport:
    """The result of all comparisons.

    Attributes:
        tolerance: The differences that are allowed.
        heads: One entry per exit, the final head last.
        layers: Cache and boundary errors, bottom to top.
        weights: How far a quantized bundle's weights are from the checkpoint's; empty for a bundle of floats.
        forks: Greedy forks, near ties included.
        texts: How many texts.
        positions: How many positions in all.
        greedy_tokens: How many tokens of greedy continuation in all.
    """

    tolerance: Tolerance
    heads: list[HeadError] = field(default_factory=list)
    layers: list[LayerError] = field(default_factory=list)
    weights: list[WeightError] = field(default_factory=list)
    forks: list[Fork] = field(default_factory=list)
    texts: int = 0
    positions: int = 0
    greedy_tokens: int = 0

    def problems(self) -> list[str]:
        """Return one sentence for each finding out of tolerance; it names the worst layer and position."""
        found = []
        for head in self.heads:
            unit = self._unit(head)
            max_abs, mean_abs = self.tolerance.max_abs * unit, self.tolerance.mean_abs * unit
            if head.max_abs > max_abs or head.mean_abs > mean_abs:
                text, position, token = head.worst
                found.append(
                    f"head after {head.depth} layers: max {head.max_abs:.2e} (allowed {max_abs:.0e}), "
                    f"mean {head.mean_abs:.2e} (allowed {mean_abs:.0e}), "
                    f"worst at text {text}, position {position}, token {token}"
                )
        if found or (self.tolerance.in_deviations and any(x.relative > self.tolerance.relative for x in self.layers)):
            found.append(self._first_wrong())
        found += [
            f"{weight.what} is not the checkpoint's: off by {weight.relative:.2f} of its size (allowed "
            f"{self.tolerance.weights})"
            for weight in self.weights
            if not weight.is_kept and weight.relative > self.tolerance.weights
        ]
        found += [
            f"{weight.what} keeps the checkpoint's blocks and differs from them: off by {weight.relative:.2g} of its "
            "size (allowed 0)"
            for weight in self.weights
            if weight.is_kept and weight.relative
        ]
        tie = self.tolerance.tie * self._unit(self.heads[-1]) if self.heads else self.tolerance.tie
        found += [
            f"text {fork.text}, {fork.strategy}: greedy fork at new token {fork.position}: {fork.ours} instead of "
            f"{fork.theirs}, whose lead is {fork.gap:.1e} (a near tie is below {tie:.0e})"
            for fork in self.forks
            if fork.gap >= tie
        ]
        return found

    def _unit(self, head: HeadError) -> float:
        return head.deviation if self.tolerance.in_deviations else 1.0

    def _first_wrong(self) -> str:
        """Say which tensor the heads' error comes from."""
        limit = self.tolerance.relative
        if not self.layers:
            return "an int8 cache holds codes, and the bundle has no cut, so no tensor inside it was compared"
        worst = max(self.layers, key=lambda layer: layer.relative)
        first = next((x for x in self.layers if x.relative > limit), None)
        if first is None:
            return (
                f"no cache or hidden states are off by more than {limit:.0e} (worst: {worst.what}, "
                f"{worst.relative:.1e}), so look at what follows the last keys and values, up to the LM head"
            )
        return (
            f"the first tensor off by more than {limit:.0e} is {first.what} (relative {first.relative:.1e}, text "
            f"{first.worst[0]}, position {first.worst[1]}), the worst is {worst.what} ({worst.relative:.1e})"
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        return asdict(self) | {"problems": self.problems()}


def compare(
    model: Model,
    reference: Reference | TwinReference,
    texts: Sequence[Sequence[int]],
    *,
    greedy_tokens: int,
    exits: TwinExits | None = None,
    advance: Callable[[float], None] = lambda _: None,
) -> ParityReport:
    """Compare a loaded bundle with the reference.

    Args:
        model: The bundle.
        reference: transformers' model, or the twin if transformers has no such model; with the bundle's weights if it
            is quantized.
        texts: Token ids of each text; greedy continuations start from them.
        greedy_tokens: Tokens of each continuation; 0 compares logits only.
        exits: The exits that the bundle was exported with, if they have their own weights.
        advance: Called with 1 after each text.

    Raises:
        RequestError: They are not the same model, or the bundle's trained exits are not given.
    """
    manifest = model.bundle.manifest
    check_exits(manifest, exits)
    _check_same_model(manifest.spec, reference.spec)
    depths = (*manifest.plan.boundaries, manifest.spec.num_hidden_layers)
    weights = [*reference.weight_errors, *(() if exits is None else exits.weight_errors)]
    report = ParityReport(tolerance_of(manifest), weights=weights, texts=len(texts))
    heads: dict[int, list[tuple[Array, Array]]] = {depth: [] for depth in depths}
    layers: dict[str, LayerError] = {}
    for index, text in enumerate(texts):
        theirs = reference.run_text(text, depths)
        state = random_states(model, text)
        ours = model.activations(text, state)
        twins = {} if exits is None else exits.logits(model, text, state)
        report.positions += len(text)
        for depth in depths:
            expected = theirs.heads[depth]
            if depth in twins:
                expected = twins[depth]
            elif depth not in reference.own_heads:
                expected = columns(model, depth, expected)
            heads[depth].append((ours.heads[depth], expected))
        for error in _layer_errors(ours, theirs, index):
            if error.what not in layers or error.relative > layers[error.what].relative:
                layers[error.what] = error
        if greedy_tokens:
            _compare_greedy(model, reference, text, index, greedy_tokens, report)
        advance(1)
    report.heads = [head_error(depth, pairs) for depth, pairs in heads.items()]
    report.layers = list(layers.values())
    return report


def _check_same_model(bundle: ModelSpec, checkpoint: ModelSpec) -> None:
    found = [
        f"{where} is {ours} in the bundle and {theirs} in the checkpoint"
        for where, ours, theirs in differences("", asdict(bundle), asdict(checkpoint))
    ]
    if found:
        more = f"; and {len(found) - _MAX_LISTED} more differences" if len(found) > _MAX_LISTED else ""
        raise RequestError(
            f"the bundle was made from another model: {'; '.join(found[:_MAX_LISTED])}{more}",
            remedy="give the checkpoint that the bundle was made from",
        )


def differences(where: str, ours: object, theirs: object) -> Iterator[tuple[str, object, object]]:
    """Yield the fields in which two nested descriptions differ; GGUF files hold numbers in float32."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        for name in ours:
            is_said_otherwise = name == "scaling" and "factors" in (ours[name]["kind"], theirs[name]["kind"])
            if name not in _MAY_DIFFER and not is_said_otherwise:
                yield from differences(f"{where}.{name}".lstrip("."), ours[name], theirs[name])
    elif isinstance(ours, tuple) and isinstance(theirs, tuple):
        if len(ours) != len(theirs):
            yield f"the length of {where}", len(ours), len(theirs)
            return
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(f"{where}[{number}]", *pair)
    elif isinstance(ours, float) and isinstance(theirs, float):
        if not math.isclose(ours, theirs, rel_tol=1e-6):
            yield where, ours, theirs
    elif ours != theirs:
        yield where, ours, theirs


def head_error(depth: int, pairs: list[tuple[Array, Array]]) -> HeadError:
    """Compare a head's logits with the reference's, of each text [positions, vocab]."""
    worst, max_abs, total, count, same, positions = (0, 0, 0), -1.0, 0.0, 0, 0, 0
    mean = sum(float(theirs.sum(dtype=np.float64)) for _, theirs in pairs) / sum(theirs.size for _, theirs in pairs)
    spread = 0.0
    for text, (ours, theirs) in enumerate(pairs):
        difference = np.abs(ours - theirs)
        # A NaN is the worst difference, but it would lose every comparison.
        difference = np.where(np.isnan(difference), np.inf, difference)
        at = np.unravel_index(int(difference.argmax()), difference.shape)
        if difference[at] > max_abs:
            max_abs, worst = float(difference[at]), (text, int(at[0]), int(at[1]))
        total, count = total + float(difference.sum(dtype=np.float64)), count + difference.size
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        positions += len(ours)
        spread += float(np.square(theirs - mean).sum(dtype=np.float64))
    return HeadError(depth, max_abs, total / count, worst, same / positions, math.sqrt(spread / count))


def _layer_errors(ours: Activations, theirs: Activations, text: int) -> list[LayerError]:
    """Compare keys and values [kv_heads, seq, head_dim] of each layer and hidden states [seq, hidden] at each cut."""

    def error(what: str, a: Array, b: Array, axes: tuple[int, ...]) -> LayerError:
        difference = np.abs(a - b).max(axis=axes)  # [seq]
        difference = np.where(np.isnan(difference), np.inf, difference)
        return LayerError(what, float(difference.max() / np.abs(b).max()), (text, int(difference.argmax())))

    errors = []
    for layer in range(len(theirs.keys)):
        if layer in ours.hidden:
            errors.append(error(f"hidden after {layer} layers", ours.hidden[layer], theirs.hidden[layer], (1,)))
        if not ours.keys:  # an int8 cache holds codes
            continue
        key, value = ours.keys[layer], ours.values[layer]
        errors.append(error(f"layer {layer} key", key, theirs.keys[layer], (0, 2)))
        errors.append(error(f"layer {layer} value", value, theirs.values[layer], (0, 2)))
    return errors


def _compare_greedy(
    model: Model,
    reference: Reference | TwinReference,
    text: Sequence[int],
    index: int,
    count: int,
    report: ParityReport,
) -> None:
    count = min(count, model.cache.max_length - len(text))
    if count < 1:  # the text fills the context
        return
    theirs, gaps = reference.greedy(text, count)
    report.greedy_tokens += count
    runs: list[tuple[str, Strategy]] = [("plain", Plain())]
    # The draft length is fixed: an adaptive one may never draft, and would prove nothing.
    drafted = DraftPolicy(max_draft_tokens=4)
    runs += [(f"self-speculative from {e}", Speculate(e, drafted)) for e in model.exit_layers]
    for name, strategy in runs:
        ours = model.generate(text, max_new_tokens=count, strategy=strategy, ignore_eos=True).tokens
        fork = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        if fork is not None:
            report.forks.append(Fork(index, name, fork, ours[fork], theirs[fork], gaps[fork]))
