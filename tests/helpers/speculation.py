"""Self-speculative decoding emits the tokens of plain decoding, and both keeps and drops drafts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shortstack.runtime import DraftPolicy, Model


def check_drafts(model: Model, exits: Sequence[int], vocab: int, tokens: int, longer: int) -> None:
    """Decode random prompts from every exit, twice, with growing drafts.

    Args:
        model: A loaded bundle.
        exits: Its exits.
        vocab: Prompts are of token ids below this.
        tokens: How many to generate.
        longer: By how many tokens each prompt is longer than the one before.
    """
    drafted = accepted = 0
    for seed, exit_layer in enumerate([*exits, *exits]):
        prompt = np.random.default_rng(seed).integers(3, vocab, 5 + longer * seed).tolist()
        expected = model.generate(prompt, max_new_tokens=tokens, ignore_eos=True).tokens
        result = model.generate(
            prompt,
            max_new_tokens=tokens,
            ignore_eos=True,
            strategy="self-speculative",
            exit_layer=exit_layer,
            draft=DraftPolicy(2 + seed, has_bonus=bool(seed % 2)),
        )
        assert result.tokens == expected
        drafted += result.stats.drafted
        accepted += result.stats.accepted
    assert 0 < accepted < drafted
