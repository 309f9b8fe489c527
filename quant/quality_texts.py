"""Greedy texts of the quality report: a bundle continues prompts, plainly and with drafts of each exit.

They run through several slots where that changes no text: where a row of a run has the same bits whatever other rows
the run has. The two bundles of a report have the same number of slots. So if they differ, it is not for the spare row
behind each text by which several slots of a float bundle differ from one slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shortstack.graphs.bundle import Bundle
from shortstack.progress import Advance
from shortstack.runtime.batch.usual_slots import usual_slots
from shortstack.runtime.decode.draft_length import DraftPolicy
from shortstack.runtime.model import Model
from shortstack.runtime.request import Plain, Request, Speculate, Strategy

_DRAFTED = DraftPolicy(max_draft_tokens=3)  # a fixed length: an adaptive one may never draft


@dataclass(frozen=True, slots=True)
class Continued:
    """The greedy continuations of one bundle.

    Attributes:
        plain: The new tokens of each prompt, decoded plainly.
        acceptance: Accepted / drafted tokens, by exit.
        is_exact: All exits' drafts gave the plain tokens.
    """

    plain: tuple[tuple[int, ...], ...]
    acceptance: dict[int, float]
    is_exact: bool


def report_slots(bundles: Sequence[Bundle]) -> int:
    """Return through how many slots the texts of all these bundles run."""
    manifests = [bundle.manifest for bundle in bundles]
    if not all(manifest.precision.has_independent_rows(manifest.dtype) for manifest in manifests):
        return 1
    return min(map(usual_slots, bundles))


def texts_per_prompt(bundle: Bundle) -> int:
    """Return how many times :func:`continue_prompts` continues each prompt."""
    return 1 + len(bundle.manifest.plan.exits)


def continue_prompts(
    bundle: Bundle, prompts: Sequence[Sequence[int]], count: int, slots: int, advance: Advance
) -> Continued:
    """Continue each prompt by ``count`` tokens, past ends of text, as far as the context allows.

    Args:
        bundle: The bundle.
        prompts: The token ids of each prompt.
        count: Tokens of a continuation.
        slots: How many texts run at once.
        advance: Called with 1 after each text.
    """
    exits = bundle.manifest.plan.boundaries
    strategies: tuple[Strategy, ...] = (Plain(), *(Speculate(exit_layer, _DRAFTED) for exit_layer in exits))
    requests = [
        Request(prompt, max_new_tokens=count, ignore_eos=True, strategy=strategy)
        for strategy in strategies
        for prompt in prompts
    ]
    found = {}
    with Model(bundle, slots=slots) as model:
        for number, result in model.stream_batch(requests):
            found[number] = result
            advance(1)
    results = [found[number] for number in range(len(requests))]
    plain, *drafted = (results[start : start + len(prompts)] for start in range(0, len(results), len(prompts)))
    acceptance = {}
    for exit_layer, texts in zip(exits, drafted, strict=True):
        total = sum(text.stats.drafted for text in texts)
        acceptance[exit_layer] = sum(text.stats.accepted for text in texts) / total if total else 0.0
    wanted = tuple(text.tokens for text in plain)
    return Continued(wanted, acceptance, all(tuple(text.tokens for text in texts) == wanted for texts in drafted))


def forks(one: Continued, other: Continued) -> tuple[int, ...]:
    """Return for each prompt how many tokens two bundles' plain continuations have in common before they differ."""
    same = [[a == b for a, b in zip(*pair, strict=True)] for pair in zip(one.plain, other.plain, strict=True)]
    return tuple(each.index(False) if False in each else len(each) for each in same)
