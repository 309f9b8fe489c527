"""The training loop of every recipe: steps, accumulation, learning rate, progress, and a state that survives a kill.

A run is its folder: ``state.pt`` holds what is trained, the optimizer, the step and the history, and is written
under another name first. Called again with the same settings, a run continues where that state was saved, on the very
same batches.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from shortstack.graphs.errors import RequestError
from shortstack.samples.recipes.training.schedules import learning_rate
from shortstack.samples.recipes.training.settings import check_settings

STATE_FILE = "state.pt"


@dataclass(frozen=True, slots=True)
class LoopSpec:
    """How long and how fast to train.

    Attributes:
        steps: Optimizer steps.
        peak_rate: Learning rate after warm-up, AdamW.
        warmup_steps: Steps of linear warm-up.
        accumulate: Batches per step, whose gradients are averaged.
        clip_norm: Gradients are scaled to at most this norm.
        weight_decay: Of AdamW.
        save_every: Steps between two saved states.
        measure_every: Steps between two measurements; 0 measures at the end only.
        seed: Fixes data order and dropout.
        max_minutes: Stop after this time, as if all steps were done; None does not.
    """

    steps: int
    peak_rate: float
    warmup_steps: int = 20
    accumulate: int = 1
    clip_norm: float = 1.0
    weight_decay: float = 0.0
    save_every: int = 50
    measure_every: int = 0
    seed: int = 0
    max_minutes: float | None = None


@dataclass(slots=True)
class History:
    """What happened, to be drawn and reported.

    Attributes:
        losses: Step, then mean loss by name since the entry before.
        measures: Step, then what was measured.
        tokens: Tokens that went through any layer.
        elapsed_s: Seconds of training, measurements excluded.
    """

    losses: list[dict[str, float]] = field(default_factory=list)
    measures: list[dict[str, float]] = field(default_factory=list)
    tokens: int = 0
    elapsed_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StepLoss:
    """What one batch gives.

    Attributes:
        loss: To be minimised.
        parts: Its parts by name, for the picture.
        tokens: Tokens of the batch.
    """

    loss: Tensor
    parts: Mapping[str, float]
    tokens: int


def run(
    trained: nn.Module,
    loss_of: Callable[[int, int], StepLoss],
    measure: Callable[[], Mapping[str, float]],
    spec: LoopSpec,
    folder: Path,
    settings: Mapping[str, Any],
) -> History:
    """Train.

    Args:
        trained: Its parameters that require gradients are trained and saved.
        loss_of: Called with the step and the number of the batch.
        measure: Called every ``measure_every`` steps and at the end.
        spec: How long and how fast.
        folder: Where the state is; a state that is there is continued.
        settings: What the run depends on; a state of other settings is refused.

    Returns:
        The whole history, that of earlier calls included.

    Raises:
        RequestError: The folder holds the state of another run.
    """
    parameters = {name: value for name, value in trained.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=spec.peak_rate, betas=(0.9, 0.95), weight_decay=spec.weight_decay
    )
    folder.mkdir(parents=True, exist_ok=True)
    step, history = _resume(folder / STATE_FILE, parameters, optimizer, settings)
    trained.train()
    parts: dict[str, list[float]] = {}
    with _progress(spec.steps, step) as show:
        while step < spec.steps and not _is_late(spec, history):
            started = time.perf_counter()
            torch.manual_seed(spec.seed * 1_000_003 + step)  # a resumed run drops the same layers
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(_place(step, spec, history), spec.steps, spec.peak_rate, spec.warmup_steps)
            for index in range(spec.accumulate):
                one = loss_of(step, step * spec.accumulate + index)
                torch.autograd.backward(one.loss / spec.accumulate)
                history.tokens += one.tokens
                for name, value in one.parts.items():
                    parts.setdefault(name, []).append(value)
            torch.nn.utils.clip_grad_norm_(parameters.values(), spec.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            history.elapsed_s += time.perf_counter() - started
            if step % 10 == 0 or step == spec.steps:
                means = {name: sum(values) / len(values) for name, values in parts.items()}
                history.losses.append({"step": step, "tokens": history.tokens, **means})
                parts.clear()
            if spec.measure_every and step % spec.measure_every == 0 and step < spec.steps:
                history.measures.append({"step": step, "tokens": history.tokens, **measure()})
            if step % spec.save_every == 0:
                save_state(folder / STATE_FILE, step, parameters, optimizer, history, settings)
            show(step, history)
    if not history.measures or history.measures[-1]["step"] != step:
        history.measures.append({"step": step, "tokens": history.tokens, **measure()})
    save_state(folder / STATE_FILE, step, parameters, optimizer, history, settings)
    trained.eval()
    return history


def _is_late(spec: LoopSpec, history: History) -> bool:
    return spec.max_minutes is not None and history.elapsed_s > 60 * spec.max_minutes


def _place(step: int, spec: LoopSpec, history: History) -> int:
    """Return the step for the learning rate, which follows the clock where that will end the run first."""
    if spec.max_minutes is None:
        return step
    return max(step, int(spec.steps * history.elapsed_s / (60 * spec.max_minutes)))


def save_state(
    file: Path,
    step: int,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    history: History,
    settings: Mapping[str, Any],
) -> None:
    """Write the state under another name, then rename it."""
    partial = file.with_suffix(".partial")
    torch.save(
        {
            "step": step,
            "parameters": {name: value.detach() for name, value in parameters.items()},
            "optimizer": optimizer.state_dict(),
            "history": {name: getattr(history, name) for name in History.__slots__},
            "settings": dict(settings),
        },
        partial,
    )
    os.replace(partial, file)


def _resume(
    file: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, settings: Mapping[str, Any]
) -> tuple[int, History]:
    if not file.exists():
        return 0, History()
    try:
        state = torch.load(file, weights_only=True)
    except Exception as error:  # torch raises what pickle raises
        raise RequestError(f"{file} cannot be read ({error})", remedy="remove it to start over") from None
    check_settings(
        f"{file.parent} holds a run with other settings",
        state["settings"],
        settings,
        "choose another folder, or call the recipe as before to continue",
    )
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(state["parameters"][name])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], History(**state["history"])


@contextlib.contextmanager
def _progress(steps: int, done: int) -> Any:
    console = Console(stderr=True)
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[news]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("training", total=steps, completed=done, news="")

        def show(step: int, history: History) -> None:
            news = [f"{history.tokens / 1000:.0f}k tokens"]
            for entries in (history.losses, history.measures):
                if entries:
                    news += [f"{k} {v:.3f}" for k, v in entries[-1].items() if k not in ("step", "tokens")][:3]
            progress.update(task, completed=step, news=", ".join(news))
            if not console.is_terminal and step % 50 == 0:
                console.print(f"step {step} of {steps}: {', '.join(news)}, {history.elapsed_s:.0f} s", highlight=False)

        yield show
