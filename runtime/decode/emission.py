"""Turns a judged round into steps: emits the tokens of a verdict one by one, and keeps the counts balanced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shortstack.runtime.decode.choice import Proposal, Verdict
from shortstack.runtime.decode.sequence import TokenSequence
from shortstack.runtime.decode.step import Stats, Step
from shortstack.runtime.engine.decoder import State


def emit(
    stack: State,
    sequence: TokenSequence,
    stats: Stats,
    drafts: Sequence[Proposal],
    verdict: Verdict,
    *,
    pending: int = 0,
) -> Iterator[Step]:
    """Emit the tokens of a verdict. Whenever the caller stops, all tokens of the sequence but the newest are cached.

    Args:
        stack: The model, whose final head still holds its outputs for the round.
        sequence: Grows by each token; the round's first position is committed already.
        stats: Counts emitted tokens; those that are not emitted yet count as discarded.
        drafts: The drafts that were judged.
        verdict: The outcome.
        pending: See :class:`~shortstack.runtime.decode.step.Step`.

    Yields:
        One step per token.
    """
    stats.discarded += len(verdict.tokens)  # until they are emitted
    for index, token in enumerate(verdict.tokens):
        if index:
            sequence.commit(1)
        sequence.append(token)
        stats.discarded -= 1
        is_accepted = index < verdict.accepted
        depth = drafts[index].depth if is_accepted else stack.num_layers
        confidence = drafts[index].confidence if is_accepted else float(stack.final.top_prob[index])
        stats.count_emitted(depth)
        yield Step(token, is_accepted, depth, confidence, pending)
