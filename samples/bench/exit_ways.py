"""Early exit against plain decoding of one bundle, prompt by prompt: speed, depth, and how far the answers move."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shortstack.runtime.calibration.dissimilarity import Answer, dissimilarity
from shortstack.samples.bench.figures import Spread, spread
from shortstack.samples.bench.pipe import WorkerProcess


@dataclass(frozen=True, slots=True)
class Way:
    """One way to decode.

    Attributes:
        name: What the table calls it.
        worker: Which of the workers decodes: their threads differ.
        options: Of the worker's ``decode``: ``exit_when``, ``kv_policy``, ``verify``; none is plain decoding.
    """

    name: str
    worker: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Outcome:
    """What one way did, over all prompts.

    Attributes:
        way: The way.
        speed: Time per token of plain decoding over this one's, prompt by prompt.
        tokens: Tokens after each first one.
        decode_s: Seconds they took, catching up at the end included.
        depth: Mean depth of the heads that decided them.
        exited: Tokens that left at an exit.
        flushes: Runs of the highest level.
        text_loss: Mean of 1 - ROUGE-L F1 against the whole model's answer.
        same: Share of answers that are token for token the whole model's.
    """

    way: Way
    speed: Spread
    tokens: int
    decode_s: float
    depth: float
    exited: int
    flushes: int
    text_loss: float
    same: float

    @property
    def exited_share(self) -> float:
        """Share of tokens that left at an exit."""
        return self.exited / self.tokens if self.tokens else 0.0


def compare(
    workers: Mapping[str, WorkerProcess], prompts: Sequence[Sequence[int]], ways: Sequence[Way], tokens: int
) -> list[Outcome]:
    """Decode each prompt in every way, one after the other, so that slow spells of the machine fall on all.

    Args:
        workers: By name.
        prompts: Token ids.
        ways: The first is plain decoding, the reference of both speed and answers.
        tokens: Longest answer.
    """
    answers: list[list[dict[str, Any]]] = [[] for _ in ways]
    for number, prompt in enumerate([prompts[0], *prompts]):  # the first one twice: its first time is a warm-up
        for way, found in zip(ways, answers, strict=True):
            answer = workers[way.worker].ask("decode", prompt=list(prompt), tokens=tokens, ends=True, **way.options)
            if number:
                found.append(answer)
    return [_outcome(way, found, answers[0]) for way, found in zip(ways, answers, strict=True)]


def _outcome(way: Way, answers: Sequence[Mapping[str, Any]], plain: Sequence[Mapping[str, Any]]) -> Outcome:
    def row_s(answer: Mapping[str, Any]) -> float:
        return float(answer["decode_s"]) / max(1, len(answer["tokens"]) - 1)

    pairs = list(zip(answers, plain, strict=True))
    stats = [answer["stats"] for answer in answers]
    emitted = sum(len(answer["tokens"]) for answer in answers)
    return Outcome(
        way=way,
        speed=spread([row_s(reference) / row_s(answer) for answer, reference in pairs if len(answer["tokens"]) > 1]),
        tokens=emitted - len(answers),
        decode_s=sum(answer["decode_s"] for answer in answers),
        depth=sum(s["mean_exit_layer"] * len(a["tokens"]) for s, a in zip(stats, answers, strict=True)) / emitted,
        exited=sum(s["exited"] for s in stats),
        flushes=sum(s["verify_runs"] for s in stats),
        text_loss=statistics.fmean(
            dissimilarity("text", Answer(tuple(a["tokens"]), a["text"]), Answer(tuple(p["tokens"]), p["text"]))
            for a, p in pairs
        ),
        same=statistics.fmean(a["tokens"] == p["tokens"] for a, p in pairs),
    )


@dataclass(frozen=True, slots=True)
class Terms:
    """What a token costs with early exit, in units of a plain step (notes: t_A + t_E + t_B(k) / k).

    Attributes:
        lower: The layers below the exit, one row.
        head: The exit's head, one row.
        upper: The layers above and the final head, a run over k rows, divided by k.
        rows: k, the mean number of rows of such a run.
        unmeasured: What is left of the measured time: host overhead, other row counts, noise.
    """

    lower: float
    head: float
    upper: float
    rows: float
    unmeasured: float

    @property
    def predicted(self) -> float:
        """Speed over plain decoding without the rest."""
        return 1 / (self.lower + self.head + self.upper)


def terms(outcome: Outcome, plain: Outcome, lower: float, draft: float, upper: Mapping[int, float]) -> Terms:
    """Return where the time of one way goes.

    Args:
        outcome: The way: one exit, caught up by flushes.
        plain: Plain decoding.
        lower: The lower segments without the exit's head, in units of a plain step.
        draft: With it.
        upper: The upper segments and the final head over M rows, by M, ascending.
    """
    rows = outcome.tokens / outcome.flushes if outcome.flushes else 1.0
    counts = sorted(upper)
    above = next((count for count in counts if count >= rows), counts[-1])
    below = max((count for count in counts if count <= rows), default=counts[0])
    share = (rows - below) / (above - below) if above > below else 0.0
    run = upper[below] + share * (upper[above] - upper[below])
    measured = (outcome.decode_s / outcome.tokens) / (plain.decode_s / plain.tokens)
    parts = (lower, draft - lower, run / rows)
    return Terms(*parts, rows=rows, unmeasured=measured - sum(parts))
