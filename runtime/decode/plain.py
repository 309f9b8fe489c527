"""Plain decoding: every token runs through every layer. Other loops are compared with it on the same bundle."""

from __future__ import annotations

from shortstack.runtime.decode.choice import Choice
from shortstack.runtime.decode.runs import Asking, DraftRow, Loop, Prefill, Verify
from shortstack.runtime.decode.sequence import TokenSequence
from shortstack.runtime.decode.step import Stats, Step
from shortstack.runtime.engine.decoder import State


def prefill(stack: State, sequence: TokenSequence, choice: Choice, stats: Stats) -> Asking[int]:
    """Run all layers over the tokens that are not cached yet; return the next token without appending it."""
    started = stack.clock()
    new = sequence.tokens[sequence.cached :]
    yield Prefill(new, sequence.cached, choice.needs_logits)
    token = choice.pick(stack.final, 0, sequence.tokens)
    sequence.commit(len(new))  # last, so that an error above leaves the sequence as it was
    stats.prefill_s += stack.clock() - started
    stats.prefilled += 1
    return token


def full_step(stack: State, sequence: TokenSequence, choice: Choice, stats: Stats) -> Asking[int]:
    """Run all layers over the newest token; return the next one without appending it."""
    started = stack.clock()
    stack.put(0, sequence.tokens[-1])
    yield DraftRow(0, sequence.cached, with_head=False, with_logits=False)
    drafted = stack.clock()
    yield Verify(1, sequence.cached, choice.needs_logits)
    token = choice.pick(stack.final, 0, sequence.tokens)
    sequence.commit(1)
    stats.draft_s += drafted - started
    stats.verify_s += stack.clock() - drafted
    stats.draft_runs += 1
    stats.verify_runs += 1
    stats.plain += 1
    return token


def plain(stack: State, sequence: TokenSequence, choice: Choice, stats: Stats, max_new_tokens: int) -> Loop:
    """Decode token by token.

    Args:
        stack: The model.
        sequence: The prompt, with at least one token that is not cached; grows by each emitted token. Between two steps
            all its tokens but the newest are cached.
        choice: How tokens are chosen.
        stats: Counts tokens, runs and seconds.
        max_new_tokens: The most tokens to emit.

    Yields:
        The runs that it needs, and one step per token.
    """
    for index in range(max_new_tokens):
        if index and len(sequence) >= stack.max_length:
            return
        token = yield from (full_step if index else prefill)(stack, sequence, choice, stats)
        sequence.append(token)
        stats.count_emitted(stack.num_layers)
        yield Step(token, False, stack.num_layers, float(stack.final.top_prob[0]))
