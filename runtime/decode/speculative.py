"""Self-speculative decoding: the lower segments draft, one run of the upper segments judges the draft.

One round, x0 being the newest accepted token::

    rows        x0  d1  d2  ...          each row through the lower segments; row i's exit proposes d(i+1)
    judged      p1  p2  p3  ...          all rows through the upper segments in one run
    emitted     the longest d1 = p1, d2 = p2, ..., then the next p

Without bonus, k drafted tokens take k rows: nothing is computed for a row that cannot be used, and after a full
accept dk is the next round's x0. With bonus, dk gets a row too (without an exit head), and a full accept emits one
token more. A round with no drafted token is a plain step. Every form emits ``tokens[: accepted + 1]`` of the judged
rows, so the round is a function of its row count.

Whatever stops the iteration, all tokens of the sequence but the newest are cached, in every layer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from shortstack.runtime.decode.choice import Choice, Verdict
from shortstack.runtime.decode.draft_length import DraftLength
from shortstack.runtime.decode.plain import full_step, prefill
from shortstack.runtime.decode.sequence import TokenSequence
from shortstack.runtime.decode.step import Stats, Step
from shortstack.runtime.engine.decoder import Decoder


def speculative(
    stack: Decoder,
    sequence: TokenSequence,
    choice: Choice,
    stats: Stats,
    max_new_tokens: int,
    length: DraftLength,
) -> Iterator[Step]:
    """Decode in rounds.

    Args:
        stack: The model.
        sequence: The prompt, at least one token not cached; grows by what is emitted.
        choice: How tokens are chosen and judged.
        stats: Counts what is done.
        max_new_tokens: How many to emit at most.
        length: How many tokens to draft, and when to stop earlier; told the outcome of each round.

    Yields:
        One step per token.
    """
    if max_new_tokens < 1:
        return
    token = prefill(stack, sequence, choice, stats)
    sequence.append(token)
    stats.count_emitted(stack.num_layers)
    yield Step(token, False, stack.num_layers, float(stack.final.top_prob[0]))
    left = max_new_tokens - 1
    while left and len(sequence) < stack.max_length:
        # Each row emits at most one token, so rows are capped by what the request and the context still take.
        rows = min(left, stack.max_length - len(sequence), stack.window)
        verdict = _round(stack, sequence, choice, stats, length, rows)
        stats.discarded += len(verdict.tokens)  # until they are handed over
        for index, token in enumerate(verdict.tokens):
            if index:
                sequence.commit(1)
            sequence.append(token)
            stats.discarded -= 1
            is_accepted = index < verdict.accepted
            depth = stack.exit_layer if is_accepted else stack.num_layers
            head = stack.exit if is_accepted else stack.final
            stats.count_emitted(depth)
            yield Step(token, is_accepted, depth, float(head.top_prob[index]))
        left -= len(verdict.tokens)


def _round(
    stack: Decoder, sequence: TokenSequence, choice: Choice, stats: Stats, length: DraftLength, max_rows: int
) -> Verdict:
    """Draft and judge; the newest token's position is committed, emitted ones are left to the caller."""
    drafts_wanted = length.choose(max_rows)
    stats.predicted_gain = length.best_gain
    if drafts_wanted == 0:
        started = time.perf_counter()
        token = full_step(stack, sequence, choice, stats)
        length.observe_plain(time.perf_counter() - started)
        return Verdict((token,), 0)

    past = sequence.cached
    context = list(sequence.tokens) if choice.needs_logits else sequence.tokens
    drafts: list[int] = []
    started = time.perf_counter()
    stack.put(0, sequence.tokens[-1])
    while len(drafts) < drafts_wanted:
        row = len(drafts)
        stack.draft(row, past, with_head=True, with_logits=choice.needs_logits)
        drafts.append(choice.propose(stack.exit, row, context))
        if choice.needs_logits:
            stack.put(row + 1, drafts[-1])
            context.append(drafts[-1])
        if length.is_unsure(float(stack.exit.top_prob[row])):
            break
    rows = len(drafts)
    if length.has_bonus and rows < max_rows:
        stack.draft(rows, past, with_head=False, with_logits=False)
        rows += 1
    drafted = time.perf_counter()
    stack.verify(rows, past, choice.needs_logits)
    verdict = choice.judge(stack.final, rows, drafts, sequence.tokens)
    ended = time.perf_counter()

    sequence.commit(1)
    stack.keep_state(len(verdict.tokens) - 1)  # the row that predicted the newest token sits just before it
    is_bonus = len(verdict.tokens) > len(drafts)
    stats.count_round(len(drafts), verdict.accepted)
    stats.bonus += is_bonus
    stats.corrected += len(verdict.tokens) - verdict.accepted - is_bonus
    stats.draft_s += drafted - started
    stats.verify_s += ended - drafted
    stats.draft_runs += rows
    stats.verify_runs += 1
    length.observe_round(len(drafts), verdict.accepted, rows, drafted - started, ended - drafted)
    return verdict
