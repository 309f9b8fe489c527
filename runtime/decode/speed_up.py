"""The speed of drafting over plain decoding, from the acceptance of drafts and from measured costs.

A round drafts k tokens and judges them in one run. With alpha the probability that one drafted token is accepted, f the
cost of a draft, v(r) that of judging r rows, and costs in units of a plain step::

    without bonus   k rows are judged       S = (1 - alpha^k) / ((1 - alpha) (k f + v(k)))
    with bonus      k + 1 rows are judged   S = (1 - alpha^(k + 1)) / ((1 - alpha) (k f + b + v(k + 1)))

b is the draft segment run for the last drafted token, whose row a bonus judges too. This is theorem 3.8 of Leviathan et
al., arXiv 2211.17192, with measured costs in place of the one cost that the paper assumes for any number of rows.

The adaptive draft length, the benchmark's predictions and the recipes' tables all use it. It knows no model and no
clock.
"""

from __future__ import annotations


def expected_tokens(alpha: float, rows: int) -> float:
    """Return how many tokens a round of ``rows`` judged rows emits on average: (1 - alpha^rows) / (1 - alpha)."""
    return sum(alpha**i for i in range(rows))


def round_cost(drafts: float, draft: float, judging: float, bonus: float | None = None) -> float:
    """Return the cost of one round, in the unit of its arguments.

    Args:
        drafts: k, runs of the draft segment.
        draft: f, one of them.
        judging: v, judging all rows of the round in one run.
        bonus: b; None for a round without bonus.
    """
    return drafts * draft + (bonus or 0.0) + judging


def predicted_speed_up(
    alpha: float, drafts: int, draft: float, judging: float, *, bonus: float | None = None, plain: float = 1.0
) -> float:
    """Return S, the speed of such rounds over plain decoding.

    Args:
        alpha: Probability that one drafted token is accepted.
        drafts: k, drafted tokens per round.
        draft: f, one draft.
        judging: v, judging the k rows of a round, or k + 1 rows with bonus.
        bonus: b; None for rounds without bonus.
        plain: A plain step, in the unit of the costs; 1 where they are relative to it already.
    """
    rows = drafts if bonus is None else drafts + 1
    return expected_tokens(alpha, rows) * plain / round_cost(drafts, draft, judging, bonus)
