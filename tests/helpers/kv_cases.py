"""Cases for the tests of shared keys and values: maps, where each may be cut, and the twin's logits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, get_args

import numpy as np
import pytest
import torch

from shortstack.export.twin.model import Twin
from shortstack.graphs.kv_map import Partition, Position, complete_from, iterated_groups, parse_kv_map, placement
from shortstack.runtime import ExitPolicy, Model
from shortstack.runtime.engine.stack import Stack

LAYERS, PRODUCERS = 7, 3
"""The smallest shape in which the nine placements give nine maps; the groups of lasagna differ in size."""
PLACEMENTS = list(product(get_args(Partition), get_args(Position)))
NINE = [placement(partition, position, LAYERS, PRODUCERS) for partition, position in PLACEMENTS]
TOLERANCE = 1e-4
TEXT = 24

PIZZA = placement("pizza", "bottom", 6, 3)
CASES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    *((kv_map, {}) for kv_map in NINE),
    (placement("lasagna", "middle", 9, 3), {}),
    ((3, 4, 4, 3, 4, 5), {}),  # groups that overlap
    (placement("sandwich", "middle", 7, 4), {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 12}),
    (placement("pizza", "bottom", 7, 2), {"hidden_size": 60, "intermediate_size": 77, "head_dim": 20}),
    (placement("lasagna", "bottom", 6, 3), {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True}),
    (placement("sandwich", "top", 6, 3), {"qkv_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    (placement("sandwich", "top", 6, 3), {"masks_diagonal": True}),
    (PIZZA, {"masks_diagonal": True}),
    (PIZZA, {"windows": (5, 3, 4, 0, 0, 0)}),
    (PIZZA, {"windows": (0, 0, 0, 4, 1, 7)}),  # consumers alone
    (PIZZA, {"windows": (4, 4, 0, 3, 0, 5), "masks_diagonal": True}),
    (parse_kv_map("yoco", 6), {"windows": (4, 4, 4, 0, 0, 0)}),
    (placement("pizza", "middle", 6, 3), {"windows": (0, 4, 5, 5, 3, 0)}),
    (placement("pizza", "middle", 6, 3), {"masks_diagonal": True}),
    (placement("sandwich", "middle", 6, 3), {"windows": (0, 5, 5, 5, 0, 3)}),
    (placement("lasagna", "top", 6, 3), {"windows": (3,) * 6, "masks_diagonal": True}),
    ((0, 0, 0, 3, 0, 3), {}),
    ((0, 1, 2, 3), {"windows": (2, 0, 3, 1)}),
]
cases = pytest.mark.parametrize(
    ("kv_map", "changes"),
    CASES,
    ids=lambda c: "_".join(map(str, c)) if isinstance(c, tuple) else "+".join(c) or "plain",
)


def ids(length: int = TEXT, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 131, length).tolist()


def exits_of(kv_map: tuple[int, ...]) -> tuple[int, ...]:
    """Return the lowest depth at which the map may be cut, and the lowest above which no layer owns a cache."""
    groups = iterated_groups(kv_map)
    legal = [d for d in range(1, len(kv_map)) if not any(g.start < d < g.end for g in groups)]
    return tuple(sorted({*legal[:1], *(d for d in legal if d == complete_from(kv_map))}))


@torch.no_grad()
def wanted(twin: Twin, text: Sequence[int], depths: Sequence[int]) -> dict[int, np.ndarray]:
    """Return the twin's logits [len(text), vocab], by depth."""
    boundaries = twin.boundaries(torch.tensor([list(text)]), set(depths))
    return {depth: twin.logits(boundaries[depth].hidden)[0].numpy() for depth in depths}


def step_by_step(stack: Stack, text: Sequence[int], prompt: int) -> np.ndarray:
    """Return the final head's logits [len(text) - prompt + 1, vocab] from the prompt's last position on."""
    stack.prefill(text[:prompt], 0, True)
    found = [stack.final.logits[0].copy()]
    for past in range(prompt, len(text)):
        stack.put(0, text[past])
        stack.draft(0, past, with_head=False, with_logits=False)
        stack.verify(1, past, True)
        found.append(stack.final.logits[0].copy())
    return np.stack(found)


def early(model: Model, prompt: Sequence[int], policy: ExitPolicy, tokens: int = 24) -> tuple[int, ...]:
    """Return the tokens that early exit generates."""
    result = model.generate(prompt, max_new_tokens=tokens, ignore_eos=True, strategy="early-exit", exits=policy)
    assert result.stats.is_balanced
    return result.tokens
