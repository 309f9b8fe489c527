"""Measures how far an answer with early exit is from the whole model's answer to the same prompt, 0 (the same) to 1.

No reference answers are needed, since an answer is compared with that of the whole model (CALM's textual consistency,
https://arxiv.org/abs/2207.07061, section 4).

======  ==============================================================================================================
loss    between the early answer and the full one, each decoded on its own from the same prompt
======  ==============================================================================================================
text    1 - ROUGE-L F1 over words and punctuation marks, ignoring case: 1 - 2 LCS / (words of one + words of the other)
token   edit distance (insertions, deletions, replacements) over token ids / tokens of the longer answer
any     1 if any token differs, 0 if all are the same
======  ==============================================================================================================

ROUGE-L is from Lin, "ROUGE: A Package for Automatic Evaluation of Summaries" (2004), section 3.1, with equal weight on
recall and precision. Scripts without spaces between words are compared character by character.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

Loss = Literal["text", "token", "any"]
LOSSES: tuple[Loss, ...] = ("text", "token", "any")
# Thai, Lao, Burmese, Khmer, Japanese and Chinese are written without spaces.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of a model.

    Attributes:
        tokens: Its token ids, including the one that ended it.
        text: Its text.
    """

    tokens: tuple[int, ...]
    text: str


def dissimilarity(loss: Loss, early: Answer, full: Answer) -> float:
    """Return how far ``early`` is from ``full``, 0..1; see the table above."""
    if loss == "text":
        return rouge_l_distance(words(early.text), words(full.text))
    if loss == "token":
        return edit_share(early.tokens, full.tokens)
    return float(early.tokens != full.tokens)


def words(text: str) -> list[str]:
    """Split a text into words and punctuation marks, in lower case and without spaces."""
    return _WORD.findall(text.casefold())


def rouge_l_distance(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
    """Return 1 - ROUGE-L F1; 0 if both are empty."""
    return 1 - 2 * longest_common_subsequence(a, b) / (len(a) + len(b)) if a or b else 0.0


def longest_common_subsequence(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Return the length of the longest common subsequence.

    Bit-parallel, with a row of the usual table in one integer: Hyyrö, "Bit-Parallel LCS-Length Computation Revisited",
    2004.
    """
    places: dict[Hashable, int] = {}
    for index, item in enumerate(a):
        places[item] = places.get(item, 0) | 1 << index
    mask = (1 << len(a)) - 1
    row = mask  # a zero bit means that the length grows by one there
    for item in b:
        matches = row & places.get(item, 0)
        row = ((row + matches) | (row - matches)) & mask
    return len(a) - row.bit_count()


def edit_share(a: Sequence[int], b: Sequence[int]) -> float:
    """Return the edit distance divided by the longer length; 0 if both are empty."""
    longer = max(len(a), len(b))
    return edit_distance(a, b) / longer if longer else 0.0


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the fewest insertions, deletions and replacements that turn ``a`` into ``b`` (Levenshtein)."""
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    row = list(range(len(b) - start + 1))
    for index, item in enumerate(a[start:], 1):
        diagonal, row[0] = row[0], index
        for column, other in enumerate(b[start:], 1):
            diagonal, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, diagonal + (item != other))
    return row[-1]
