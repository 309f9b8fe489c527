"""Plain early exit with a threshold, for measuring what a trained exit is worth without verification.

A token that leaves at the exit keeps its row in the round; the first unsure one takes all pending rows through the
upper segments in one run, so every cache is exact (FREE's schedule, https://arxiv.org/abs/2310.05424). Nothing is
judged: the text may differ from the whole model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shortstack.runtime.decoder import Decoder


@dataclass(frozen=True, slots=True)
class EarlyExit:
    """One generation.

    Attributes:
        tokens: What was generated, the stopping token included.
        exited: How many of them left at the exit.
    """

    tokens: tuple[int, ...]
    exited: int


def early_exit(
    stack: Decoder, prompt: Sequence[int], threshold: float, end: Sequence[int], max_new_tokens: int
) -> EarlyExit:
    """Generate greedily, each token from the exit if its top-1 probability reaches the threshold.

    Args:
        stack: The model; its cache is overwritten.
        prompt: Token ids, at least one.
        threshold: Above 1 never exits, 0 always does, pending rows permitting.
        end: Ids that end a text.
        max_new_tokens: How many to generate at most.
    """
    stack.prefill(prompt, 0, False)
    tokens = [int(stack.final.token[0])]
    past, pending, exited = len(prompt), 0, 0
    while tokens[-1] not in end and len(tokens) < max_new_tokens and past + pending < stack.max_length:
        stack.put(pending, tokens[-1])
        stack.draft(pending, past, with_head=True, with_logits=False)
        pending += 1
        if pending < stack.window and float(stack.exit.top_prob[pending - 1]) >= threshold:
            tokens.append(int(stack.exit.token[pending - 1]))
            exited += 1
        else:
            stack.verify(pending, past, False)
            tokens.append(int(stack.final.token[pending - 1]))
            past, pending = past + pending, 0
    return EarlyExit(tuple(tokens), exited)
