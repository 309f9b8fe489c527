"""What a trained drafter costs: its first draft, a further one, and judging M rows, in turns on one model.

Nothing is decided by what model and drafter say, so weights of random values cost what trained ones do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import Any

from shortstack.runtime import Model
from shortstack.runtime.decode.speed_up import predicted_speed_up
from shortstack.runtime.engine.drafting import Drafting
from shortstack.samples.bench.figures import Spread, ratios, spread

MOST_ROWS = 6
MOST_DRAFTS = 4


def measure_drafter(model: Model, prompt: Sequence[int], repeats: int, *, drafts: bool) -> dict[str, Any]:
    """Measure at the context that ``prompt`` makes; every repeat takes each measurement once.

    Args:
        model: A bundle with a trained drafter.
        prompt: Token ids. The same ids, again from the first, are the tokens that are drafted and judged.
        repeats: How often. One more goes before, which builds bindings and is not counted.
        drafts: Whether the drafter runs. Without it, the drafter's graphs are never opened.

    Returns:
        Seconds, one list over the repeats each: ``verify``, by M as a string, a run of the whole model over M rows;
        ``first``, by M, the first draft after M rows became part of the text; ``further``, one more draft. ``first``
        and ``further`` are missing without ``drafts``.
    """
    stack, past = model.exclusive_stack(), len(prompt)
    text = list(islice(cycle(prompt), past + 1 + MOST_ROWS))
    drafter = stack.drafter if drafts else None
    if drafter is not None:
        drafter.start(text[:past], 0)
    stack.prefill(text[:past], 0, with_logits=False)
    if drafter is not None:
        drafter.refill(text[: past + 1], with_logits=False)  # all of the prompt
    verify: dict[str, list[float]] = {str(rows): [] for rows in range(1, MOST_ROWS + 1)}
    first: dict[str, list[float]] = {str(rows): [] for rows in range(1, MOST_DRAFTS + 2)}
    further: list[float] = []
    for repeat in range(repeats + 1):
        kept = repeat > 0
        counts = range(1, MOST_ROWS + 1)
        for rows in counts if repeat % 2 else reversed(counts):
            if drafter is not None:
                drafter.start(text[: past + 1], past)  # drops what the last measurement added
            for row in range(rows):
                stack.put(row, text[past + row])
            _time(verify[str(rows)], kept, partial(stack.verify, rows, past, with_logits=False))
            if drafter is None or str(rows) not in first:
                continue
            _time(first[str(rows)], kept, partial(_first_draft, drafter, rows, text[: past + rows + 1]))
            if rows == 1:
                seconds: list[float] = []
                for row in range(1, MOST_DRAFTS):
                    drafter.put(row, text[past + row])
                    _time(seconds, kept, partial(drafter.step, row, with_logits=False))
                if kept:
                    further.append(statistics.median(seconds))
    return {"verify": verify} if drafter is None else {"verify": verify, "first": first, "further": further}


def _first_draft(drafter: Drafting, rows: int, text: Sequence[int]) -> None:
    drafter.keep_round(rows)
    drafter.refill(text, with_logits=False)


def _time(into: list[float], kept: bool, job: Callable[[], None]) -> None:
    started = time.perf_counter()
    job()
    if kept:
        into.append(time.perf_counter() - started)


@dataclass(frozen=True, slots=True)
class DrafterCosts:
    """What :func:`measure_drafter` found, in plain steps of the same repeat.

    Attributes:
        plain_s: Seconds of a plain step.
        rows: c(M), by M.
        first: The first draft of a round, by the rows that became part of the text since the last one.
        further: f, a further draft.
    """

    plain_s: Spread
    rows: Mapping[int, Spread]
    first: Mapping[int, Spread]
    further: Spread

    def first_draft(self, acceptance: float, drafts: int) -> float:
        """Return the mean cost of a first draft where rounds draft so many tokens.

        A round before it that accepted m of its drafts left m + 1 rows.
        """
        shares = [acceptance**m * (1.0 - acceptance) for m in range(drafts)] + [acceptance**drafts]
        return sum(share * self.first[m + 1].median for m, share in enumerate(shares))

    def speed_up(self, acceptance: float, drafts: int) -> float:
        """Return the predicted speed over plain decoding, by :func:`predicted_speed_up`.

        Args:
            acceptance: Probability that a judged draft is accepted, the same for each.
            drafts: How many a round drafts.
        """
        drafting = self.first_draft(acceptance, drafts) + (drafts - 1) * self.further.median
        return predicted_speed_up(acceptance, drafts, drafting / drafts, self.rows[drafts + 1].median, bonus=0.0)


def relative(found: Mapping[str, Any]) -> DrafterCosts:
    """Return what :func:`measure_drafter` found relative to plain steps, so that slow spells cancel."""
    plain = found["verify"]["1"]
    return DrafterCosts(
        plain_s=spread(plain),
        rows={int(rows): ratios(seconds, plain) for rows, seconds in found["verify"].items()},
        first={int(rows): ratios(seconds, plain) for rows, seconds in found["first"].items()},
        further=ratios(found["further"], plain),
    )
