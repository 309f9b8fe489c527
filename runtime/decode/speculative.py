"""Speculative decoding: a drafter proposes tokens, and one run of the whole model judges them.

One round of self-speculation, where x0 is the newest accepted token::

    rows        x0  d1  d2  ...          each row runs through the lower segments; the exit proposes d(i+1) from row i
    judged      p1  p2  p3  ...          all rows run through the upper segments at once
    emitted     the longest prefix with d1 = p1, d2 = p2, ..., then the next p

Without bonus, k drafted tokens take k rows. No row is computed that cannot be used, and if all drafts are accepted, dk
is the next round's x0. With bonus, dk gets a row too (without an exit head), and accepting all drafts emits one more
token. A round without drafted tokens is a plain step. Every form emits ``tokens[: accepted + 1]`` of the judged rows,
so only the number of rows differs. Drafts come from a drafter (:mod:`shortstack.runtime.decode.drafters`).

Whatever stops the iteration, all tokens of the sequence but the newest are cached, in every layer.
"""

from __future__ import annotations

from shortstack.runtime.decode.choice import Choice, Proposal, Verdict
from shortstack.runtime.decode.draft_length import DraftRule
from shortstack.runtime.decode.drafters import Draft, Drafter
from shortstack.runtime.decode.emission import emit
from shortstack.runtime.decode.plain import full_step, prefill
from shortstack.runtime.decode.runs import Asking, DraftRows, Loop, Verify
from shortstack.runtime.decode.sequence import TokenSequence
from shortstack.runtime.decode.step import Stats, Step
from shortstack.runtime.engine.decoder import State


def speculative(
    stack: State,
    sequence: TokenSequence,
    choice: Choice,
    stats: Stats,
    max_new_tokens: int,
    length: DraftRule,
    drafter: Drafter,
) -> Loop:
    """Decode in rounds.

    Args:
        stack: The model.
        sequence: The prompt, with at least one token that is not cached; grows by each emitted token.
        choice: How tokens are chosen and judged.
        stats: Counts tokens, runs and seconds.
        max_new_tokens: The most tokens to emit.
        length: Chooses how many tokens to draft and when to stop earlier; learns from the outcome of each round.
        drafter: Proposes the tokens.

    Yields:
        The runs that it needs, and one step per token.
    """
    if max_new_tokens < 1:
        return
    sequence.cached = stats.reused = drafter.start(sequence.tokens, sequence.cached)
    try:
        token = yield from prefill(stack, sequence, choice, stats)
        sequence.append(token)
        stats.count_emitted(stack.num_layers)
        yield Step(token, False, stack.num_layers, float(stack.final.top_prob[0]))
        left = max_new_tokens - 1
        while left and len(sequence) < stack.max_length:
            # Each row emits at most one token: there are no more than the request and the context have room for.
            rows = min(left, stack.max_length - len(sequence), stack.window)
            drafts, verdict = yield from _round(stack, sequence, choice, stats, length, drafter, rows)
            left -= len(verdict.tokens)
            yield from emit(stack, sequence, stats, drafts, verdict)
    finally:
        drafter.end()


def _round(
    stack: State,
    sequence: TokenSequence,
    choice: Choice,
    stats: Stats,
    length: DraftRule,
    drafter: Drafter,
    max_rows: int,
) -> Asking[tuple[list[Proposal], Verdict]]:
    """Draft and judge one round. Commits the newest token's position; the caller appends the emitted tokens."""
    wanted = length.choose(max_rows, sequence.tokens)
    stats.predicted_gain = length.best_gain
    if wanted == 0:
        started = stack.clock()
        token = yield from full_step(stack, sequence, choice, stats)
        length.observe_plain(stack.clock() - started)
        drafter.observe(1, 1)
        return [], Verdict((token,), 0)

    past = sequence.cached
    started = stack.clock()
    stack.put(0, sequence.tokens[-1])
    proposing = drafter.draft(past, sequence.tokens, wanted, length.least_confidence)
    draft = proposing if isinstance(proposing, Draft) else (yield from proposing)
    drafts = list(draft.proposals)
    assert len(drafts) <= wanted, f"the drafter proposed {len(drafts)} tokens where {wanted} were asked for"
    rows = len(drafts)
    if rows == 0 or (length.has_bonus and rows < max_rows):
        rows += 1
    for row in range(max(draft.rows_run, 1), rows):  # rows that the drafter has not run
        stack.put(row, drafts[row - 1].token)
    if draft.rows_run < rows:
        yield DraftRows(draft.rows_run, rows, past)
    drafted = stack.clock()
    yield Verify(rows, past, choice.needs_logits)
    verdict = choice.judge(stack.final, rows, drafts, sequence.tokens)
    ended = stack.clock()

    emitted = len(verdict.tokens)
    sequence.commit(1)
    stack.keep_state(emitted - 1)  # the row that predicted the newest token
    drafter.observe(emitted, rows)
    stats.count_round(len(drafts), verdict.accepted, emitted, [each.origin for each in drafts])
    stats.draft_s += drafted - started
    stats.verify_s += ended - drafted
    stats.draft_runs += rows
    stats.verify_runs += 1
    if drafts:
        draft_s = drafted - started - draft.behind_s
        length.observe_round(len(drafts), verdict.accepted, rows, draft_s, ended - drafted, draft.first_s)
    return drafts, verdict
