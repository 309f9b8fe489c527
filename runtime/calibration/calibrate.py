"""The experiment: the whole model answers every prompt once, and early exit answers it once per threshold.

Thresholds are tested in order, the most conservative first. Testing ends at the first whose p-value is above epsilon
(:mod:`.learn_then_test`), so no time is spent on the thresholds beyond it. A sweep measures the whole grid instead, for
the curve of quality over speed. It finds the same threshold.

The guarantee holds for greedy answers of at most ``max_new_tokens`` tokens, to prompts like those of the calibration.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from shortstack import __version__
from shortstack.graphs.errors import RequestError
from shortstack.progress import Advance, Stage
from shortstack.runtime.calibration.dissimilarity import LOSSES, Answer, Loss, dissimilarity
from shortstack.runtime.calibration.learn_then_test import TESTS, Test, fewest_prompts, fixed_sequence, p_value
from shortstack.runtime.calibration.profile import Point, Profile, precision_words
from shortstack.runtime.calibration.template import DEFAULT_TEMPLATE, Template
from shortstack.runtime.decode.step import Stats
from shortstack.runtime.early_exit.criteria import Fixed
from shortstack.runtime.early_exit.policy import ExitPolicy
from shortstack.runtime.model import Model
from shortstack.runtime.request import ExitEarly, Plain
from shortstack.runtime.result import Result


@dataclass(frozen=True, slots=True)
class CalibrationSpec:
    """What to calibrate.

    Attributes:
        delta: Bound on the mean loss, between 0 and 1.
        epsilon: Probability with which the bound may fail, between 0 and 1.
        template: The exit criterion with a gap for the threshold.
        exit_layers: The exits in use; None: all of the bundle.
        grid: Thresholds to try, in any order; None: those of the template.
        loss: The loss that is bounded, see :mod:`.dissimilarity`.
        test: The statistical test, see :mod:`.learn_then_test`.
        max_new_tokens: The most tokens per answer; the whole model always predicts the first.
        is_sweep: Whether to measure the whole grid.

    Raises:
        RequestError: A value is out of range, or two values do not go together.
    """

    delta: float = 0.1
    epsilon: float = 0.05
    template: Template = Template(DEFAULT_TEMPLATE)  # noqa: RUF009 - frozen
    exit_layers: tuple[int, ...] | None = None
    grid: tuple[float, ...] | None = None
    loss: Loss = "text"
    test: Test = "hoeffding"
    max_new_tokens: int = 64
    is_sweep: bool = False

    def __post_init__(self) -> None:
        for name, value in (("delta", self.delta), ("epsilon", self.epsilon)):
            if not 0.0 < value < 1.0:
                raise RequestError(name, found=value, expected="between 0 and 1")
        if self.loss not in LOSSES:
            raise RequestError("loss", found=repr(self.loss), expected=" or ".join(LOSSES))
        if self.test not in TESTS:
            raise RequestError("test", found=repr(self.test), expected=" or ".join(TESTS))
        if self.test == "binomial" and self.loss != "any":
            raise RequestError(
                f"test binomial does not go with loss {self.loss}",
                expected="a loss that is 0 or 1",
                remedy="use loss any, or test hoeffding-bentkus",
            )
        if self.max_new_tokens < 2:
            raise RequestError(
                "max_new_tokens", found=self.max_new_tokens, expected="2 or more: the first token never leaves early"
            )

    @property
    def fewest_prompts(self) -> int:
        """The fewest prompts with which a threshold can pass."""
        return fewest_prompts(self.test, self.delta, self.epsilon)


@dataclass(frozen=True, slots=True)
class Calibration:
    """The result of the experiment.

    Attributes:
        spec: The specification that was calibrated.
        exit_layers: The exits in use, ascending.
        num_layers: Layers of the model.
        prompts: How many prompts were used.
        grid: Thresholds, most conservative first.
        accepted: How many of them passed.
        points: The measurements, in the grid's order.
        losses: For each point, the losses by prompt.
        plain_tokens_per_s: Decoding speed of the whole model's answers; None if they were too short.
    """

    spec: CalibrationSpec
    exit_layers: tuple[int, ...]
    num_layers: int
    prompts: int
    grid: tuple[float, ...]
    accepted: int
    points: tuple[Point, ...]
    losses: tuple[tuple[float, ...], ...]
    plain_tokens_per_s: float | None = None

    @property
    def chosen(self) -> Point | None:
        """The boldest threshold that passed; None if none passed, so that every token runs through all layers."""
        return self.points[self.accepted - 1] if self.accepted else None

    def profile(self, name: str, model: Model) -> Profile:
        """Return a profile with this result for ``model``, the model that was calibrated."""
        chosen, spec, manifest = self.chosen, self.spec, model.bundle.manifest
        mean_exit_layer = float(self.num_layers) if chosen is None else chosen.mean_exit_layer
        return Profile(
            name=name,
            template=spec.template.text,
            threshold=None if chosen is None else chosen.threshold,
            criterion=str(Fixed(always=False) if chosen is None else spec.template.at(chosen.threshold)),
            exit_layers=self.exit_layers,
            delta=spec.delta,
            epsilon=spec.epsilon,
            prompts=self.prompts,
            loss=spec.loss,
            test=spec.test,
            max_new_tokens=spec.max_new_tokens,
            mean_loss=0.0 if chosen is None else chosen.mean_loss,
            mean_exit_layer=mean_exit_layer,
            exited_share=0.0 if chosen is None else chosen.exited_share,
            predicted_saving=1 - mean_exit_layer / self.num_layers,
            grid=self.grid,
            weights_sha256=manifest.weights_sha256,
            precision=precision_words(manifest),
            shortstack=__version__,
            curve=self.points,
        )


def calibrate(
    model: Model, prompts: Sequence[Sequence[int]], spec: CalibrationSpec, stage: Stage | None = None
) -> Calibration:
    """Find the boldest threshold that keeps the bound of ``spec``.

    Args:
        model: The model.
        prompts: The token ids of each prompt; drawn from the same population as the prompts of later use.
        spec: What to calibrate.
        stage: Receives the progress.

    Raises:
        RequestError: There are too few prompts for any threshold to pass (a sweep measures them anyway), or the bundle
            lacks what the criterion needs, or a prompt is not valid for the bundle.
    """
    exits = ExitPolicy(spec.template.at(1), spec.exit_layers).exits_in(model.bundle.manifest.plan)
    grid = spec.template.ordered(spec.template.default_grid(len(exits)) if spec.grid is None else spec.grid)
    policies = [ExitPolicy(spec.template.at(value), exits) for value in grid]
    for policy in policies:
        policy.exits_in(model.bundle.manifest.plan)
    if not prompts or (len(prompts) < spec.fewest_prompts and not spec.is_sweep):
        raise too_few(len(prompts), spec)
    experiment = _Experiment(model, prompts, spec, stage or _silent)
    points: list[Point] = []
    losses: list[tuple[float, ...]] = []

    def measured(start: int) -> Iterator[float]:
        for index in range(start, len(grid)):
            point, found = experiment.measure(policies[index], grid[index], f"{index + 1} of {len(grid)}")
            points.append(point)
            losses.append(found)
            yield point.p_value

    accepted = fixed_sequence(measured(0), spec.epsilon)
    if spec.is_sweep:
        for _ in measured(len(points)):
            pass
    return Calibration(
        spec=spec,
        exit_layers=exits,
        num_layers=model.bundle.manifest.spec.num_hidden_layers,
        prompts=len(prompts),
        grid=grid,
        accepted=accepted,
        points=tuple(replace(point, is_accepted=index < accepted) for index, point in enumerate(points)),
        losses=tuple(losses),
        plain_tokens_per_s=experiment.plain_tokens_per_s,
    )


def too_few(prompts: int, spec: CalibrationSpec) -> RequestError:
    """Return the error that says how many prompts are needed."""
    tighter = fewest_prompts("hoeffding-bentkus", spec.delta, spec.epsilon)
    other = f", or --test hoeffding-bentkus, which needs {tighter}" if spec.test == "hoeffding" else ""
    return RequestError(
        f"no threshold can pass with so few prompts (test {spec.test}, delta {spec.delta:g}, epsilon {spec.epsilon:g})",
        found=prompts,
        expected=f"{spec.fewest_prompts} or more if no answer changes, several times as many if some do",
        remedy=f"give more prompts, a larger delta or epsilon{other}",
    )


class _Experiment:
    """Holds the whole model's answers to all prompts, and compares those of early exit with them."""

    def __init__(self, model: Model, prompts: Sequence[Sequence[int]], spec: CalibrationSpec, stage: Stage) -> None:
        self._model = model
        self._prompts = prompts
        self._spec = spec
        self._stage = stage
        full, self.plain_tokens_per_s = self._generate(None, "full answers")
        self._full = [_answer(result) for result in full]

    def measure(self, policy: ExitPolicy, threshold: float, title: str) -> tuple[Point, tuple[float, ...]]:
        """Answer all prompts with early exit; return the measured point and the loss of each answer."""
        results, tokens_per_s = self._generate(policy, f"threshold {threshold:g}, {title}")
        pairs = zip(results, self._full, strict=True)
        losses = tuple(dissimilarity(self._spec.loss, _answer(early), full) for early, full in pairs)
        stats = [result.stats for result in results]
        tokens = sum(s.emitted for s in stats)
        point = Point(
            threshold=threshold,
            mean_loss=sum(losses) / len(losses),
            p_value=p_value(self._spec.test, losses, self._spec.delta),
            is_accepted=False,
            mean_exit_layer=sum(depth * count for s in stats for depth, count in s.exits.items()) / tokens,
            exited_share=sum(s.exited for s in stats) / tokens,
            tokens=tokens,
            tokens_per_s=tokens_per_s,
        )
        return point, losses

    def _generate(self, policy: ExitPolicy | None, title: str) -> tuple[list[Result], float | None]:
        """Answer all prompts; return the results in their order, and the decoding speed."""
        advance = self._stage(title, len(self._prompts))
        strategy = Plain() if policy is None else ExitEarly(policy)
        found: dict[int, Result] = {}
        started = time.perf_counter()
        for number, result in self._model.stream_batch(
            self._prompts, max_new_tokens=self._spec.max_new_tokens, strategy=strategy
        ):
            found[number] = result
            advance(1)
        results = [found[number] for number in range(len(found))]
        elapsed_s = time.perf_counter() - started
        return results, _tokens_per_s([result.stats for result in results], elapsed_s, self._model.slots)


def _tokens_per_s(stats: Sequence[Stats], elapsed_s: float, slots: int) -> float | None:
    """Return the decoding speed over several answers; None if nothing was measured.

    One by one it is measured after each answer's first token. Where answers share runs, it is that of all together.
    """
    if slots > 1:
        return sum(s.emitted for s in stats) / elapsed_s if elapsed_s > 0 else None
    decode_s = sum(s.elapsed_s - s.first_token_s for s in stats)
    return sum(s.emitted - 1 for s in stats) / decode_s if decode_s > 0 else None


def _answer(result: Result) -> Answer:
    return Answer(result.tokens, result.text)


def _silent(title: str, total: float) -> Advance:
    return lambda amount: None
