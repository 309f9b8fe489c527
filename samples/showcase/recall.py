r"""Texts that only a model which looks back can complete, to train on and to probe with; and who completes them.

Two kinds, over words from a fixed list, drawn at random for each text::

            prompt                              completion
    recall  red owl, tin fox, oak cat\ntin      fox             4 to 8 pairs of a key and a value, keys and values
                                                                distinct, then one of the keys again
    copy    red tin oak owl\n                   red tin oak owl 6 to 12 distinct words, then the same again

What is trained on asks for all keys, in another order (``tin fox, red owl, oak cat``), since one token is little to
learn from. Nothing but the text itself tells the answer. Of recall, a model that names one of the values it saw, no
matter which, is right once in 4 to 8 times, and one that names any value once in 16. Small models from scratch learn
it late and all at once, after some number of steps rather than of texts: a plain model of width 128 recalls 87% after
1500 steps of 8 texts at a rate of 1.5e-3, and 17% after as many of 32 at 3e-3; with weights drawn at 0.02 in place of
0.06 it had not begun after 900. Perplexity hardly shows what is lost here: layers of Hymba that shared K,V did better
on the whole and recalled worse (https://arxiv.org/abs/2411.13676).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch

from shortstack.export.twin.model import Twin
from shortstack.samples.recipes.training.data import Example, collate

Kind = Literal["recall", "copy"]
KEYS = (
    "red", "tin", "oak", "big", "old", "new", "hot", "wet", "dry", "raw", "fat", "shy", "sad", "mad", "low", "tall",
)  # fmt: skip
VALUES = (
    "owl", "fox", "cat", "dog", "hen", "cow", "pig", "ant", "bee", "bat", "rat", "elk", "emu", "ape", "eel", "cod",
)  # fmt: skip
_PAIRS, _WORDS, _BATCH = (4, 8), (6, 12), 16


@dataclass(frozen=True, slots=True)
class Completed:
    """How many texts were completed.

    Attributes:
        texts: Part of the texts whose completion has every token right.
        tokens: Part of the tokens of all completions that are right.
    """

    texts: float
    tokens: float

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        return asdict(self)


def draw_rows(kind: Kind, count: int, seed: int, *, asks_all: bool = False) -> list[dict[str, str]]:
    """Draw texts, each a row with ``prompt`` and ``completion``; the same for the same seed.

    Args:
        kind: Which.
        count: How many.
        seed: Of the draws.
        asks_all: Recall the values of all keys, and not of one.
    """
    random = np.random.default_rng((seed, 0 if kind == "recall" else 1))
    return [_recall(random, asks_all) if kind == "recall" else _copy(random) for _ in range(count)]


def _recall(random: np.random.Generator, asks_all: bool) -> dict[str, str]:
    count = int(random.integers(_PAIRS[0], _PAIRS[1] + 1))
    pairs = list(zip(random.permutation(KEYS)[:count], random.permutation(VALUES)[:count], strict=True))
    said = ", ".join(f"{key} {value}" for key, value in pairs)
    order = random.permutation(count)
    if asks_all:
        again = ", ".join(f"{pairs[index][0]} {pairs[index][1]}" for index in order)
        return {"prompt": f"{said}\n", "completion": again}
    key, value = pairs[order[0]]
    return {"prompt": f"{said}\n{key}", "completion": f" {value}"}


def _copy(random: np.random.Generator) -> dict[str, str]:
    count = int(random.integers(_WORDS[0], _WORDS[1] + 1))
    words = " ".join(random.permutation([*KEYS, *VALUES])[:count])
    return {"prompt": f"{words}\n", "completion": words}


@torch.no_grad()
def completed(twin: Twin, examples: Sequence[Example]) -> Completed:
    """Count which completions a model finds most likely, token by token, given the tokens of the text before each.

    Args:
        twin: The model, in evaluation mode.
        examples: The texts; what ends them is no part of the completion.
    """
    texts = right = tokens = 0
    for start in range(0, len(examples), _BATCH):
        chunk = examples[start : start + _BATCH]
        batch = collate(chunk)
        hits = twin(batch.ids).flatten(0, 1)[batch.rows].argmax(-1) == batch.targets
        texts += sum(bool(part.all()) for part in hits.split([len(e.ids) - e.start for e in chunk]))
        right += int(hits.sum())
        tokens += len(hits)
    return Completed(texts / len(examples), right / tokens)
