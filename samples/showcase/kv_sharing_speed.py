"""How fast bundles are that differ in what their layers share: prompts, decoding, self-speculation, cache.

All bundles are loaded at once and take turns, in another order each round, so that slow spells of the machine fall on
all of them; the first round is a warm-up. Times are medians over rounds, ratios medians of the rounds' ratios.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortstack.graphs import names
from shortstack.runtime.decode.draft_length import DraftPolicy
from shortstack.runtime.model import Model, load
from shortstack.runtime.request import Speculate
from shortstack.samples.bench.settings import cut


@dataclass(frozen=True, slots=True)
class SpeedSpec:
    """What is timed.

    Attributes:
        prompt_lengths: Tokens of the prompts.
        decode_tokens: Tokens decoded after each.
        rounds: How often, the warm-up not counted.
        draft_tokens: Drafts in a row.
        answer_tokens: Tokens generated at most for a question, with and without drafts.
        threads: Threads of onnxruntime.
    """

    prompt_lengths: tuple[int, ...] = (16, 512, 2048)
    decode_tokens: int = 32
    rounds: int = 15
    draft_tokens: int = 4
    answer_tokens: int = 64
    threads: int = 1


def measure_speed(
    bundles: Mapping[str, Path], text: Sequence[int], questions: Sequence[str], spec: SpeedSpec, reference: str
) -> dict[str, dict[str, Any]]:
    """Time bundles against each other.

    Args:
        bundles: Bundles with one exit, by name.
        text: Token ids to cut prompts from; one tokenizer for all.
        questions: Texts to complete with self-speculation on and off.
        spec: What is timed.
        reference: The bundle that ratios compare with.

    Returns:
        For each bundle JSON-ready data.
    """
    models = {name: load(folder, threads=spec.threads) for name, folder in bundles.items()}
    found = _time_prompts(models, text, spec, reference)
    for name, drafted in _time_drafts(models, questions, spec).items():
        found[name] |= {"kv_bytes_per_token": bound_bytes_per_token(models[name]), "self_speculation": drafted}
    return found


def bound_bytes_per_token(model: Model) -> float:
    """Return what the buffers that a model has bound take for each position that they hold, in bytes."""
    manifest = model.bundle.manifest
    taken = 0.0
    for owner in (owner for segment in manifest.plan.segments for owner in manifest.cache_types(segment)):
        for part in names.KV_PARTS:
            buffer = model.cache.buffer(owner, part).numpy()  # [1, kv_heads, capacity, head_dim]
            taken += buffer.nbytes / buffer.shape[2]
    return taken


def _time_prompts(
    models: Mapping[str, Model], text: Sequence[int], spec: SpeedSpec, reference: str
) -> dict[str, dict[str, Any]]:
    times: dict[tuple[str, int, str], list[float]] = {}
    for turn in range(spec.rounds + 1):
        for name in _rotated(list(models), turn):
            for length in spec.prompt_lengths:
                result = models[name].generate(
                    cut(text, length), max_new_tokens=spec.decode_tokens + 1, ignore_eos=True
                )
                if turn:
                    stats = result.stats
                    decode_s = (stats.draft_s + stats.verify_s) / (len(result.tokens) - 1)
                    times.setdefault((name, length, "prefill"), []).append(stats.prefill_s)
                    times.setdefault((name, length, "decode"), []).append(decode_s)
    found: dict[str, dict[str, Any]] = {name: {"prefill": {}, "decode": {}} for name in models}
    for (name, length, kind), seconds in times.items():
        ratios = [mine / other for mine, other in zip(seconds, times[reference, length, kind], strict=True)]
        low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        found[name][kind][str(length)] = {
            "median_s": middle,
            "quartiles_s": [low, high],
            "times_reference": statistics.median(ratios),
        }
    return found


def _time_drafts(models: Mapping[str, Model], questions: Sequence[str], spec: SpeedSpec) -> dict[str, dict[str, Any]]:
    policy = DraftPolicy(spec.draft_tokens)
    sums = {name: {"plain_s": 0.0, "drafting_s": 0.0, "accepted": 0, "judged": 0, "same": 0} for name in models}
    for turn, question in enumerate([questions[0], *questions]):  # the first one twice: its first time is a warm-up
        for name in _rotated(list(models), turn):
            ids = models[name].encode(question)
            plain = models[name].generate(ids, max_new_tokens=spec.answer_tokens)
            drafting = models[name].generate(ids, max_new_tokens=spec.answer_tokens, strategy=Speculate(draft=policy))
            if turn:
                of = sums[name]
                of["plain_s"] += plain.stats.draft_s + plain.stats.verify_s
                of["drafting_s"] += drafting.stats.draft_s + drafting.stats.verify_s
                of["accepted"] += drafting.stats.accepted
                of["judged"] += drafting.stats.accepted + drafting.stats.corrected
                of["same"] += plain.tokens == drafting.tokens
    return {
        name: {
            "questions": len(questions),
            "same_output": of["same"],
            "alpha": of["accepted"] / of["judged"] if of["judged"] else 0.0,
            "speed_up": of["plain_s"] / of["drafting_s"] if of["drafting_s"] else 0.0,
        }
        for name, of in sums.items()
    }


def _rotated(items: list[str], by: int) -> list[str]:
    return items[by % len(items) :] + items[: by % len(items)]
